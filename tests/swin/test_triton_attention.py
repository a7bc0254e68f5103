"""Comparison of the fused attention kernel, interpreted on the CPU, with partitioned attention.

``TRITON_INTERPRET=1`` must be set before Triton is imported, so the cases run in a separate process, which the first
test starts: ``pytest tests/swin/test_triton_attention.py`` with that variable.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swin import SwinEncoder, make_encoder
from swin.attention import watch_attention
from swin.chunked_attention import attend
from swin.triton_attention import attend_windows, available
from swin.windows import WindowLayout, attention_mask, fit_windows, window_partition, window_reverse

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process that test_all_cases_pass_in_the_interpreter starts"
)
ROOT = Path(__file__).parents[2]

# grid, window, shifted
CASES = {
    "plain": ((4, 8), (4, 4), False),
    "shifted": ((8, 8), (4, 4), True),
    "padded": ((5, 7), (4, 4), False),
    "shifted and padded": ((7, 9), (4, 4), True),
    "global": ((5, 7), (8, 8), True),
    "one window high": ((3, 12), (5, 5), True),
    "one window wide, padded; blocks without a key of the same side": ((11, 6), (6, 8), True),
    "rectangles": ((4, 15), (2, 9), True),
}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter process")
def test_all_cases_pass_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
    assert " 4 skipped" in result.stdout, result.stdout[-2_000:]  # only the tests that must run without the interpreter


def partitioned_attention(qkv, factor, bias, windows: WindowLayout, *, cosine):
    grid = (qkv.shape[1], qkv.shape[2])
    mask = attention_mask(grid, windows, qkv.device)
    return window_reverse(attend(window_partition(qkv, windows), factor, bias, mask, cosine=cosine), windows, grid)


def with_gradients(function, inputs, windows, cosine):
    """Return the output and the gradients of qkv, factor and bias for a fixed output gradient."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs, windows, cosine=cosine)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, incoming)


def make_inputs(grid, windows, cosine, *, heads=2, width=16, batch=1, dtype=torch.float64):
    """Make inputs with logits of up to 116 in one head and 19 in the other, for sharp and flat softmax."""
    generator = torch.Generator().manual_seed(0)
    t = windows.window[0] * windows.window[1]
    precise = torch.promote_types(dtype, torch.float32)
    qkv = torch.randn(batch, *grid, 3 * heads * width, generator=generator).to(dtype)
    factor = torch.tensor([100.0, 3.0] if cosine else [0.25, 0.2], dtype=precise)[:heads].view(heads, 1, 1)
    bias = 16 * torch.rand(heads, t, t, generator=generator).to(precise)
    return qkv, factor, bias


def relative_errors(actual, expected) -> list[float]:
    """Return the relative errors of output and gradients."""
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(actual, expected, strict=True)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Use small blocks of different sizes, so that the queries and keys of a window span several blocks."""
    monkeypatch.setattr(
        "swin.triton_attention.block_sizes", lambda tokens, width, dtype: {"BLOCK_Q": 32, "BLOCK_K": 16}
    )


@interpreted
@pytest.mark.parametrize(("case", "cosine"), [*((case, True) for case in CASES), ("rectangles", False)])
def test_output_and_gradients_equal_partitioned_attention(case, cosine, small_blocks):
    grid, window, shifted = CASES[case]
    windows = fit_windows(grid, window, shifted)
    inputs = make_inputs(grid, windows, cosine, batch=2 if case in ("plain", "shifted and padded") else 1)
    actual = with_gradients(attend_windows, inputs, windows, cosine)
    expected = with_gradients(partitioned_attention, inputs, windows, cosine)
    assert max(relative_errors(actual, expected)) < 1e-12
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    assert [x.shape for x in actual] == [x.shape for x in expected]


@interpreted
@pytest.mark.parametrize("width", [4, 20])
def test_default_block_sizes_and_any_head_width(width):
    windows = fit_windows((9, 9), (9, 9), False)
    inputs = make_inputs((9, 9), windows, True, width=width)
    expected = with_gradients(partitioned_attention, inputs, windows, True)
    assert max(relative_errors(with_gradients(attend_windows, inputs, windows, True), expected)) < 1e-12


@interpreted
def test_fp32_error_bounds(small_blocks):
    """Measured errors: output 5e-7, gradients 3e-6, the same as partitioned attention."""
    windows = fit_windows((7, 9), (4, 4), True)
    inputs = make_inputs((7, 9), windows, True, dtype=torch.float32)
    expected = with_gradients(partitioned_attention, [x.double() for x in inputs], windows, True)
    out, dqkv, dfactor, dbias = relative_errors(with_gradients(attend_windows, inputs, windows, True), expected)
    assert out < 1e-6 and dqkv < 1e-5 and dfactor < 2e-6 and dbias < 5e-6


@interpreted
def test_bf16_error_bounds(small_blocks):
    """Outputs and gradients in bf16 have rounding errors; the gradients of factor and bias, in fp32, do not.

    Measured errors: output 4e-3 and qkv 3e-3 (the interpreter truncates where a GPU rounds), factor 1e-5, bias 1e-6.
    Partitioned attention, which computes gradients of the weights in bf16, has 2e-3 everywhere.
    """
    windows = fit_windows((7, 9), (4, 4), True)
    inputs = make_inputs((7, 9), windows, True, dtype=torch.bfloat16)
    expected = with_gradients(partitioned_attention, [x.double() for x in inputs], windows, True)
    actual = with_gradients(attend_windows, inputs, windows, True)
    out, dqkv, dfactor, dbias = relative_errors(actual, expected)
    assert [x.dtype for x in actual] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert out < 8e-3 and dqkv < 1e-2 and dfactor < 5e-5 and dbias < 5e-6


@interpreted
def test_zero_tokens_have_finite_and_equal_gradients():
    """Similarities of zero tokens are 0 instead of NaN, and their gradient is limited by the smallest norm."""
    windows = fit_windows((4, 8), (4, 4), True)
    qkv, factor, bias = make_inputs((4, 8), windows, True)
    qkv[:, 1, :3] = 0  # queries, keys and values
    qkv[:, 2, 5, :32] = 0  # queries alone
    actual = with_gradients(attend_windows, (qkv, factor, bias), windows, True)
    expected = with_gradients(partitioned_attention, (qkv, factor, bias), windows, True)
    assert max(relative_errors(actual, expected)) < 1e-12
    there = qkv != 0
    assert (
        relative_errors([actual[1][there]], [expected[1][there]])[0] < 1e-12
    )  # compared separately, because zero tokens have gradients of 1e12


@interpreted
def test_bias_gradient_can_be_split_or_skipped(monkeypatch):
    windows = fit_windows((4, 11), (4, 4), True)
    inputs = make_inputs((4, 11), windows, True)
    expected = with_gradients(attend_windows, inputs, windows, True)  # one part per window
    monkeypatch.setattr("swin.triton_attention.BIAS_PROGRAMS", 4)  # two parts for three windows
    actual = with_gradients(attend_windows, inputs, windows, True)
    assert torch.equal(actual[1], expected[1])
    assert max(relative_errors(actual, expected)) < 1e-13
    qkv, factor, bias = inputs
    monkeypatch.setattr("swin.triton_kernels.bias_gradient_kernel", None)
    out = attend_windows(qkv.requires_grad_(), factor, bias, windows, cosine=True)
    out.sum().backward()
    assert qkv.grad is not None


@interpreted
def test_inputs_need_not_be_contiguous():
    windows = fit_windows((4, 8), (4, 4), True)
    inputs = make_inputs((4, 8), windows, True)
    scattered = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not scattered[0].is_contiguous() and not scattered[2].is_contiguous()
    expected = with_gradients(attend_windows, inputs, windows, True)
    out = attend_windows(*scattered, windows, cosine=True)
    assert torch.equal(out, expected[0])


def make_small(name: str = "swinv2_tiny") -> SwinEncoder:
    """Build an encoder whose grids of 7 x 5 and 4 x 3 tokens are padded and shifted, with random parameters."""
    torch.manual_seed(0)
    encoder = make_encoder(
        name, embed_dim=8, depths=(2, 1), num_heads=(1, 2), image_size=(28, 20), window_size=4, drop_path=0.0
    )
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return encoder.double().train()


@interpreted
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("swinv2_tiny", "none"), ("swinv2_tiny", "selective"), ("swinv2_tiny", "full"), ("swin_tiny", "none")],
)
def test_encoder_with_kernel_equals_encoder_without(name, checkpointing):
    encoder = make_small(name).save_memory(checkpointing=checkpointing)
    images = torch.randn(1, 3, 28, 20, dtype=torch.float64)

    def run(fused: bool) -> list[torch.Tensor]:
        encoder.use_kernel(fused)
        encoder.zero_grad()
        features = encoder(images)
        (features * features.sin()).sum().backward()
        return [features.detach(), *(parameter.grad.clone() for parameter in encoder.parameters())]

    expected = run(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swin.attention.attend", None)  # no other attention may run
        found = run(True)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11)


@interpreted
def test_watch_attention_reports_the_same_with_the_kernel():
    encoder, images, numbers = make_small(), torch.randn(1, 3, 28, 20, dtype=torch.float64), []
    for fused in (False, True):
        encoder.use_kernel(fused)
        with torch.no_grad(), watch_attention(encoder) as watched:
            encoder(images)
        numbers.append(watched)
    assert numbers[0]["max_attention_logit"] > 0 and numbers[0] == pytest.approx(numbers[1], rel=1e-12)


@interpreted
def test_encoder_with_kernel_under_bf16_autocast():
    """Queries are bf16, bias and temperature fp32; the interpreter truncates where a GPU would round."""
    encoder, images = make_small().float(), torch.randn(1, 3, 28, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = encoder(images), encoder.use_kernel()(images)
    assert found.dtype == expected.dtype
    assert relative_errors([found], [expected.double()])[0] < 0.03


@interpreted
def test_availability_in_the_interpreter():
    assert available(torch.device("cpu")) and available(torch.device("cuda"))
    assert not available(torch.device("meta"))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is on")
def test_use_kernel_is_refused_where_it_cannot_run():
    encoder = make_small()
    with pytest.raises(ValueError, match="the attention kernel cannot run on cpu: it needs Triton and a GPU"):
        encoder.use_kernel()
    encoder.use_kernel(False).use_kernel(device="cuda")
    assert all(block.attn.fused for stage in encoder.layers for block in stage.blocks)


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class NoGPU:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device=None):
        return 0

driver.set_active(NoGPU())
from swin import triton_attention, triton_kernels as kernels
from swin.windows import fit_windows

windows = fit_windows((7, 9), (4, 4), True)
qkv, out = torch.empty(2, 7, 9, 96, dtype=torch.bfloat16), torch.empty(2, 7, 9, 32, dtype=torch.bfloat16)
factor, bias, lse = torch.empty(2, 1, 1), torch.empty(2, 16, 16), torch.empty(2, 2, 7, 9)
geometry = triton_attention._geometry(2, (7, 9), windows)
constants = triton_attention._constants(windows, 16, qkv.dtype, True)
given = qkv, factor, bias, lse, out, lse
for program, arguments in (
    (kernels.attention_kernel, (qkv, factor, bias, out, lse, geometry)),
    (kernels.query_gradient_kernel, (*given, qkv, lse, geometry)),
    (kernels.key_gradient_kernel, (*given, qkv, geometry)),
    (kernels.bias_gradient_kernel, (*given, bias, 12, geometry)),
):
    compiled = program.warmup(*arguments, grid=(12, 2, 1), **constants)
    print("compiled", len(compiled.asm["cubin"]) > 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter is on")
def test_kernels_compile_for_sm_90_without_a_gpu(tmp_path):
    """Compile for sm_90 with the assembler of Triton, because the interpreter accepts code that does not compile."""
    pytest.importorskip("triton.backends.nvidia")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.stdout == "compiled True\n" * 4, result.stdout + result.stderr[-4_000:]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is on")
def test_module_imports_without_triton(monkeypatch):
    assert not available(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not available(torch.device("cuda"))
    code = "import sys; sys.modules['triton'] = None; import swin.triton_attention"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
