"""Ways of attention that are measured side by side are the same attention, and the script for a GPU sees it if not.

The kernel is interpreted, in a process of its own: see ``tests/swin/test_triton_attention.py``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simmim.benchmarks import attention as benchmark
from simmim.benchmarks.step import make_steps, perturb
from simmim.masking import MaskGenerator
from simmim.tasks.simmim import SimMIM
from swin import SwinConfig, SwinEncoder, attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_under_the_interpreter starts")
plainly = pytest.mark.skipif(INTERPRETED, reason="runs where the interpreter is off")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/gpu/check_kernel.py"
CPU = torch.device("cpu")
CONFIG = SwinConfig(embed_dim=16, depths=(1, 2), num_heads=(1, 2), image_size=(32, 32), window_size=(4, 4))
SMALL = SwinConfig(embed_dim=8, depths=(1,), num_heads=(1,), image_size=(24, 8), window_size=(3, 2))
"""What is interpreted takes time: two windows of six tokens."""
WAYS = ["chunks", "plain", "kernel", "sdpa", "flex"]


def load_script():
    spec = importlib.util.spec_from_file_location("check_kernel", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@plainly
def test_under_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
    assert "5 passed, 17 skipped" in result.stdout, result.stdout[-2_000:]


@plainly
@pytest.mark.parametrize("kind", ["cosine", "dot"])
@pytest.mark.parametrize(("grid", "shifted"), [((8, 8), True), ((7, 5), True), ((4, 8), False)])
def test_all_ways_agree(kind, grid, shifted):
    config = SwinConfig.from_dict({**CONFIG.to_dict(), "attention": kind})
    case = benchmark.make_case(config, 1, 2, "fp32", CPU, grid=grid, shifted=shifted)
    expected = benchmark.reference(case)
    assert [x.dtype for x in expected] == [torch.float64] * 4 and expected[0].shape == (2, *grid, 32)
    for name, (function, on_grid) in benchmark.implementations(case).items():
        if name in ("chunks", "plain", "sdpa"):  # the kernel is interpreted below
            way = benchmark.make_implementation(function, case, on_grid)
            found = benchmark.results(way, case)
            for x, y in zip(found, expected, strict=True):
                assert x.shape == y.shape and (x.double() - y).norm() / y.norm() < 2e-5, name
            out, bias = benchmark.differences(way, case, expected)
            assert out == float((found[0] - expected[0]).abs().max() / expected[0].abs().max()) < 2e-5
            assert bias == float((found[3] - expected[3]).abs().max() / expected[3].abs().max()) < 2e-5


@plainly
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("shifted", [True, False])
def test_flex_has_the_same_output(shifted):
    """Its gradient is there on a GPU alone."""
    case = benchmark.make_case(CONFIG, 1, 2, "fp32", CPU, grid=(8, 8), shifted=shifted)
    way = benchmark.make_implementation(*[benchmark.implementations(case)["flex"][0], case], on_grid=False)
    with torch.no_grad():
        out = way.attend(*(x.detach() for x in way.inputs))
    out = benchmark.window_reverse(out, case.windows, case.grid)
    torch.testing.assert_close(out, benchmark.reference(case)[0].float(), rtol=1e-4, atol=1e-4)


@plainly
def test_half_precision_is_measured_from_what_it_was_given():
    case = benchmark.make_case(CONFIG, 0, 2, "bf16", CPU)
    expected, off = benchmark.reference(case), {}
    for name in ("chunks", "plain", "sdpa"):
        off[name] = benchmark.differences(
            benchmark.make_implementation(*[benchmark.implementations(case)[name][0], case], on_grid=False),
            case,
            expected,
        )
    assert all(1e-4 < out < 2e-2 for out, _ in (off["chunks"], off["plain"]))
    assert off["sdpa"][1] > 2 * off["chunks"][1]  # its logits, of up to 100, are of rounded queries and keys


@plainly
def test_everything_is_measured_and_what_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "make_config", lambda *_, **__: CONFIG)
    by_sdpa = benchmark.by_sdpa

    def refuse(qkv, factor, *rest):
        if len(factor) == 2:
            raise RuntimeError("no such\nthing")
        return by_sdpa(qkv, factor, *rest)

    said: list[str] = []
    settings = dict(batch_size=2, precisions=["fp32", "bf16"], rounds=2, out=tmp_path / "speed.json", echo=said.append)
    found = benchmark.attention_speed(["swinv2_tiny"], [(32, 4)], **settings)
    assert [(speed.precision, speed.name) for speed in found] == [(p, n) for p in ("fp32", "bf16") for n in WAYS]
    assert json.loads((tmp_path / "speed.json").read_text()) == [vars(speed) for speed in found]
    assert len(said) == 14 and "swinv2_tiny 32/4 x 2 fp32 on cpu; grids 8 x 8, 4 x 4" in said[0]
    ours, plain, kernel, sdpa, flex = found[:5]
    assert ours.ratio == 1 and ours.kept_bytes == 4 * 2 * (64 * 16 + 2 * 16 * 32)  # its output alone
    assert plain.kept_bytes > 2 * ours.kept_bytes
    for speed in (ours, plain, sdpa):
        assert speed.ms == pytest.approx(speed.stage_ms[0] + 2 * speed.stage_ms[1]) and speed.ms > 0
        assert speed.ratio > 0 and 0 < speed.output_difference < 1e-4 and 0 < speed.bias_difference < 1e-4
        assert not speed.reason
    for speed, reason, text in ((kernel, "Triton and a GPU", said[4]), (flex, "backward on CPU", said[6])):
        assert (
            speed.reason.startswith("failed in stage 0")
            and reason in speed.reason
            and speed.reason in text
            and "\n" not in text
        )
        assert speed.ms is speed.stage_ms is speed.ratio is speed.kept_bytes is speed.output_difference is None
    monkeypatch.setattr(benchmark, "by_sdpa", refuse)
    assert (
        benchmark.measure(("tiny", 32, 4, 2, "fp32"), CONFIG, 1, CPU)[3].reason
        == "failed in stage 1: RuntimeError: no such"
    )
    monkeypatch.setattr(benchmark, "attend", None)
    ours, plain = benchmark.measure(("tiny", 32, 4, 2, "fp32"), CONFIG, 1, CPU)[:2]
    assert (
        "not callable" in ours.reason and plain.ratio is None and plain.ms > 0 and " - " in benchmark.format_line(plain)
    )


@plainly
def test_rounds_are_compared_with_rounds():
    assert benchmark.total([[1.0, 2.0], [10.0, 20.0]], [1, 3]) == [31.0, 62.0]


@plainly
def test_kept_bytes_are_those_between_forward_and_backward():
    case = benchmark.make_case(CONFIG, 0, 1, "fp32", CPU)
    way = benchmark.make_implementation(lambda qkv, *_: (qkv * qkv).exp() * 2, case, True)
    assert benchmark.kept_bytes(way, case) == 2 * 4 * case.qkv.numel()  # exp, and the output; not what is given


@plainly
def test_a_door_to_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "attention", "--encoders", "nobody"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools/benchmark.py"), run_name="__main__")
    assert ended.value.code == 2 and "unknown encoder 'nobody'" in capsys.readouterr().err


@plainly
def test_without_a_gpu_the_script_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["check_kernel.py", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 2 and "no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
@plainly
def test_batches_grow_while_they_fit():
    tried = []

    def measure(encoder, batch_size, baselines, compiled):
        tried.append((batch_size, baselines, compiled))
        if batch_size * (1 + len(baselines) + compiled) > 64:
            raise torch.OutOfMemoryError("full")

    assert load_script().largest_batches("swinv2_base", 16, measure) == 64
    assert tried == [
        (16, ["timm"], True),
        (32, ["timm"], True),
        (32, [], True),
        (64, [], True),
        (64, [], False),
        (128, [], False),
    ]


@plainly
def test_losses_that_are_apart_are_seen():
    largest_difference = load_script().largest_difference
    assert largest_difference({"without": [1.0, 2.0], "kernel": [1.0, 2.02]}) == pytest.approx(0.01)
    assert not largest_difference({"without": [1.0, 2.0], "kernel": [float("nan"), 2.0]}) <= 1


@pytest.fixture
def script(monkeypatch):
    """On one small stage and few steps, in fp32."""
    script = load_script()
    monkeypatch.setattr(script, "make_config", lambda *_, **__: SMALL)
    monkeypatch.setattr(script, "STEPS", 2)
    monkeypatch.setattr(script, "IMAGES", 1)
    return script


def make_small() -> SimMIM:
    torch.manual_seed(0)
    return perturb(SimMIM(SwinEncoder(SMALL), MaskGenerator((24, 8), 8, 0.5), mean=[0.5] * 3, std=[0.2] * 3))


@interpreted
def test_the_script_sees_whether_the_kernel_agrees(script, tmp_path, capsys):
    assert script.check_agreement(tmp_path, CPU, ["swinv2_tiny"], [(24, 3)]) == 0
    rows = json.loads((tmp_path / "agreement.json").read_text())
    assert [(row["title"], row["name"]) for row in rows] == [
        (f"swinv2_tiny 24/3 {precision} {kind}", name)
        for precision in ("fp32", "bf16")
        for kind in ("plain", "shifted", "shifted, padded")
        for name in ("kernel", "chunks")
    ]
    assert all(0 < off < row["furthest"] for row in rows if row["name"] == "kernel" for off in row["off"])
    assert "DISAGREES" not in capsys.readouterr().out


@interpreted
@pytest.mark.parametrize("fault", [1.001, float("nan")])
def test_the_script_sees_a_kernel_that_is_wrong(script, tmp_path, monkeypatch, capsys, fault):
    right = benchmark.attend_windows

    def wrong(qkv, factor, bias, *rest, **kind):
        return right(qkv, factor, bias * fault, *rest, **kind)

    monkeypatch.setattr(benchmark, "attend_windows", wrong)
    monkeypatch.setattr(script, "MAX_RELATIVE_ERROR", {"fp32": 1e-4})
    assert script.check_agreement(tmp_path, CPU, ["swinv2_tiny"], [(24, 3)]) == 3
    assert capsys.readouterr().out.count("DISAGREES") == 3


@interpreted
def test_the_script_trains_in_three_ways(script, tmp_path, monkeypatch, traced, capsys):
    assert script.check_losses(tmp_path, CPU, make_small(), 1) == 0
    assert "DISAGREES" not in capsys.readouterr().out and traced
    found = json.loads((tmp_path / "losses.json").read_text())
    assert list(found) == ["fp32", "bf16"] and all(
        list(of) == ["without", "kernel", "compiled"] for of in found.values()
    )
    losses = found["fp32"]["kernel"]
    assert len(losses) == 2 and losses[-1] < 0.999 * losses[0]
    right = attention.attend_windows
    monkeypatch.setattr(attention, "attend_windows", lambda qkv, *rest, **kind: right(-qkv, *rest, **kind))
    monkeypatch.setattr(script, "MAX_LOSS_ERROR", {"fp32": script.MAX_LOSS_ERROR["fp32"]})
    assert script.check_losses(tmp_path, CPU, make_small(), 1) == 1
    assert capsys.readouterr().out.count("DISAGREES") == 1


@interpreted
def test_a_step_with_the_kernel_is_measured_too(traced):
    steps, losses = make_steps(make_small(), [], True, 1, "fp32", CPU), []
    assert list(steps) == ["simmim", "simmim, kernel", "simmim, compiled"]
    for name, step in steps.items():
        with pytest.MonkeyPatch.context() as patch:
            if name != "simmim":
                patch.setattr(attention, "attend", None)  # nothing else attends
            if name != "simmim, kernel":
                patch.setattr(attention, "attend_windows", None)
            losses.append(float(step()))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
