"""Growth of activations from block to block, by norm placement (Swin V2, figure 2).

With the norm before a branch (V1), every branch adds an output of unbounded scale, and the residual sum grows with
depth. With the norm after the branch (V2), every branch adds an output of variance 1, whatever its weights are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from simmim.data import CenterCrop, RandomCrop, Shapes, evaluation_batches, training_batches
from simmim.masking import MaskGenerator
from simmim.rng import derive_seed
from simmim.tasks.simmim import SimMIM
from simmim.training.engine import to_device
from simmim.training.optim import make_optimizer
from swin import SwinEncoder, make_config
from swin.blocks import ResPostNormBlock, SwinBlock

VARIANTS: dict[str, dict[str, Any]] = {
    "pre-norm": {"attention": "dot", "norm": "pre", "position_bias": "table"},
    "pre-norm, cosine": {"attention": "cosine", "norm": "pre", "position_bias": "log_cpb"},
    "res-post-norm": {"attention": "cosine", "norm": "res-post", "position_bias": "log_cpb"},
    "res-post-norm, extra norms": {
        "attention": "cosine",
        "norm": "res-post",
        "position_bias": "log_cpb",
        "extra_norm_interval": 6,
    },
}
MEAN, STD = [0.49, 0.49, 0.49], [0.3, 0.3, 0.3]


@dataclass(frozen=True)
class Plan:
    """Settings of the experiment: narrow enough for two cores, as deep as the paper's models."""

    depths: tuple[int, ...] = (2, 2, 18, 2)
    embed_dim: int = 32
    image_size: int = 64
    window_size: int = 8
    batch_size: int = 8
    steps: int = 100
    lrs: tuple[float, ...] = (1e-3, 4e-3, 1.6e-2)
    seeds: int = 2

    def __post_init__(self) -> None:
        """Raise ValueError if a count is below 1 or a learning rate is not above 0."""
        for name in ("embed_dim", "image_size", "window_size", "batch_size", "steps", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.lrs) <= 0 or min(self.depths) < 1:
            raise ValueError(f"lrs must be above 0 and depths at least 1, got {self.lrs} and {self.depths}")


class Profile(NamedTuple):
    """Root mean square and variance of the residual stream after every block of one model."""

    variant: str
    lr: float
    """Learning rate; 0: at random initialization with all norm weights 1."""
    seed: int
    rms: list[float]
    variance: list[float]
    loss: float
    """Mean over the last tenth of the steps; NaN if training diverged."""

    @property
    def ratio(self) -> float:
        """Largest RMS divided by the smallest."""
        return max(self.rms) / min(self.rms)


def activations(plan: Plan, out: Path, echo: Callable[[str], None] = print) -> list[Profile]:
    """Measure profiles at initialization and after training at every learning rate.

    Writes ``activations.txt``, ``activations.json`` and ``activations.png`` to ``out``.
    """
    profiles = []
    models = [(variant, lr, seed) for variant in VARIANTS for lr in (0.0, *plan.lrs) for seed in range(plan.seeds)]
    for variant, lr, seed in tqdm(models, unit="model", disable=None):
        profiles.append(run(plan, variant, lr, seed))
    table = format_table(plan, profiles)
    echo(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "activations.txt").write_text(table + "\n", encoding="utf-8")
    content = {"plan": asdict(plan), "profiles": [profile._asdict() for profile in profiles]}
    (out / "activations.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    draw(plan, profiles).savefig(out / "activations.png", dpi=100)
    echo(f"table  {out / 'activations.txt'}\nfigure  {out / 'activations.png'}")
    return profiles


def run(plan: Plan, variant: str, lr: float, seed: int) -> Profile:
    """Initialize one model, train it if ``lr`` is not 0, and measure its profile."""
    torch.manual_seed(derive_seed("step", seed, 0))
    config = make_config(
        "swinv2_tiny",
        depths=plan.depths,
        num_heads=tuple(max(1, plan.embed_dim * 2**stage // 32) for stage in range(len(plan.depths))),
        embed_dim=plan.embed_dim,
        image_size=plan.image_size,
        window_size=plan.window_size,
        patch_size=2,
        **VARIANTS[variant],
    )
    encoder = SwinEncoder(config)
    size = (plan.image_size, plan.image_size)
    task = SimMIM(encoder, MaskGenerator(size, plan.image_size // 8, 0.6, seed=seed), mean=MEAN, std=STD)
    loss = math.nan
    if lr:
        loss = train(plan, task, lr, seed)
    else:
        for module in encoder.modules():
            if isinstance(module, ResPostNormBlock):
                nn.init.ones_(module.norm1.weight)
                nn.init.ones_(module.norm2.weight)
    views = evaluation_batches(Shapes(16, size, validation=True), CenterCrop(size), batch_size=16)
    rms, variance = profile(task.eval(), next(iter(views)))
    return Profile(variant, lr, seed, rms, variance, loss)


def train(plan: Plan, task: SimMIM, lr: float, seed: int) -> float:
    """Pretrain at a constant rate after warming up for a tenth of the steps, and return the final loss."""
    size = (plan.image_size, plan.image_size)
    accelerator = Accelerator()
    optimizer = make_optimizer(task, task.no_decay_parameters(), weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8)
    task.to(accelerator.device).train()
    batches = training_batches(
        Shapes(plan.batch_size * plan.steps, size),
        RandomCrop(size, scale=(1, 1)),
        seed=seed,
        batch_size=plan.batch_size,
        micro_batch_size=plan.batch_size,
        end_step=plan.steps,
    )
    losses = []
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / (plan.steps / 10))
        loss = task(to_device(batch, accelerator.device))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return math.nan
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    last = losses[-max(1, plan.steps // 10) :]
    return sum(last) / len(last)


@torch.no_grad()
def profile(task: SimMIM, batch: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Measure the RMS, and the variance over channels averaged over tokens, after every block."""
    rms: list[float] = []
    variance: list[float] = []

    def record(_: nn.Module, __: tuple, tokens: Tensor) -> None:
        rms.append(tokens.square().mean().sqrt().item())
        variance.append(tokens.var(dim=-1).mean().item())

    blocks = [module for module in task.modules() if isinstance(module, SwinBlock)]
    hooks = [block.register_forward_hook(record) for block in blocks]
    task.reconstruct(*task.inputs(to_device(batch, task.mean.device)))
    for hook in hooks:
        hook.remove()
    return rms, variance


def format_table(plan: Plan, profiles: Sequence[Profile]) -> str:
    """Format the RMS after the last block of the longest stage, the ratio of largest to smallest RMS, and the loss."""
    deepest = sum(plan.depths[: plan.depths.index(max(plan.depths)) + 1]) - 1
    lines = [
        f"depths {' '.join(map(str, plan.depths))}, {plan.embed_dim} channels, {plan.image_size} px; "
        f"{plan.steps} steps of {plan.batch_size}; every seed",
        f"{'':28}{'lr':>8}  {'rms after block ' + str(deepest + 1):24}{'largest / smallest':24}loss",
    ]
    for variant in VARIANTS:
        for lr in (0.0, *plan.lrs):
            some = [p for p in profiles if (p.variant, p.lr) == (variant, lr)]
            columns = [
                ", ".join(f"{p.rms[deepest]:.3g}" for p in some),
                ", ".join(f"{p.ratio:.3g}" for p in some),
                ", ".join(f"{p.loss:.3f}" for p in some) if lr else "",
            ]
            lines.append(f"{variant:28}{f'{lr:g}' if lr else 'ones *':>8}  {columns[0]:24}{columns[1]:24}{columns[2]}")
    lines.append("* at random initialization with all norm weights 1; in training, those of res-post-norm start at 0")
    return "\n".join(lines)


def draw(plan: Plan, profiles: Sequence[Profile]) -> Figure:
    """Plot the RMS over blocks: at initialization, and after training at every learning rate."""
    figure = Figure(figsize=(4.2 * (1 + len(plan.lrs)), 4), layout="constrained")
    axes = figure.subplots(1, 1 + len(plan.lrs), sharey=True, squeeze=False)[0]
    for axis, lr in zip(axes, (0.0, *plan.lrs), strict=True):
        for color, variant in enumerate(VARIANTS):
            for one in (p for p in profiles if (p.variant, p.lr) == (variant, lr)):
                label = variant if one.seed == 0 else None
                axis.plot(range(1, len(one.rms) + 1), one.rms, color=f"C{color}", linewidth=1, label=label)
        ends = [sum(plan.depths[: stage + 1]) + 0.5 for stage in range(len(plan.depths) - 1)]
        for end in ends:
            axis.axvline(end, color="gray", linewidth=0.5, linestyle=":")
        title = f"after {plan.steps} steps at {lr:g}" if lr else "at initialization, norm weights 1"
        axis.set(title=title, xlabel="block", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("root mean square of the residual stream")
    axes[0].legend(fontsize=8)
    return figure
