"""One process of a distributed run with test options: ``worker.py OPTIONS COMMAND ...``.

``--sharded``: FSDP2 on the CPU, which accelerate does not offer by itself. ``--double``: float64, so that rounding
does not hide differences. ``--stop=N``: SIGTERM in step N. ``--fail=N`` and ``--kill=N``: in step N the second process
raises an error, or is killed. The bytes that a process holds at the end of its loop are written to
``process_RANK.json`` in the current folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simmim.cli.main import main
from simmim.stages import initialization, runner
from simmim.tasks.classification import Classification
from simmim.tasks.simmim import SimMIM
from simmim.training.memory import TrackedMemory

OPTIONS = ("sharded", "double", "stop", "fail", "kill")
PLUGIN = {
    "fsdp_version": 2,
    "reshard_after_forward": True,
    "auto_wrap_policy": "transformer_based_wrap",
    "cpu_ram_efficient_loading": False,
    "activation_checkpointing": False,
}


def shard_on_the_cpu() -> None:
    """Make accelerate use FSDP2 for several CPU processes."""
    original = AcceleratorState.__init__

    def init(self, *arguments, **options):
        original(self, *arguments, **options)
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(**PLUGIN)
            for state in (AcceleratorState._shared_state, PartialState._shared_state):
                state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def in_double_precision() -> None:
    for task in (SimMIM, Classification):

        def init(self, *arguments, original=task.__init__, **options):
            original(self, *arguments, **options)
            self.double()

        task.__init__ = init


class Building(TrackedMemory):
    """Peak bytes of a process until its model is ready; counts the local shards of sharded tensors."""

    def _track(self, tensor, given) -> None:
        tensor = getattr(tensor, "_local_tensor", tensor)
        if tensor.device.type != "meta":
            super()._track(tensor, given)


def record_bytes() -> None:
    """Record the bytes of weights and optimizer state of this process, and its peak before the first step."""
    original, make_start, distribute = runner.fit, runner.make_start, runner.distribute
    building = Building()

    def start(*arguments):
        with building:
            return make_start(*arguments)

    def distribute_and_track(*arguments):
        with building:
            return distribute(*arguments)

    runner.make_start, runner.distribute = start, distribute_and_track

    def fit(accelerator, model, optimizer, *arguments, **options):
        with SentBytes() as sent:
            original(accelerator, model, optimizer, *arguments, **options)
        optimizer_state = [value for state in optimizer.state.values() for value in state.values()]
        report = {
            "weights": size(model.parameters()),
            "optimizer_state": size(optimizer_state),
            "kind": accelerator.distributed_type.value,
            "sent": sent.bytes,
            "building": building.peak,
        }
        Path(f"process_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(report))

    runner.fit = fit


class SentBytes(TorchDispatchMode):
    """Bytes of the full tensors that collectives gather, scatter or reduce, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(arguments[:2]) if isinstance(leaf, torch.Tensor)]
            name = operator._schema.name.removeprefix("c10d::")
            self.bytes[name] = self.bytes.get(name, 0) + max(map(lambda x: size([x]), tensors), default=0)
        return operator(*arguments, **(options or {}))


def size(tensors) -> int:
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def act_in_step(step_index: int, act) -> None:
    """Call ``act`` at the beginning of a step."""
    original = initialization.make_lr

    def acting(**arguments):
        lr_at = original(**arguments)

        def lr(step):
            if step == step_index - 1:
                act()
            return lr_at(step)

        return lr

    initialization.make_lr = acting


def fail(step: int) -> None:
    if os.environ["RANK"] == "1":
        raise ValueError(f"planted in step {step}")


def kill() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(0.5)  # the other process waits for the gradients of this one
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    own = [word for word in sys.argv[1:] if word[2:].partition("=")[0] in OPTIONS and word.startswith("--")]
    options = dict(word[2:].partition("=")[::2] for word in own)
    command = [word for word in sys.argv[1:] if word not in own]
    if "sharded" in options:
        shard_on_the_cpu()
    if "double" in options:
        in_double_precision()
    if "stop" in options:
        act_in_step(int(options["stop"]), lambda: signal.raise_signal(signal.SIGTERM))
    if "fail" in options:
        act_in_step(int(options["fail"]), lambda: fail(int(options["fail"])))
    if "kill" in options:
        act_in_step(int(options["kill"]), kill)
    record_bytes()
    sys.exit(main(command))
