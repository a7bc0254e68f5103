"""Weights that are drawn late, module by module, and averages of weights that are not there yet."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from simmim.objectives.classify import Classify
from simmim.objectives.reconstruct import Reconstruct
from simmim.stages.sharding import average_of, draw_weights, give_memory, open_parameters
from swin import SwinEncoder, make_config
from tests.simmim.test_reconstruct import make_model

ARMS = {
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


@pytest.mark.parametrize("arm", ARMS)
def test_every_parameter_gets_the_numbers_that_it_starts_from(arm):
    encoder = on_meta(**ARMS[arm])
    found = give_memory(encoder, torch.device("cpu"))
    assert not open_parameters(encoder) and sum(map(len, found.values())) == len(list(encoder.parameters()))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(math.nan)
    torch.manual_seed(0)
    draw_weights(found)
    for name, parameter in encoder.named_parameters():
        last = name.rpartition(".")[2]
        if last == "logit_scale":
            assert (parameter == math.log(10)).all()
        elif name.startswith("patch_embed.proj"):
            assert parameter.std() > 0 and parameter.abs().max() <= 48**-0.5  # as a convolution
        elif parameter.ndim > 1:
            assert 0.015 < parameter.std() < 0.025 and parameter.abs().max() < 0.2, name
        elif last == "weight":
            closed = arm != "v1" and (".norm1." in name or ".norm2." in name)
            assert (parameter == (0 if closed else 1)).all(), name
        else:
            assert (parameter == 0).all(), name
    torch.manual_seed(0)
    again = on_meta(**ARMS[arm])
    draw_weights(give_memory(again, torch.device("cpu")))
    for one, two in zip(encoder.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_is_there_is_neither_drawn_nor_changed():
    objective: Reconstruct | Classify = Classify(on_meta(), ["a", "b"], mean=[0.5] * 3, std=[0.2] * 3)
    head = objective.head.weight.detach().clone()
    found = give_memory(objective, torch.device("cpu"))
    assert objective.head not in found and isinstance(objective.encoder.norm, nn.LayerNorm)
    draw_weights(found)
    assert torch.equal(objective.head.weight, head) and torch.equal(objective.mean.flatten(), torch.full((3,), 0.5))


def test_an_average_of_shapes_holds_no_copy_of_the_weights():
    objective = make_model()
    before = [parameter.detach().clone() for parameter in objective.parameters()]
    average = average_of(objective, 0.9, shapes_only=True)
    assert all(parameter.is_meta for parameter in average.module.parameters())
    assert not any(buffer.is_meta for buffer in average.module.buffers())
    give_memory(average.module, torch.device("cpu"))
    average.set(objective)
    for mean, own, old in zip(average.module.parameters(), objective.parameters(), before, strict=True):
        assert torch.equal(mean, old) and torch.equal(own, old)
        assert mean.data_ptr() != own.data_ptr()
