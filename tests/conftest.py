"""Every test starts as a fresh process would: accelerate keeps its state in singletons, manifests in a cache."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState

from simmim.training.console import configure_logging
from swin.blocks import compiled_branches


@pytest.fixture(autouse=True, scope="session")
def same_numbers_on_every_processor():
    """Also of what is trained once for a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        yield


@pytest.fixture(autouse=True, scope="session")
def console():
    """Show log messages as the command line does, so that ``capsys`` sees them."""
    configure_logging()


@pytest.fixture(autouse=True)
def fresh_start(tmp_path_factory, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("SIMMIM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def traced(monkeypatch):
    """Compile without a compiler, so that it takes no time: the programs that were traced."""
    compiled_branches.cache_clear()
    torch._dynamo.reset()
    programs = []
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def keep(graph, inputs):
        programs.append(graph)
        return aot_eager(graph, inputs)

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=keep, **options))
    yield programs
    compiled_branches.cache_clear()
    torch._dynamo.reset()
