"""Every test starts as a fresh process would: accelerate keeps its state in singletons, manifests in a cache."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_start(tmp_path_factory, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("SIMMIM_CACHE", str(tmp_path_factory.mktemp("cache")))
