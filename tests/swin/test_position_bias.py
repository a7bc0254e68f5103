"""Position bias: closed forms, invariance to the window, resampled tables, the cached table."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.interpolate import RectBivariateSpline

import swin
from swin.position_bias import (
    BiasTable,
    ContinuousBias,
    coordinates,
    geometric_positions,
    linear_axis,
    log_axis,
    log_paper_axis,
    make_position_bias,
    resample_table,
)

CPU = torch.device("cpu")
CONTINUOUS = ["log_cpb", "log_cpb_paper", "linear_cpb"]


def field(axis, window, reference):
    height, width = window
    return coordinates(axis, window, reference, CPU).view(2 * height - 1, 2 * width - 1, 2)


@pytest.mark.parametrize("reference", [(2, 2), (6, 6), (12, 12), (5, 9)])
@pytest.mark.parametrize("axis", [log_axis, log_paper_axis, linear_axis])
def test_coordinates_are_odd_monotone_and_independent_of_the_current_window(axis, reference):
    table = field(axis, reference, reference)
    assert torch.equal(table.flip(0, 1), -table)
    assert (table[1:, :, 0] > table[:-1, :, 0]).all() and (table[:, 1:, 1] > table[:, :-1, 1]).all()
    larger = field(axis, (reference[0] + 4, reference[1] + 8), reference)
    assert torch.equal(larger[4:-4, 8:-8], table)


@pytest.mark.parametrize("reference", [2, 6, 7, 12, 24])
def test_coordinates_at_the_edge_of_the_reference_window(reference):
    edge = torch.tensor(reference - 1.0, dtype=torch.float64)
    assert log_axis(edge, reference).item() == pytest.approx(math.log2(9) / 3, rel=1e-12)
    assert round(log_axis(edge, reference).item(), 4) == 1.0566
    assert linear_axis(edge, reference).item() == 1
    assert log_paper_axis(edge, reference).item() == pytest.approx(math.log(reference), rel=1e-12)


def test_a_window_of_one_token_has_one_offset_at_zero():
    for axis in (log_axis, log_paper_axis, linear_axis):
        assert coordinates(axis, (1, 1), (1, 1), CPU).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("axis", "old", "new", "ratio"),
    [
        (linear_axis, 8, 16, 8 / 7),  # the example in section 3.3 of the paper
        (log_paper_axis, 8, 16, 1 / 3),
        (log_axis, 8, 16, 0.319),
        (log_axis, 12, 24, 0.309),
        (linear_axis, 12, 24, 12 / 11),
    ],
)
def test_extrapolation_ratio_of_larger_windows(axis, old, new, ratio):
    before, after = (field(axis, (window, window), (old, old)).max().item() for window in (old, new))
    assert after / before - 1 == pytest.approx(ratio, abs=5e-4)


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_an_offset_has_the_same_continuous_bias_in_every_window(kind):
    bias = make_position_bias(kind, 3, (4, 6))
    torch.nn.init.normal_(bias.layers[1].weight)
    old, new = bias.make_table((4, 6)).view(7, 11, 3), bias.make_table((7, 9)).view(13, 17, 3)
    torch.testing.assert_close(new[3:-3, 3:-3], old, rtol=0, atol=1e-6)
    assert (old.min() >= 0) and (old.max() <= 16) and old.std() > 0.1


@pytest.mark.parametrize("kind", [*CONTINUOUS, "table"])
def test_bias_of_a_pair_is_the_table_entry_of_its_offset(kind):
    window = (3, 4)
    bias = make_position_bias(kind, 2, window)
    for parameter in bias.parameters():
        torch.nn.init.normal_(parameter)
    table, pairs = bias.make_table(window).view(5, 7, 2), bias(window)
    for query in range(12):
        for key in range(12):
            dy, dx = query // 4 - key // 4, query % 4 - key % 4
            assert torch.equal(pairs[:, query, key], table[dy + 2, dx + 3])


# Old window, new window and q, computed by the bisection of the official geometric resampling.
@pytest.mark.parametrize(
    ("old", "new", "q"),
    [(6, 7, 1.0913), (7, 12, 1.2407), (8, 12, 1.1480), (8, 16, 1.2484), (8, 24, 1.3880), (12, 24, 1.1396)],
)
def test_geometric_positions_have_the_ratio_of_the_official_code(old, new, q):
    positions = geometric_positions(old, new)
    assert positions[0] == 1 and positions[-1].item() == pytest.approx(new - 1, rel=1e-12)
    steps = positions.diff()
    torch.testing.assert_close(steps[1:] / steps[:-1], torch.full((old - 3,), q).double(), rtol=0, atol=6e-5)


@pytest.mark.parametrize(("old", "new"), [((7, 7), (12, 12)), ((12, 12), (7, 7)), ((4, 6), (9, 5)), ((4, 4), (8, 8))])
def test_geometric_resampling_equals_the_spline_of_scipy(old, new):
    torch.manual_seed(0)
    table = torch.randn((2 * old[0] - 1) * (2 * old[1] - 1), 3, dtype=torch.float64)
    got = resample_table(table, old, new, "geometric").view(2 * new[0] - 1, 2 * new[1] - 1, 3)
    knots = []
    for axis in range(2):
        positive = geometric_positions(old[axis], new[axis])
        knots.append(torch.cat([-positive.flip(0), torch.zeros(1), positive]).numpy())
    for head in range(3):
        values = table[:, head].view(2 * old[0] - 1, 2 * old[1] - 1).numpy()
        rows, columns = (range(-(side - 1), side) for side in new)
        expected = RectBivariateSpline(*knots, values, kx=3, ky=3, s=0)(rows, columns)
        torch.testing.assert_close(got[..., head], torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["bicubic", "geometric"])
@pytest.mark.parametrize(("old", "new"), [((7, 7), (12, 12)), ((12, 8), (6, 8)), ((2, 1), (5, 4)), ((6, 6), (1, 2))])
def test_resampling_preserves_constants_and_the_central_entry(old, new, method):
    rows = (2 * old[0] - 1) * (2 * old[1] - 1)
    constant = resample_table(torch.full((rows, 2), 3.5, dtype=torch.float64), old, new, method)
    assert constant.shape == ((2 * new[0] - 1) * (2 * new[1] - 1), 2)
    torch.testing.assert_close(constant, torch.full_like(constant, 3.5))
    torch.manual_seed(0)
    table = torch.randn(rows, 2, dtype=torch.float64)
    resampled = resample_table(table, old, new, method)
    torch.testing.assert_close(resampled[len(resampled) // 2], table[rows // 2])


def test_geometric_resampling_preserves_entries_of_adjacent_offsets():
    """From window 7 to 12 the entries at offset 1 keep their values; bicubic resampling would change them."""
    torch.manual_seed(0)
    table = torch.randn(169, 1, dtype=torch.float64).view(13, 13)
    resampled = resample_table(table.reshape(-1, 1), (7, 7), (12, 12), "geometric").view(23, 23)
    torch.testing.assert_close(resampled[10:13, 10:13], table[5:8, 5:8])


def test_resampling_to_the_same_window_is_the_identity_and_unknown_methods_are_refused():
    table = torch.randn(9, 1)
    assert resample_table(table, (2, 2), (2, 2), "geometric") is table
    with pytest.raises(ValueError, match="unknown table resampling 'cubic': expected bicubic or geometric"):
        resample_table(table, (2, 2), (3, 3), "cubic")


def test_a_smaller_window_uses_the_table_entries_of_its_offsets():
    torch.manual_seed(0)
    bias = BiasTable(2, (5, 6))
    torch.nn.init.normal_(bias.table)
    table = bias.table.view(9, 11, 2)
    assert torch.equal(bias.make_table((3, 6)).view(5, 11, 2), table[2:-2])
    mixed = bias.make_table((2, 8))
    assert torch.equal(mixed, resample_table(table[3:-3].reshape(33, 2), (2, 6), (2, 8)))


def test_bicubic_resampling_equals_the_official_code():
    torch.manual_seed(0)
    table = torch.randn(169, 4)
    official = table.permute(1, 0).view(1, 4, 13, 13)
    official = torch.nn.functional.interpolate(official, size=(23, 23), mode="bicubic").view(4, 529).permute(1, 0)
    assert torch.equal(resample_table(table, (7, 7), (12, 12)), official)


def count_tables(monkeypatch) -> list:
    calls = []
    for kind in (ContinuousBias, BiasTable):

        def counted(self, window, make_table=kind.make_table):
            calls.append(window)
            return make_table(self, window)

        monkeypatch.setattr(kind, "make_table", counted)
    return calls


@pytest.mark.parametrize("kind", ["log_cpb", "table"])
def test_tables_are_made_once_per_forward_and_cached_in_evaluation(kind, monkeypatch):
    calls = count_tables(monkeypatch)
    torch.manual_seed(0)
    encoder = swin.make_encoder(
        "swinv2_tiny", embed_dim=8, depths=(2, 2), num_heads=(1, 2), image_size=32, window_size=4, position_bias=kind
    )
    images = torch.randn(2, 3, 32, 32)
    encoder(images)
    assert len(calls) == 4
    with torch.no_grad():
        encoder(images)
        assert len(calls) == 8  # no caching in training mode, even without gradients
        encoder.eval()
        first = encoder(images)
        assert len(calls) == 12
        with torch.inference_mode():
            assert torch.equal(encoder(images), first)
        assert len(calls) == 12
        encoder(torch.randn(1, 3, 12, 16))  # the grids 3 x 4 and 2 x 2 have other windows
        assert len(calls) == 16
    encoder(images).sum().backward()  # with gradients, tables are recomputed in evaluation mode too
    assert len(calls) == 20
    bias = encoder.layers[0].blocks[0].attn.position_bias
    assert all(parameter.grad is not None for parameter in bias.parameters())


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "optimizer", "double", "data under train"])
def test_cached_table_is_recomputed_when_parameters_change(change):
    torch.manual_seed(0)
    bias = make_position_bias("log_cpb", 2, (4, 4)).eval()
    other = make_position_bias("log_cpb", 2, (4, 4))
    with torch.no_grad():
        before = bias((4, 4))
    if change == "in place":
        with torch.no_grad():
            bias.layers[1].weight.mul_(2)
    elif change == "load_state_dict":
        bias.load_state_dict(other.state_dict())
    elif change == "optimizer":
        bias((4, 4)).sum().backward()
        torch.optim.AdamW(bias.parameters(), lr=0.1).step()
    elif change == "double":
        bias.double()
    else:
        bias.train()
        bias.layers[1].weight.data.mul_(2)
        bias.eval()
    with torch.no_grad():
        after = bias((4, 4))
    assert after.dtype != before.dtype or not torch.equal(after, before)
    assert torch.equal(after, bias.train()((4, 4)))
