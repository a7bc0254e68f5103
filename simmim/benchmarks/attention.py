"""Speed of window attention alone: this project's implementations and PyTorch's, on the same inputs, in turns.

One shifted block of every stage is measured, forward and backward. Implementations that take windows get them already
partitioned; the time of the kernel, which works on the token grid, includes finding them. Letters: b batch, h w token
grid, n windows, t tokens per window, c channels, m heads, d head width.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from swin import SwinConfig
from swin.attention import WindowAttention
from swin.chunked_attention import at_least_fp32, attend, chunks_in_cache, split_heads
from swin.config import Size, make_config
from swin.triton_attention import attend_windows, available
from swin.windows import WindowLayout, attention_mask, fit_windows, window_partition, window_reverse

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function of concatenated queries, keys and values, factor ``(m, 1, 1)`` and bias ``(m, t, t)`` -> output."""
OURS = "chunks"


@dataclass
class Speed:
    """Measurements of one implementation at one setting; None where it failed."""

    encoder: str
    image_size: int
    window_size: int
    batch_size: int
    precision: str
    name: str
    stage_ms: list[float] | None = None
    """Time of one block of each stage."""
    ms: float | None = None
    """Time of all blocks."""
    ratio: float | None = None
    """Time relative to ``chunks``: above 1, ``chunks`` is faster."""
    kept_bytes: int | None = None
    """Bytes that all blocks keep from forward to backward: outputs included, inputs excluded."""
    output_difference: float | None = None
    """Largest difference from the reference in double precision, relative to the largest value."""
    bias_difference: float | None = None
    """The same for the gradient of the bias."""
    reason: str = ""
    """Reason of a failure."""


@dataclass
class Case:
    """Inputs of a block's attention: ``qkv (b, h, w, 3 c)`` and the gradient of the output ``(b, h, w, c)``."""

    qkv: Tensor
    factor: Tensor
    bias: Tensor
    incoming: Tensor
    windows: WindowLayout
    mask: Tensor | None
    cosine: bool

    @property
    def grid(self) -> Size:
        return self.qkv.shape[1], self.qkv.shape[2]


@dataclass
class Implementation:
    """One implementation of attention with its own copy of the inputs."""

    attend: Attend
    inputs: list[Tensor]
    incoming: Tensor

    def forward(self) -> Tensor:
        return self.attend(*self.inputs)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of qkv, factor and bias."""
        return torch.autograd.grad(out, self.inputs, self.incoming)


class Projected(WindowAttention):
    """Window attention without projections: its tokens already are queries, keys and values."""

    def __init__(self, num_heads: int, cosine: bool) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.cosine = num_heads, cosine

    def project(self, x: Tensor) -> Tensor:
        return x


def attention_speed(
    encoders: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    *,
    batch_size: int,
    precisions: Sequence[str],
    rounds: int,
    out: Path | None = None,
    echo: Callable[[str], None] = print,
) -> list[Speed]:
    """Measure every encoder at every image and window size; print a table and write it as JSON.

    Args:
        encoders: names of encoders.
        sizes: pairs of image size in px and window size in tokens.
        batch_size: images per step.
        precisions: ``fp32`` and ``bf16``.
        rounds: timed rounds; the median is reported.
        out: JSON file to write.
        echo: called with every line of output.

    Raises:
        ValueError: an encoder is unknown, or a window is too large.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configs = [(name, make_config(name, image_size=px, window_size=side)) for name in encoders for px, side in sizes]
    found: list[Speed] = []
    for precision in precisions:
        for encoder, config in configs:
            grids = ", ".join(f"{h} x {w}" for h, w in config.grids())
            setting = encoder, config.image_size[0], config.window_size[0], batch_size, precision
            echo(f"{encoder} {setting[1]}/{setting[2]} x {batch_size} {precision} on {device.type}; grids {grids}")
            stages = "".join(f"{f'stage {stage}, ms':>13}" for stage in range(len(config.depths)))
            echo(f"{'':<8}{stages}{'all blocks':>13}{'ratio':>8}{'kept MB':>10}{'output diff':>13}{'bias diff':>11}")
            for speed in measure(setting, config, rounds, device):
                echo(format_line(speed))
                found.append(speed)
    if out is not None:
        out.write_text(json.dumps([asdict(speed) for speed in found], indent=2) + "\n", encoding="utf-8")
    return found


def format_line(speed: Speed) -> str:
    """Format a line of the table."""
    if speed.reason:
        return f"{speed.name:<8}  {speed.reason}"
    assert speed.stage_ms is not None and speed.kept_bytes is not None
    ratio = "-" if speed.ratio is None else f"{speed.ratio:.2f}"
    return (
        f"{speed.name:<8}{''.join(f'{ms:>13.2f}' for ms in speed.stage_ms)}{speed.ms:>13.2f}{ratio:>8}"
        f"{speed.kept_bytes / 1e6:>10.1f}{speed.output_difference:>13.1e}{speed.bias_difference:>11.1e}"
    )


def measure(
    setting: tuple[str, int, int, int, str], config: SwinConfig, rounds: int, device: torch.device
) -> list[Speed]:
    """Measure every implementation in all stages; one that fails in a stage is skipped in later ones."""
    found: dict[str, Speed] = {}
    seconds: dict[str, list[list[float]]] = {}
    for stage, depth in enumerate(config.depths):
        case = make_case(config, stage, setting[3], setting[4], device)
        expected = reference(case)
        steps: dict[str, Implementation] = {}
        for name, (function, on_grid) in implementations(case).items():
            speed = found.setdefault(name, Speed(*setting, name, [], 0.0, None, 0, 0.0, 0.0))
            if speed.reason:
                continue
            try:
                implementation = make_implementation(function, case, on_grid)
                output_difference, bias_difference = differences(implementation, case, expected)
                kept = kept_bytes(implementation, case)
            except Exception as error:  # compilers, drivers and allocators raise many types
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                found[name] = Speed(*setting, name, reason=f"failed in stage {stage}: {reason}"[:200])
                continue
            assert speed.kept_bytes is not None
            speed.output_difference = max(speed.output_difference or 0.0, output_difference)
            speed.bias_difference = max(speed.bias_difference or 0.0, bias_difference)
            speed.kept_bytes += depth * kept
            steps[name] = implementation
        for name, times in measure_times(steps, rounds, device).items():
            seconds.setdefault(name, []).append(times)
    for name, speed in found.items():
        if not speed.reason:
            speed.stage_ms = [1e3 * median(times) for times in seconds[name]]
            speed.ms = sum(depth * ms for depth, ms in zip(config.depths, speed.stage_ms, strict=True))
            if not found[OURS].reason:
                pairs = zip(total(seconds[name], config.depths), total(seconds[OURS], config.depths), strict=True)
                speed.ratio = median(theirs / ours for theirs, ours in pairs)
    return list(found.values())


def total(seconds: list[list[float]], depths: Sequence[int]) -> list[float]:
    """Return the seconds of all blocks for every round."""
    return [sum(depth * s for depth, s in zip(depths, stages, strict=True)) for stages in zip(*seconds, strict=True)]


def make_case(
    config: SwinConfig,
    stage: int,
    batch_size: int,
    precision: str,
    device: torch.device,
    *,
    grid: Size | None = None,
    shifted: bool = True,
) -> Case:
    """Make the inputs of a block, with temperatures (0.1 to 0.01) and biases (0 to 16) in Swin V2's range."""
    grid = config.grids()[stage] if grid is None else grid
    heads, channels = config.num_heads[stage], config.embed_dim * 2**stage
    windows, cosine = fit_windows(grid, config.window_size, shifted), config.attention == "cosine"
    t = windows.window[0] * windows.window[1]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    factor = torch.logspace(1, 2, heads) if cosine else torch.full((heads,), (channels // heads) ** -0.5)
    return Case(
        torch.randn(batch_size, *grid, 3 * channels, device=device, dtype=dtype),
        factor.to(device).view(heads, 1, 1),
        16 * torch.rand(heads, t, t, device=device),
        torch.randn(batch_size, *grid, channels, device=device, dtype=dtype),
        windows,
        attention_mask(grid, windows, device),
        cosine,
    )


def make_implementation(function: Attend, case: Case, on_grid: bool) -> Implementation:
    """Give a function its own copy of the inputs, on the token grid or partitioned into windows."""
    qkv, incoming = (x if on_grid else window_partition(x, case.windows) for x in (case.qkv, case.incoming))
    inputs = [x.detach().clone().requires_grad_() for x in (qkv, case.factor, case.bias)]
    return Implementation(function, inputs, incoming.contiguous())


def implementations(case: Case) -> dict[str, tuple[Attend, bool]]:
    """Return, by name, a function and whether it takes the token grid instead of windows; ``chunks`` comes first."""
    device, heads, mask, cosine = case.qkv.device, len(case.bias), case.mask, case.cosine
    plain = Projected(heads, cosine)

    def by_chunks(qkv: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
        chunks = chunks_in_cache(len(qkv), bias) if device.type == "cpu" else 1
        return attend(qkv, factor, bias, mask, cosine=cosine, chunks=chunks)

    def by_kernel(qkv: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
        if not available(device):
            raise ValueError(f"cannot run on {device.type}: it needs Triton and a GPU")
        return attend_windows(qkv, factor, bias, case.windows, cosine=cosine)

    return {
        OURS: (by_chunks, False),
        "plain": (lambda qkv, factor, bias: plain.reference_attention(qkv, factor, bias, mask), False),
        "kernel": (by_kernel, True),
        "sdpa": (lambda qkv, factor, bias: by_sdpa(qkv, factor, bias, mask, cosine), False),
        "flex": (lambda qkv, factor, bias: by_flex(qkv, factor, bias, mask, cosine), False),
    }


def scaled(qkv: Tensor, factor: Tensor, cosine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values ``(b n, m, t, d)`` for plain dot-product attention.

    They are normalized and scaled in fp32 and then cast back to the input precision, which the fast kernels need.
    """
    q, k, v = split_heads(qkv, 3, len(factor))
    q, k = at_least_fp32(q), at_least_fp32(k)
    if cosine:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return (q * factor).to(v.dtype), k.to(v.dtype), v


def by_sdpa(qkv: Tensor, factor: Tensor, bias: Tensor, mask: Tensor | None, cosine: bool) -> Tensor:
    """Attend by ``scaled_dot_product_attention``; windows are merged with heads, so bias and mask need no batch."""
    n, scores = 1, bias[None]
    if mask is not None:
        n, scores = len(mask), bias.masked_fill(~mask[:, None], -math.inf)
    q, k, v = (rearrange(x, "(b n) m t d -> b (n m) t d", n=n) for x in scaled(qkv, factor, cosine))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=scores.flatten(0, 1)[None].to(q.dtype), scale=1.0)
    return rearrange(out, "b (n m) t d -> (b n) t (m d)", n=n)


def by_flex(qkv: Tensor, factor: Tensor, bias: Tensor, mask: Tensor | None, cosine: bool) -> Tensor:
    """Attend by ``flex_attention``, compiled on GPUs; on CPUs it has no gradient and raises."""
    from torch.nn.attention.flex_attention import flex_attention

    def score(logit: Tensor, window: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        logit = logit + bias[head, i, j]
        return logit if mask is None else torch.where(mask[window % len(mask), i, j], logit, -math.inf)

    function: Any = flex_attention
    if qkv.is_cuda:  # without fullgraph, calls above the recompile limit would silently run in eager mode
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        function = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    q, k, v = scaled(qkv, factor, cosine)
    return rearrange(function(q, k, v, score_mod=score, scale=1.0), "bn m t d -> bn t (m d)")


def reference(case: Case) -> tuple[Tensor, ...]:
    """Compute output ``(b, h, w, c)`` and gradients of qkv, factor and bias with reference code in double precision.

    Images are processed one by one, because the logits of large batches would not fit a GPU.
    """
    attention, found = Projected(len(case.bias), case.cosine), []
    for qkv, incoming in zip(case.qkv.double().split(1), case.incoming.double().split(1), strict=True):
        one = Case(qkv, case.factor.double(), case.bias.double(), incoming, case.windows, case.mask, case.cosine)
        implementation = make_implementation(
            lambda qkv, factor, bias: attention.reference_attention(qkv, factor, bias, case.mask), one, False
        )
        found.append(results(implementation, one))
    outs, dqkvs, dfactors, dbiases = zip(*found, strict=True)
    return torch.cat(outs), torch.cat(dqkvs), torch.stack(dfactors).sum(dim=0), torch.stack(dbiases).sum(dim=0)


def results(implementation: Implementation, case: Case) -> tuple[Tensor, ...]:
    """Return output and gradients of an implementation, as :func:`reference` does."""
    out = implementation.forward()
    dqkv, dfactor, dbias = implementation.backward(out)
    out = out.detach()
    if out.ndim == 3:
        out, dqkv = window_reverse(out, case.windows, case.grid), window_reverse(dqkv, case.windows, case.grid)
    return out, dqkv, dfactor, dbias


def differences(implementation: Implementation, case: Case, expected: tuple[Tensor, ...]) -> tuple[float, float]:
    """Return the largest differences of output and bias gradient, each relative to the largest expected value."""
    found = results(implementation, case)
    out, bias = (float((found[i].double() - expected[i]).abs().max() / expected[i].abs().max()) for i in (0, -1))
    return out, bias


def kept_bytes(implementation: Implementation, case: Case) -> int:
    """Return the bytes kept between forward and backward: output included, inputs excluded."""
    if implementation.incoming.is_cuda:
        before = torch.cuda.memory_allocated()
        out = implementation.forward()
        return torch.cuda.memory_allocated() - before
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = implementation.forward()
    pack(out)
    for given in (*implementation.inputs, case.mask):
        if given is not None:
            storages.pop(given.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def measure_times(steps: dict[str, Implementation], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of every round; implementations take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, implementation in steps.items():
            begin = time.perf_counter()
            implementation.backward(implementation.forward())
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return seconds
