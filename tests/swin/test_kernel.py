"""The kernel of window attention against pad, roll, cut, attend, merge; programs are interpreted on the processor.

Triton decides how it runs when its programs are defined, and by then anybody may have imported it: the cases run in a
process of their own, ``pytest tests/swin/test_kernel.py`` with ``TRITON_INTERPRET=1``, which the first test starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swin.kernel import attend_windows, available
from swin.sequential import attend
from swin.windows import Windows, attention_mask, fit_windows, merge, partition

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_under_the_interpreter starts")
ROOT = Path(__file__).parents[2]

# grid, window, shifted
CASES = {
    "plain": ((4, 8), (4, 4), False),
    "shifted": ((8, 8), (4, 4), True),
    "padded": ((5, 7), (4, 4), False),
    "shifted and padded": ((7, 9), (4, 4), True),
    "global": ((5, 7), (8, 8), True),
    "one window high": ((3, 12), (5, 5), True),
    "one window wide, padded; blocks without a key of the own side": ((11, 6), (6, 8), True),
    "rectangles": ((4, 15), (2, 9), True),
}


@pytest.mark.skipif(INTERPRETED, reason="this is the process")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
    assert " 2 skipped" in result.stdout, result.stdout[-2_000:]  # this one and its like alone


def by_parts(qkv, factor, bias, windows: Windows, *, cosine):
    grid = (qkv.shape[1], qkv.shape[2])
    mask = attention_mask(grid, windows, qkv.device)
    return merge(attend(partition(qkv, windows), factor, bias, mask, cosine=cosine), windows, grid)


def with_gradients(function, inputs, windows, cosine):
    """Output, and gradients of qkv, factor and bias, for an incoming gradient that is always the same."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs, windows, cosine=cosine)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, incoming)


def make_inputs(grid, windows, cosine, *, heads=2, width=16, batch=1, dtype=torch.float64):
    """Logits go up to 116, of one head to 19: softmax is sharp in one and flat in the other."""
    generator = torch.Generator().manual_seed(0)
    t = windows.window[0] * windows.window[1]
    precise = torch.promote_types(dtype, torch.float32)
    qkv = torch.randn(batch, *grid, 3 * heads * width, generator=generator).to(dtype)
    factor = torch.tensor([100.0, 3.0] if cosine else [0.25, 0.2], dtype=precise)[:heads].view(heads, 1, 1)
    bias = 16 * torch.rand(heads, t, t, generator=generator).to(precise)
    return qkv, factor, bias


def distances(actual, expected) -> list[float]:
    """Relative, of output and gradients."""
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(actual, expected, strict=True)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Queries and keys of a window lie in several blocks, of different sizes."""
    monkeypatch.setattr("swin.kernel.blocks", lambda tokens, width, dtype: {"BLOCK_Q": 32, "BLOCK_K": 16})


@interpreted
@pytest.mark.parametrize(("case", "cosine"), [*((case, True) for case in CASES), ("shifted and padded", False)])
def test_output_and_gradients_are_those_of_the_parts(case, cosine, small_blocks):
    grid, window, shifted = CASES[case]
    windows = fit_windows(grid, window, shifted)
    inputs = make_inputs(grid, windows, cosine, batch=2 if case in ("plain", "shifted and padded") else 1)
    actual = with_gradients(attend_windows, inputs, windows, cosine)
    expected = with_gradients(by_parts, inputs, windows, cosine)
    assert max(distances(actual, expected)) < 1e-12
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    assert [x.shape for x in actual] == [x.shape for x in expected]


@interpreted
@pytest.mark.parametrize("width", [4, 20, 32])
def test_any_width_of_a_head_and_blocks_as_they_are(width):
    windows = fit_windows((9, 9), (9, 9), False)
    inputs = make_inputs((9, 9), windows, True, width=width)
    expected = with_gradients(by_parts, inputs, windows, True)
    assert max(distances(with_gradients(attend_windows, inputs, windows, True), expected)) < 1e-12


@interpreted
def test_single_precision(small_blocks):
    """Measured: output 5e-7, gradients 3e-6, as the parts have."""
    windows = fit_windows((7, 9), (4, 4), True)
    inputs = make_inputs((7, 9), windows, True, dtype=torch.float32)
    expected = with_gradients(by_parts, [x.double() for x in inputs], windows, True)
    out, dqkv, dfactor, dbias = distances(with_gradients(attend_windows, inputs, windows, True), expected)
    assert out < 1e-6 and dqkv < 1e-5 and dfactor < 2e-6 and dbias < 5e-6


@interpreted
def test_half_precision(small_blocks):
    """Of the numbers as they come in bf16: what goes out in bf16 is rounded, what goes out in fp32 is not.

    Measured: 4e-3 and 3e-3 (the interpreter cuts numbers off where a GPU rounds them), factor 1e-5, bias 1e-6; the
    parts, whose weights have gradients in bf16, have 2e-3 everywhere.
    """
    windows = fit_windows((7, 9), (4, 4), True)
    inputs = make_inputs((7, 9), windows, True, dtype=torch.bfloat16)
    expected = with_gradients(by_parts, [x.double() for x in inputs], windows, True)
    actual = with_gradients(attend_windows, inputs, windows, True)
    out, dqkv, dfactor, dbias = distances(actual, expected)
    assert [x.dtype for x in actual] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert out < 8e-3 and dqkv < 1e-2 and dfactor < 5e-5 and dbias < 5e-6


@interpreted
def test_tokens_without_length():
    """Their similarities are zero, not undefined; they meet the smallest norm there is in the gradient."""
    windows = fit_windows((4, 8), (4, 4), True)
    qkv, factor, bias = make_inputs((4, 8), windows, True)
    qkv[:, 1, :3] = 0  # queries, keys and values
    qkv[:, 2, 5, :32] = 0  # queries alone
    actual = with_gradients(attend_windows, (qkv, factor, bias), windows, True)
    expected = with_gradients(by_parts, (qkv, factor, bias), windows, True)
    assert max(distances(actual, expected)) < 1e-12
    there = qkv != 0
    assert distances([actual[1][there]], [expected[1][there]])[0] < 1e-12  # beside gradients of 1e12


@interpreted
def test_the_gradient_of_the_bias_may_be_shared_out_or_not_wanted(monkeypatch):
    windows = fit_windows((7, 9), (4, 4), True)
    inputs = make_inputs((7, 9), windows, True)
    expected = with_gradients(attend_windows, inputs, windows, True)  # every window alone
    monkeypatch.setattr("swin.kernel.PROGRAMS", 8)  # four shares of the six windows
    actual = with_gradients(attend_windows, inputs, windows, True)
    assert torch.equal(actual[1], expected[1])
    assert max(distances(actual, expected)) < 1e-13
    qkv, factor, bias = inputs
    monkeypatch.setattr("swin.kernel_programs.bias_program", None)
    out = attend_windows(qkv.requires_grad_(), factor, bias, windows, cosine=True)
    out.sum().backward()
    assert qkv.grad is not None


@interpreted
def test_what_is_handed_over_need_not_lie_in_order():
    windows = fit_windows((4, 8), (4, 4), True)
    inputs = make_inputs((4, 8), windows, True)
    scattered = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not scattered[0].is_contiguous() and not scattered[2].is_contiguous()
    expected = with_gradients(attend_windows, inputs, windows, True)
    out = attend_windows(*scattered, windows, cosine=True)
    assert torch.equal(out, expected[0])


@interpreted
def test_it_runs_where_it_says():
    assert available(torch.device("cpu")) and available(torch.device("cuda"))
    assert not available(torch.device("meta"))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is on")
def test_without_triton_nothing_breaks(monkeypatch):
    assert not available(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not available(torch.device("cuda"))
    code = "import sys; sys.modules['triton'] = None; import swin.kernel"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
