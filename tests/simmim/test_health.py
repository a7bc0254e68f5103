"""Training-health warnings: overfitting, spikes and collapsed gradients, each reported once."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator

from simmim.signals import StopRequest
from simmim.training.checkpoint import Checkpoints
from simmim.training.engine import LoopSettings, fit
from simmim.training.health import Stability, overfitting
from simmim.training.run_log import RunLog


def rows(training: list[float], validation: list[float]) -> list[dict]:
    pairs = zip(training, validation, strict=True)
    return [
        row
        for step, (loss, validation_loss) in enumerate(pairs, start=1)
        for row in ({"step": step, "loss": loss}, {"step": step, "validation_loss": validation_loss})
    ]


FALLING = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
TURNING = [1.0, 0.9, 0.8, 0.8, 0.8, 0.9, 1.0, 1.1]


def warnings(lines: list[dict]) -> list[int]:
    """Return the steps whose evaluation causes a warning; the loop checks after every evaluation."""
    return [
        lines[end]["step"]
        for end in range(len(lines))
        if "validation_loss" in lines[end] and overfitting(lines[: end + 1])
    ]


def test_a_rising_validation_loss_is_reported():
    assert warnings(rows(FALLING, TURNING)) == [6]
    text = overfitting(rows(FALLING, TURNING)[:12])
    assert "since step 5 the validation loss rose from 0.8000 to 0.8333" in text
    assert "training loss fell from 0.7000 to 0.6000" in text


@pytest.mark.parametrize(
    ("training", "validation"),
    [
        (FALLING, FALLING),
        (TURNING, TURNING),  # both rise: not overfitting
        (FALLING, [0.8, 0.8, 0.8, 0.803, 0.804, 0.805, 0.806, 0.807]),  # less than 1 %
        (FALLING, [1.0, 0.8, 0.81, 0.8, 0.81, 0.8, 0.81, 0.8]),  # noise
        (FALLING[:3], TURNING[-3:]),  # too short to tell
    ],
)
def test_no_overfitting_no_warning(training, validation):
    assert warnings(rows(training, validation)) == []


def test_overfitting_is_reported_again_after_a_recovery():
    validation = [1.0, 1.0, 1.0, 1.2, 1.2, 1.0, 0.8, 0.6, 0.6, 0.6, 0.8, 0.9]
    training = [1 - 0.05 * index for index in range(len(validation))]
    assert len(warnings(rows(training, validation))) == 2


def test_rows_without_losses_are_ignored():
    """Metrics other than losses, and evaluations without training between them, cause no warning."""
    assert overfitting([]) is None
    assert overfitting([{"step": 1, "validation_loss": 1.0, "validation_top1": 0.5}] * 6) is None


class Memoriser(torch.nn.Module):
    """A task whose training loss falls while its validation loss rises."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        return self.weight.abs()

    def eval_step(self, batch):
        return {"loss": 2 - self.weight.abs()}

    def visualize(self, batch):
        from PIL import Image

        return Image.new("RGB", (1, 1))


def a_batch() -> dict:
    zero = torch.zeros(1, dtype=torch.int64)
    return {"image": torch.zeros(1, 1), "epoch": zero, "index": zero, "corrupt": []}


def train(folder, model, start: int, total: int, *, lr: float, every: int, validation: list[dict]) -> None:
    """Train on one batch, with metrics and an evaluation ``every`` so many steps."""
    fit(
        Accelerator(cpu=True),
        model,
        torch.optim.SGD([{"params": model.parameters(), "lr_scale": 1.0}], lr=0.0),
        [a_batch()] * total,
        LoopSettings(
            start_step=start,
            total_steps=total,
            accumulation=1,
            images_per_epoch=1,
            seed=0,
            clip_grad_norm=None,
            metrics_every_steps=every,
            evaluate_every_steps=every,
            checkpoint_every_steps=1000,
        ),
        lr_at=lambda step: lr,
        log=RunLog(folder, is_main=True),
        checkpoints=Checkpoints(folder / "checkpoints", {}, keep=1),
        stop=StopRequest(),
        validation=validation,
        preview=a_batch(),
    )


def test_the_loop_warns_once_and_drops_warnings_of_repeated_steps(tmp_path, capsys):
    train(tmp_path, Memoriser(), 0, 8, lr=0.05, every=1, validation=[a_batch()])
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["warning"]
    assert events[0]["text"].startswith("overfitting: since step 3 ")
    assert capsys.readouterr().out.count("warning: step 4: overfitting") == 1
    train(tmp_path, Memoriser(), 2, 3, lr=0.05, every=1, validation=[a_batch()])
    assert (tmp_path / "events.jsonl").read_text() == ""


def reported(steps: list[tuple[float, float]]) -> list[tuple[int, str]]:
    stability = Stability()
    found = ((step, stability.warning(*numbers)) for step, numbers in enumerate(steps, start=1))
    return [(step, text) for step, text in found if text]


def noisy(loss: float, norm: float, steps: int) -> list[tuple[float, float]]:
    return [(loss + 0.01 * (step % 5), norm * (1 + 0.3 * (step % 3))) for step in range(steps)]


def test_a_spike_is_reported_once():
    steps = noisy(0.5, 1.0, 30)
    steps[20:23] = [(0.9, 4.0), (0.8, 4.0), (0.7, 4.0)]
    steps[27] = (1.2, 9.0)
    found = reported(steps)
    assert [step for step, _ in found] == [21, 28]
    assert found[0][1] == "the loss spiked to 0.9000 from 0.5200, gradient norm 4"


def test_a_collapsed_gradient_is_reported_once():
    found = reported(noisy(0.4, 1.0, 20) + [(0.65, 0.004)] * 200)
    assert len(found) == 1 and found[0][0] == 21
    assert found[0][1].startswith("the gradient norm collapsed from 1.3 to 0.004, the loss is 0.6500 after 0.4200")


def test_a_spike_and_a_following_collapse_are_both_reported():
    found = reported([*noisy(0.4, 1.0, 20), (0.7, 0.2), *[(0.7, 0.001)] * 5])
    assert [(step, text.split(" to ")[0]) for step, text in found] == [
        (21, "the loss spiked"),
        (22, "the gradient norm collapsed from 1.3"),
    ]


def test_a_lasting_change_becomes_normal():
    found = reported([*noisy(0.4, 1.0, 20), *noisy(0.6, 1.0, 200), (1.5, 1.0)])
    assert [step for step, _ in found] == [21, 221]


def test_the_history_before_a_resume_is_used():
    rows = [{"step": step, "loss": 0.4, "grad_norm": 1.0} for step in range(20)] + [
        {"step": 20, "validation_loss": 9.0}
    ]
    assert Stability(rows).warning(0.9, 1.0) is not None
    assert Stability().warning(0.9, 1.0) is None


def test_normal_steps_are_not_reported():
    falling = [(1 / (1 + 0.05 * step), 2 / (1 + step)) for step in range(300)]
    assert reported(falling) == []  # norms fall below 0.01, with the loss
    assert reported([(2.0, 1.0)] * 3 + [(9.0, 1.0)]) == []  # too few steps so far
    assert reported(noisy(0.5, 0.02, 200)) == []
    assert reported([(0.5, 1.0)] * 40 + [(0.54, 1.0)]) == []  # within a tenth, although the loss was constant


def test_the_loop_checks_every_step(tmp_path, capsys):
    class Jumping(Memoriser):
        def forward(self, batch):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(batch) + (50 if self.calls == 25 else 0)

    train(tmp_path, Jumping(), 0, 30, lr=0.001, every=1000, validation=[])
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["event"]) for event in events] == [(25, "warning")]
    assert "warning: step 25: the loss spiked to" in capsys.readouterr().out
