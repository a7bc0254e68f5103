"""The attention backend is selected by a benchmark, only among equal results, and cached in the run folder."""

from __future__ import annotations

import json
import logging
import time

import pytest
import torch
from accelerate import Accelerator

from simmim import stages
from simmim.config.loading import load_recipe
from simmim.training import attention_backend
from simmim.training.attention_backend import choose_attention_backend, read_choice, restore_attention_backend
from swin import SwinEncoder, attention, make_encoder
from swin.chunked_attention import attend
from swin.windows import attention_mask, window_partition, window_reverse
from tests.simmim.test_training import TINY, saved_state

CPU = torch.device("cpu")


def by_parts(qkv, factor, bias, windows, *, cosine):
    """Compute what the fused kernel computes, by window partition."""
    grid = (qkv.shape[1], qkv.shape[2])
    mask = attention_mask(grid, windows, qkv.device)
    return window_reverse(attend(window_partition(qkv, windows), factor, bias, mask, cosine=cosine), windows, grid)


@pytest.fixture
def kernel(monkeypatch):
    """Treat the CPU as a device with a fused kernel; return a setter of the function that replaces the kernel."""
    monkeypatch.setattr(attention_backend, "DEVICES", ("cpu",))
    monkeypatch.setattr("swin.encoder.available", lambda device: True)
    monkeypatch.setattr(attention_backend, "ROUNDS", 1)

    def use(function):
        monkeypatch.setattr(attention, "attend_windows", function)

    use(by_parts)
    return use


def set_times(monkeypatch, plain: float, fused: float) -> None:
    def time_alternately(step, device):
        step(False), step(True)
        return {False: [plain], True: [fused]}

    monkeypatch.setattr(attention_backend, "time_alternately", time_alternately)


def make_small() -> SwinEncoder:
    """Create a small encoder on the meta device, as in a stage that starts from scratch."""
    with torch.device("meta"):
        return make_encoder(
            "swinv2_tiny", embed_dim=8, depths=(1, 4), num_heads=(1, 2), image_size=36, window_size=4, drop_path=0.3
        )


def stage_with(fused_attention: str):
    recipe = load_recipe("demo", [f"stages.pretrain.speed.fused_attention={fused_attention}"])
    return recipe.stages["pretrain"]


def is_fused(encoder: SwinEncoder) -> bool:
    (fused,) = {block.attn.fused for stage in encoder.layers for block in stage.blocks}
    return fused


class Messages(logging.Handler):
    """Collects the messages of the attention backend while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> list[str]:
        attention_backend.logger.setLevel(logging.INFO)
        attention_backend.logger.addHandler(self)
        return self.texts

    def __exit__(self, *_) -> None:
        attention_backend.logger.removeHandler(self)
        attention_backend.logger.setLevel(logging.NOTSET)


def choose(encoder, folder, fused_attention="auto") -> tuple[list[str], list[str]]:
    """Select the backend of ``encoder``; return warnings and messages."""
    with Messages() as messages:
        warnings = choose_attention_backend(encoder, stage_with(fused_attention), Accelerator(cpu=True), folder)
    return warnings, messages


@pytest.mark.parametrize(("plain", "fused"), [(2.0, 1.0), (1.0, 2.0)])
def test_the_faster_backend_is_selected_and_cached(plain, fused, tmp_path, monkeypatch, kernel):
    set_times(monkeypatch, plain, fused)
    encoder = make_small()
    warnings, (message,) = choose(encoder, tmp_path)
    assert not warnings and is_fused(encoder) == (fused < plain)
    kept = json.loads((tmp_path / "attention.json").read_text())
    # One block of the first stage, four of the second, of which two are measured.
    assert (kept["plain_ms"], kept["kernel_ms"]) == (3000 * plain, 3000 * fused)
    assert kept["machine"]["device"] == "cpu" and f"{3000 * fused:.1f}" in message
    monkeypatch.setattr(attention_backend, "benchmark", None)  # it would fail if called
    again = make_small()
    assert choose(again, tmp_path) == ([], [message]) and is_fused(again) == (fused < plain)


def test_another_machine_or_a_damaged_cache_is_benchmarked_again(tmp_path, monkeypatch, kernel):
    set_times(monkeypatch, 2.0, 1.0)
    choose(make_small(), tmp_path)
    file = tmp_path / "attention.json"
    kept = json.loads(file.read_text())
    set_times(monkeypatch, 1.0, 2.0)
    encoder = make_small()
    for text in (json.dumps(kept | {"machine": kept["machine"] | {"device": "another"}}), "{", "[]", '{"fused": true}'):
        file.write_text(text)
        encoder.use_kernel()
        choose(encoder, tmp_path)
        assert not is_fused(encoder), text


def test_the_recipe_decides_without_a_benchmark(tmp_path, monkeypatch, kernel):
    monkeypatch.setattr(attention_backend, "benchmark", None)
    for wanted in ("true", "false"):
        encoder = make_small()
        assert choose(encoder, tmp_path, wanted) == ([], []) and is_fused(encoder) == (wanted == "true")
    assert not (tmp_path / "attention.json").exists()


def test_a_device_without_the_kernel_uses_reference_attention(tmp_path):
    encoder = make_small()
    assert choose(encoder, tmp_path) == ([], []) and not is_fused(encoder)
    with pytest.raises(ValueError, match="the attention kernel cannot run on cpu"):
        choose(encoder, tmp_path, "true")


def test_a_kernel_that_fails_or_is_wrong_is_not_used_and_warned_of(tmp_path, kernel):
    def fails(*_, **__):
        raise RuntimeError("no such\ninstruction")

    def errs(*arguments, cosine):
        return 0.9 * by_parts(*arguments, cosine=cosine)

    def errs_backward(qkv, factor, bias, windows, *, cosine):
        return by_parts(qkv, factor, bias.detach(), windows, cosine=cosine) + 0 * bias.sum()

    def no_number(*arguments, cosine):
        return by_parts(*arguments, cosine=cosine) * float("nan")

    for number, (function, words) in enumerate(
        [
            (fails, "which failed on this device (RuntimeError: no such instruction)"),
            (errs, "which gives different results on this device"),
            (errs_backward, "which gives different results on this device"),
            (no_number, "(relative error nan)"),
        ]
    ):
        kernel(function)
        (tmp_path / str(number)).mkdir()
        encoder = make_small()
        (warning,), messages = choose(encoder, tmp_path / str(number))
        assert words in warning and not messages and not is_fused(encoder)
        assert choose(encoder, tmp_path / str(number))[0] == [warning]


def compile_small(encoder, precision: str = "no") -> tuple[list[str], list[str]]:
    """Compile the blocks of ``encoder``; return warnings and messages."""
    with Messages() as messages:
        warnings = attention_backend.compile_blocks(encoder, 2, Accelerator(cpu=True, mixed_precision=precision))
    return warnings, messages


def is_compiled(encoder: SwinEncoder) -> bool:
    (compiled,) = {block.compiled for stage in encoder.layers for block in stage.blocks}
    return compiled


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_blocks_are_compiled_before_the_stage_begins(precision, traced):
    encoder, state = make_small(), torch.get_rng_state()
    warnings, (message,) = compile_small(encoder, precision)
    assert not warnings and message.startswith("blocks compiled in ") and is_compiled(encoder)
    assert torch.equal(torch.get_rng_state(), state) and next(encoder.parameters()).device.type == "meta"
    programs = len(traced)
    assert programs == 3  # a first block that is never dropped; one that may be; and shifted
    encoder = encoder.to_empty(device="cpu").train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        encoder(torch.randn(2, 3, 36, 36)).float().sum().backward()
    assert len(traced) == programs


def test_attention_in_chunks_is_not_compiled(traced):
    encoder = make_small().save_memory(attention_chunks=[1, 4])
    warnings, messages = compile_small(encoder)
    assert warnings == ["blocks are not compiled: compiled attention has no chunks, but 4 are needed to fit memory"]
    assert not messages and not is_compiled(encoder) and not traced


def test_without_a_compiler_blocks_are_not_compiled_and_a_warning_is_returned(monkeypatch):
    def compiler(*_, **__):
        raise RuntimeError("no C++\ncompiler")

    monkeypatch.setattr("swin.blocks.compiled_branches", lambda: compiler)
    encoder = make_small()
    warnings, messages = compile_small(encoder)
    assert warnings == ["blocks are not compiled: compilation failed (RuntimeError: no C++ compiler)"]
    assert not messages and not is_compiled(encoder)


@pytest.mark.slow
def test_a_compiled_run_matches_a_plain_one(tmp_path, traced):
    states = []
    for name, is_on in (("plain", "false"), ("compiled", "true")):
        recipe = load_recipe("demo", [f"name={name}", *TINY, f"stages.pretrain.speed.compile={is_on}"])
        stages.run_stage(recipe, "pretrain", tmp_path)
        assert bool(traced) == (name == "compiled")
        states.append(saved_state(max((tmp_path / name / "pretrain/checkpoints").glob("step_*"))))
    for key, plain in states[0].items():
        torch.testing.assert_close(states[1][key], plain, rtol=1e-3, atol=1e-5)


def test_compile_and_fused_attention_exclude_each_other():
    with pytest.raises(ValueError, match="compile and fused_attention: compiled blocks do not use the fused kernel"):
        load_recipe("demo", ["stages.pretrain.speed={compile: true, fused_attention: true}"])


def test_the_kernel_is_used_when_memory_is_insufficient_without_it(tmp_path, monkeypatch, kernel):
    def attend_in_parts(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(attention, "attend", attend_in_parts)
    encoder = make_small()
    assert choose(encoder, tmp_path) == ([], ["attention with the fused kernel: without it, memory is insufficient"])
    assert is_fused(encoder)


def test_the_benchmark_has_no_side_effects(tmp_path, kernel):
    """Random state, weights, gradients and memory options stay as they are."""
    torch.manual_seed(5)
    encoder = make_encoder("swinv2_tiny", embed_dim=8, depths=(2,), num_heads=(1,), image_size=24, window_size=4)
    encoder.save_memory(checkpointing="full", attention_chunks=3)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    state, seen = torch.get_rng_state(), []

    def spy(*arguments, chunks, **options):
        seen.append(chunks)
        return attend(*arguments, chunks=chunks, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attend", spy)
        choose(encoder, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert len(seen) == 2 * 2 * 2 and min(seen) >= 3  # blocks, forward and again for the gradient, warm-up and round


def test_rounds_alternate():
    turns: list[bool] = []
    times = attention_backend.time_alternately(lambda fused: turns.append(fused) or time.sleep(0.02 * fused), CPU)
    assert turns == [False, True] * attention_backend.ROUNDS and min(times[True]) >= 0.02
    assert len(times[False]) == attention_backend.ROUNDS


@pytest.mark.slow
def test_a_run_uses_the_selected_backend_and_resumes_with_it(tmp_path, monkeypatch, kernel):
    """Replay uses the cached backend as well, and the recipe may change it."""
    set_times(monkeypatch, 2.0, 1.0)
    used: list[int] = []
    kernel(lambda *arguments, **options: used.append(1) or by_parts(*arguments, **options))
    recipe = load_recipe("demo", ["name=tiny", *TINY])
    stages.run_stage(recipe, "pretrain", tmp_path)
    folder = tmp_path / "tiny/pretrain"
    assert used and read_choice(folder).fused
    encoder = make_small()
    restore_attention_backend(encoder, recipe.stages["pretrain"], folder, CPU)
    assert is_fused(encoder)
    other = load_recipe("demo", ["name=other", *TINY, "stages.pretrain.speed.fused_attention=false"])
    used.clear()
    stages.run_stage(other, "pretrain", tmp_path)
    assert not used and not (tmp_path / "other/pretrain/attention.json").exists()
    states = [saved_state(max((tmp_path / name / "pretrain/checkpoints").glob("step_*"))) for name in ("tiny", "other")]
    for key, tensor in states[0].items():  # sums in another order round differently
        torch.testing.assert_close(tensor, states[1][key], rtol=1e-3, atol=1e-5)
    # Speed settings are mutable on resume: the stage counts as finished.
    before = (folder / "export/encoder.json").stat().st_mtime_ns
    stages.run_stage(
        load_recipe("demo", ["name=tiny", *TINY, "stages.pretrain.speed.fused_attention=false"]), "pretrain", tmp_path
    )
    assert (folder / "export/encoder.json").stat().st_mtime_ns == before
