"""Plasticity measures: closed forms, limits, and members that do not disturb one another."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.ops.plasticity import dormant_fraction, effective_rank


def test_dormant_units_are_those_far_below_the_mean_response() -> None:
    # Responses 0, 0.1, 1, 1.9, mean 0.75: scores 0, 0.133, 1.333, 2.533.
    unit = torch.tensor([[0.0, 0.1, 1.0, 1.9], [0.0, -0.1, -1.0, -1.9], [0.0, 0.1, 1.0, -1.9]])
    activations = torch.stack([unit, unit * 1e-6])
    assert dormant_fraction(activations, 0.1).tolist() == [0.25, 0.25]
    assert dormant_fraction(activations, 0.2).tolist() == [0.5, 0.5]
    assert dormant_fraction(torch.ones(2, 3, 5), 0.5).tolist() == [0.0, 0.0]
    assert dormant_fraction(torch.zeros(2, 3, 5), 0.1).tolist() == [1.0, 1.0]


@settings(deadline=None, max_examples=25)
@given(rank=st.integers(1, 5), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**31))
def test_equal_singular_values_count_as_whole_directions(rank: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(11, rank, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(7, rank, generator=generator, dtype=torch.float64))[0]
    features = torch.stack([left @ right.T * scale, torch.ones(11, 7, dtype=torch.float64)])
    torch.testing.assert_close(effective_rank(features), torch.tensor([float(rank), 1.0], dtype=torch.float64))


def test_effective_rank_of_unequal_directions() -> None:
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    features = torch.diag(torch.tensor([3.0, -1.0, 0.0]))[None]
    assert effective_rank(features).item() == pytest.approx(math.exp(entropy), rel=1e-6)
    assert effective_rank(torch.zeros(2, 3, 5)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("measure", [dormant_fraction, effective_rank])
def test_members_do_not_disturb_one_another(measure: object) -> None:
    assert callable(measure)
    features = torch.randn(3, 11, 7)
    clean = measure(features)
    assert torch.equal(clean, torch.cat([measure(features[member : member + 1]) for member in range(3)]))
    for poison in (math.nan, math.inf):
        features[1, 4, 2] = poison
        result = measure(features)
        assert torch.equal(result[[0, 2]], clean[[0, 2]])
        assert result[1].isnan()
