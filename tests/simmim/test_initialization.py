"""Deferred initialization of parameters on the meta device, and EMA on the meta device."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from simmim.tasks.classification import Classification
from simmim.tasks.simmim import SimMIM
from simmim.training.distributed import allocate_parameters, initialize_parameters, make_ema, meta_parameters
from swin import SwinEncoder, make_config
from tests.simmim.test_simmim_task import make_model

VARIANTS = {
    "v2": {"extra_norm_interval": 2},
    "v1": {"norm": "pre", "attention": "dot", "position_bias": "table"},
    "linear": {"position_bias": "linear_cpb"},
}


def on_meta(**settings) -> SwinEncoder:
    config = make_config(
        "swinv2_tiny", embed_dim=16, depths=(2, 2), num_heads=(2, 4), image_size=32, window_size=4, **settings
    )
    with torch.device("meta"):
        return SwinEncoder(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_its_initial_values(variant):
    encoder = on_meta(**VARIANTS[variant])
    found = allocate_parameters(encoder, torch.device("cpu"))
    assert not meta_parameters(encoder) and sum(map(len, found.values())) == len(list(encoder.parameters()))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(math.nan)
    torch.manual_seed(0)
    initialize_parameters(found)
    for name, parameter in encoder.named_parameters():
        last = name.rpartition(".")[2]
        if last == "logit_scale":
            assert (parameter == math.log(10)).all()
        elif name.startswith("patch_embed.proj"):
            assert parameter.std() > 0 and parameter.abs().max() <= 48**-0.5  # as a convolution
        elif parameter.ndim > 1:
            assert 0.015 < parameter.std() < 0.025 and parameter.abs().max() < 0.2, name
        elif last == "weight":
            zero = variant != "v1" and (".norm1." in name or ".norm2." in name)
            assert (parameter == (0 if zero else 1)).all(), name
        else:
            assert (parameter == 0).all(), name
    torch.manual_seed(0)
    again = on_meta(**VARIANTS[variant])
    initialize_parameters(allocate_parameters(again, torch.device("cpu")))
    for one, two in zip(encoder.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_existing_parameters_are_not_reinitialized():
    task: SimMIM | Classification = Classification(on_meta(), ["a", "b"], mean=[0.5] * 3, std=[0.2] * 3)
    head = task.head.weight.detach().clone()
    found = allocate_parameters(task, torch.device("cpu"))
    assert task.head not in found and isinstance(task.encoder.norm, nn.LayerNorm)
    initialize_parameters(found)
    assert torch.equal(task.head.weight, head) and torch.equal(task.mean.flatten(), torch.full((3,), 0.5))


def test_an_ema_of_shapes_holds_no_copy_of_the_weights():
    task = make_model()
    before = [parameter.detach().clone() for parameter in task.parameters()]
    ema = make_ema(task, 0.9, shapes_only=True)
    assert all(parameter.is_meta for parameter in ema.module.parameters())
    assert not any(buffer.is_meta for buffer in ema.module.buffers())
    allocate_parameters(ema.module, torch.device("cpu"))
    ema.set(task)
    for mean, own, old in zip(ema.module.parameters(), task.parameters(), before, strict=True):
        assert torch.equal(mean, old) and torch.equal(own, old)
        assert mean.data_ptr() != own.data_ptr()
