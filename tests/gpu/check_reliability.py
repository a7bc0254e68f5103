"""GPU checks of resuming: ``python tests/gpu/check_reliability.py OUT [fp32] [bf16]`` prints a table and writes JSON.

Exact resume in fp32 and bf16, FSDP2 on the GPU (one process), checkpoints with and without sharding read by each other,
and the cost of saving. Takes some minutes on one GPU.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from simmim.data import CenterCrop, Shapes, evaluation_batches
from simmim.masking import MaskGenerator
from simmim.tasks.simmim import SimMIM
from simmim.training.checkpoint import Checkpoints, newest_checkpoint, training_state
from simmim.training.engine import to_device
from swin import make_encoder

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests/simmim/worker.py"
STEPS = 12
RECIPE = [
    "pretrain",
    "simmim_swinv2_t",
    "name=gpu",
    "data.path=builtin:shapes",
    "data.num_images=768",
    "data.validation_images=10",
    "stages.pretrain.batch_size=64",
    "stages.pretrain.micro_batch_size=32",
    "stages.pretrain.drop_path=0.2",
    "stages.pretrain.schedule.name=cosine",
    "stages.pretrain.schedule.epochs=1",
    "stages.pretrain.schedule.warmup_epochs=0.2",
    "stages.pretrain.log.metrics_every_steps=1",
]


def train(out: Path, precision: str, *options: str, sharded: bool = False, stop: int | None = None) -> float:
    """Run the recipe, or its first ``stop`` steps; return the seconds."""
    out.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/zero3_8.yaml")]
    launcher += ["--num_processes", "1"]
    command = [sys.executable, *(launcher if sharded else []), str(WORKER), *([f"--stop={stop}"] if stop else [])]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    begin = time.perf_counter()
    result = subprocess.run(
        [*command, *RECIPE, *options, "--out", str(out), "--precision", precision],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
    )
    expected = (1, 75) if stop else (0,)
    if result.returncode not in expected:
        sys.exit(f"{command} ended with {result.returncode}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    print(next(line for line in result.stdout.splitlines() if line.startswith("gpu/")), flush=True)
    return time.perf_counter() - begin


def difference(one: Path, two: Path) -> float:
    """Return the largest difference of weights and optimizer state of the last checkpoint; 0: bitwise equal."""
    states = []
    for out in (one, two):
        checkpoint, _, _ = newest_checkpoint(out / "gpu/pretrain/checkpoints")
        assert checkpoint is not None and checkpoint.name == f"step_{STEPS:08d}"
        states.append({k: v for file in checkpoint.glob("*.safetensors") for k, v in load_file(file).items()})
    assert states[0].keys() == states[1].keys()
    return max(float((states[0][key] - states[1][key]).abs().max()) for key in states[0] if states[0][key].numel())


def losses(out: Path) -> list[float]:
    rows = map(json.loads, (out / "gpu/pretrain/metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def cost_of_saving() -> dict[str, float]:
    """Measure for Swin V2-B at 192 px in bf16 how long a save blocks the loop, and how long it takes in all."""
    torch.manual_seed(0)
    encoder = make_encoder("swinv2_base", image_size=192, window_size=12)
    model = SimMIM(encoder, MaskGenerator((192, 192), 32, 0.6), mean=[0.5] * 3, std=[0.3] * 3).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = next(iter(evaluation_batches(Shapes(64, (192, 192)), CenterCrop((192, 192)), batch_size=64)))
    batch = to_device(batch, torch.device("cuda"))

    def step() -> float:
        begin = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - begin

    for _ in range(5):
        step()
    plain = statistics.median(step() for _ in range(20))
    checkpoints = Checkpoints(Path("saved"), {}, keep=1)
    copying, complete, concurrent = [], [], []
    for index in range(1, 5):
        begin = time.perf_counter()
        checkpoints.save(index, training_state(model, optimizer))
        copying.append(time.perf_counter() - begin)
        while checkpoints._thread is not None and checkpoints._thread.is_alive():
            concurrent.append(step())
        checkpoints.wait()
        complete.append(time.perf_counter() - begin)
    size = sum(file.stat().st_size for file in Path("saved").rglob("*.safetensors"))
    return {
        "checkpoint_mb": size / 1e6,
        "step_ms": plain * 1e3,
        "loop_waits_ms": statistics.median(copying[1:]) * 1e3,
        "complete_after_ms": statistics.median(complete[1:]) * 1e3,
        "concurrent_step_ms": statistics.median(concurrent) * 1e3 if concurrent else float("nan"),
    }


def bytes_to_the_device() -> dict[str, float]:
    """Measure the milliseconds to copy 128 images of 192 px to the GPU, uint8 or float32, pinned or not."""
    found = {}
    for name, dtype in (("uint8", torch.uint8), ("float32", torch.float32)):
        for pinned in (False, True):
            images = torch.zeros(128, 3, 192, 192, dtype=dtype)
            images = images.pin_memory() if pinned else images
            times = []
            for _ in range(20):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                images.to("cuda", non_blocking=True)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
            found[f"{name}{'_pinned' if pinned else ''}_ms"] = statistics.median(times) * 1e3
    return found


def main(out: Path, precisions: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    found: dict[str, object] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}

    def note(**values: object) -> None:
        for name, value in values.items():
            found[name.replace("_", " ")] = value
            print(f"{name.replace('_', ' '):50} {value}", flush=True)
        (out / "found.json").write_text(json.dumps(found, indent=2) + "\n")

    note(**cost_of_saving())
    note(**bytes_to_the_device())
    for precision in precisions:
        train(out / precision, precision)
        train(out / f"{precision}_again", precision)
        train(out / f"{precision}_stopped", precision, stop=5)
        train(out / f"{precision}_stopped", precision)
        again = difference(out / precision, out / f"{precision}_again")
        resumed = difference(out / precision, out / f"{precision}_stopped")
        note(**{f"{precision}_second_run_differs_by": again, f"{precision}_resumed_run_differs_by": resumed})
    if "bf16" not in precisions:
        return
    train(out / "sharded", "bf16", sharded=True)
    pairs = list(zip(losses(out / "sharded"), losses(out / "bf16"), strict=True))
    note(fsdp2_losses_differ_by_at_most=max(abs(a - b) for a, b in pairs))
    train(out / "to_one", "bf16", sharded=True, stop=5)
    train(out / "to_one", "bf16")
    note(fsdp2_resumed_without_sharding_differs_by=difference(out / "sharded", out / "to_one"))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:] or ["fp32", "bf16"])
