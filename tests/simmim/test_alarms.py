"""Warnings come when they should, once, and not otherwise."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator

from simmim.alarms import overfitting
from simmim.checkpoint import Checkpoints
from simmim.engine import fit
from simmim.runlog import RunLog
from simmim.stopping import StopRequest


def rows(training: list[float], held_out: list[float]) -> list[dict]:
    pairs = zip(training, held_out, strict=True)
    return [
        row
        for step, (loss, holdout) in enumerate(pairs, start=1)
        for row in ({"step": step, "loss": loss}, {"step": step, "holdout_loss": holdout})
    ]


FALLING = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
TURNING = [1.0, 0.9, 0.8, 0.8, 0.8, 0.9, 1.0, 1.1]


def warnings(lines: list[dict]) -> list[int]:
    """Steps whose evaluation ends in a warning, as the loop asks: after every evaluation."""
    return [
        lines[end]["step"]
        for end in range(len(lines))
        if "holdout_loss" in lines[end] and overfitting(lines[: end + 1])
    ]


def test_it_says_when_the_held_out_loss_turns():
    assert warnings(rows(FALLING, TURNING)) == [6]
    text = overfitting(rows(FALLING, TURNING)[:12])
    assert "since step 5 the held-out loss rose from 0.8000 to 0.8333" in text
    assert "training loss fell from 0.7000 to 0.6000" in text


@pytest.mark.parametrize(
    ("training", "held_out"),
    [
        (FALLING, FALLING),
        (TURNING, TURNING),  # both rise: not overfitting
        (FALLING, [0.8, 0.8, 0.8, 0.803, 0.804, 0.805, 0.806, 0.807]),  # less than 1 %
        (FALLING, [1.0, 0.8, 0.81, 0.8, 0.81, 0.8, 0.81, 0.8]),  # noise
        (FALLING[:3], TURNING[-3:]),  # too short to tell
    ],
)
def test_it_is_silent_otherwise(training, held_out):
    assert warnings(rows(training, held_out)) == []


def test_it_warns_again_after_a_recovery():
    held_out = [1.0, 1.0, 1.0, 1.2, 1.2, 1.0, 0.8, 0.6, 0.6, 0.6, 0.8, 0.9]
    training = [1 - 0.05 * number for number in range(len(held_out))]
    assert len(warnings(rows(training, held_out))) == 2


def test_labels_are_noisy_rows():
    """Numbers that are not losses, and evaluations without training between them, do no harm."""
    assert overfitting([]) is None
    assert overfitting([{"step": 1, "holdout_loss": 1.0, "holdout_top1": 0.5}] * 6) is None


class Memoriser(torch.nn.Module):
    """Learns the training batch, and is judged worse and worse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        return self.weight.abs()

    def measure(self, batch):
        return {"loss": 2 - self.weight.abs()}

    def picture(self, batch):
        from PIL import Image

        return Image.new("RGB", (1, 1))


def test_the_loop_warns_once_and_forgets_what_was_lost(tmp_path, capsys):
    def train(start: int, total: int) -> None:
        accelerator = Accelerator(cpu=True)
        model = Memoriser()
        number = torch.zeros(1, dtype=torch.int64)
        batch = {"image": torch.zeros(1, 1), "epoch": number, "index": number, "broken": []}
        fit(
            accelerator,
            model,
            torch.optim.SGD([{"params": model.parameters(), "lr_scale": 1.0}], lr=0.0),
            [batch] * total,
            lr_at=lambda step: 0.05,
            start_step=start,
            total_steps=total,
            accumulation=1,
            clip_grad_norm=None,
            images_per_epoch=1,
            seed=0,
            log=RunLog(tmp_path, is_main=True),
            checkpoints=Checkpoints(tmp_path / "checkpoints", {}, keep=1),
            stop=StopRequest(),
            metrics_every_steps=1,
            pictures_every_steps=1,
            checkpoint_every_steps=100,
            holdout=[batch],
            preview=batch,
        )

    train(0, 8)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["warning"]
    assert events[0]["text"].startswith("overfitting: since step 3 ")
    assert capsys.readouterr().out.count("warning: step 4: overfitting") == 1
    train(2, 3)
    assert (tmp_path / "events.jsonl").read_text() == ""
