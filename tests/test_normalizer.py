"""Running statistics against numpy over everything seen, and the scale of rewards against a scalar loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from hardy.nn.normalizer import NormalizerSettings, ReturnNormalizer, RunningMoments
from hardy.population import exploit_

P, T, E, D = 2, 7, 3, 5


def tensors(state: RunningMoments) -> list[Tensor]:
    return [state.mean, state.var, state.count]


def copy_of(state: RunningMoments) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors(state)]


chunk_sizes = st.lists(st.integers(0, 6), min_size=1, max_size=5)


def random_chunks(sizes: list[int], seed: int, shape: tuple[int, ...] = (D,)) -> list[tuple[Tensor, Tensor]]:
    """Rows and validity of each chunk; each member has its own location and scale, some rows hold NaN or infinity."""
    rng = torch.Generator().manual_seed(seed)
    chunks = []
    for size in sizes:
        rows = torch.randn(P, size, *shape, generator=rng, dtype=torch.float64)
        member = torch.arange(1.0, P + 1, dtype=torch.float64).reshape(P, *([1] * (rows.ndim - 1)))
        rows = rows * member + 10 * member
        spoil = torch.rand(rows.shape, generator=rng)
        rows = torch.where(spoil < 0.02, torch.nan, torch.where(spoil > 0.98, torch.inf, rows))
        chunks.append((rows, torch.rand(P, size, generator=rng) < 0.8))
    return chunks


def kept_rows(chunks: list[tuple[Tensor, Tensor]], member: int) -> np.ndarray:
    rows = np.concatenate([rows[member].numpy() for rows, _ in chunks])
    valid = np.concatenate([valid[member].numpy() for _, valid in chunks])
    finite = np.isfinite(rows).all(axis=tuple(range(1, rows.ndim)))
    return rows[valid & finite]


@settings(deadline=None, max_examples=25)
@given(sizes=chunk_sizes, seed=st.integers(0, 10_000), shape=st.sampled_from([(D,), (), (3, 2)]))
def test_merging_equals_numpy_over_everything(sizes: list[int], seed: int, shape: tuple[int, ...]) -> None:
    chunks = random_chunks(sizes, seed, shape)
    state = RunningMoments.create(P, shape)
    for rows, valid in chunks:
        state.update_(rows, valid)
    for member in range(P):
        rows = kept_rows(chunks, member)
        assert state.count[member] == len(rows)
        if len(rows):
            np.testing.assert_allclose(state.mean[member].numpy(), rows.mean(0), rtol=1e-12)
            np.testing.assert_allclose(state.var[member].numpy(), rows.var(0), rtol=1e-10, atol=1e-12)
        else:
            assert state.mean[member].eq(0).all() and state.var[member].eq(1).all()


@settings(deadline=None, max_examples=25)
@given(sizes=chunk_sizes, seed=st.integers(0, 10_000))
def test_the_order_of_chunks_does_not_matter(sizes: list[int], seed: int) -> None:
    chunks = random_chunks(sizes, seed)
    forward, backward = RunningMoments.create(P, (D,)), RunningMoments.create(P, (D,))
    for rows, valid in chunks:
        forward.update_(rows, valid)
    for rows, valid in reversed(chunks):
        backward.update_(rows, valid)
    for left, right in zip(tensors(forward), tensors(backward), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_a_member_without_rows_keeps_its_statistics_bit_for_bit() -> None:
    state = RunningMoments.create(P, (D,))
    state.update_(torch.randn(P, 11, D), torch.ones(P, 11, dtype=torch.bool))
    before = copy_of(state)
    rows = torch.full((P, 11, D), 3.0)
    rows[1, :, 0] = torch.nan
    valid = torch.zeros(P, 11, dtype=torch.bool)
    valid[1] = True
    state.update_(rows, valid)
    assert all(torch.equal(left, right) for left, right in zip(tensors(state), before, strict=True))


def test_members_are_independent() -> None:
    chunks = random_chunks([5, 4], seed=3)
    together = RunningMoments.create(P, (D,))
    for rows, valid in chunks:
        together.update_(rows, valid)
    for member in range(P):
        alone = RunningMoments.create(1, (D,))
        for rows, valid in chunks:
            alone.update_(rows[member : member + 1], valid[member : member + 1])
        for left, right in zip(tensors(together), tensors(alone), strict=True):
            torch.testing.assert_close(left[member : member + 1], right, rtol=1e-13, atol=0)


def test_a_mean_far_larger_than_the_spread_keeps_its_digits() -> None:
    """Sums of squares would leave nothing of this variance."""
    rows = 1e9 + torch.arange(4, dtype=torch.float64).expand(1, 4).clone()
    state = RunningMoments.create(1)
    for part in rows.split(1, dim=1):
        state.update_(part, torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(state.var, torch.tensor([1.25], dtype=torch.float64), rtol=1e-6, atol=0)


def test_normalize_brings_what_was_seen_to_unit_scale_and_changes_no_statistic() -> None:
    rows = torch.randn(P, 400, D) * 3 + torch.tensor([1e3, -5.0])[:, None, None]
    state = RunningMoments.create(P, (D,))
    state.update_(rows, torch.ones(P, 400, dtype=torch.bool))
    before = copy_of(state)
    result = state.normalize(rows, clip=100.0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.mean(1), torch.zeros(P, D), rtol=0, atol=1e-4)
    torch.testing.assert_close(result.var(1, unbiased=False), torch.ones(P, D), rtol=1e-4, atol=0)
    assert all(torch.equal(left, right) for left, right in zip(tensors(state), before, strict=True))


def test_later_updates_do_not_reach_what_was_frozen() -> None:
    moments = RunningMoments.create(2, (3,))
    rows, valid = torch.randn(2, 11, 3) * 5 + 7, torch.ones(2, 11, dtype=torch.bool)
    moments.update_(rows, valid)
    normalize, expected = moments.frozen(5.0), moments.normalize(rows, 5.0)
    moments.update_(rows * 3, valid)
    assert torch.equal(normalize(rows), expected)
    assert not torch.equal(moments.normalize(rows, 5.0), expected)


def test_a_mean_that_float32_cannot_hold() -> None:
    rows = torch.tensor([[2.0**24, 2.0**24 + 2]])  # neighbours in float32
    state = RunningMoments.create(1)
    state.update_(rows, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(state.normalize(rows, clip=10.0), torch.tensor([[-1.0, 1.0]]))


def test_normalize_takes_any_axes_between_and_clips() -> None:
    state = RunningMoments(
        mean=torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64),
        var=torch.tensor([[4.0, 1.0], [1.0, 0.25]], dtype=torch.float64),
        count=torch.ones(2, dtype=torch.float64),
    )
    x = torch.tensor([[5.0, 2.0], [3.0, 94.0]])
    expected = torch.tensor([[2.0, 0.0], [0.0, 10.0]])
    torch.testing.assert_close(state.normalize(x, clip=10.0), expected)
    torch.testing.assert_close(state.normalize(x[:, None, None].expand(2, 3, 5, 2), clip=10.0)[:, 2, 4], expected)
    whole_numbers = state.normalize(x.to(torch.int64), clip=10.0)
    torch.testing.assert_close(whole_numbers, expected)
    assert state.normalize(torch.full((2, 2), torch.nan), clip=10.0).isnan().all()


def test_a_constant_component_stays_finite() -> None:
    state = RunningMoments.create(1, (2,))
    state.update_(torch.full((1, 11, 2), 7.0), torch.ones(1, 11, dtype=torch.bool))
    torch.testing.assert_close(state.normalize(torch.full((1, 2), 7.0), clip=10.0), torch.zeros(1, 2))


def random_rollout(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    reward = torch.randn(P, T, E, generator=rng) + 1
    is_end = torch.rand(P, T, E, generator=rng) < 0.2
    valid = torch.rand(P, T, E, generator=rng) < 0.85
    return reward, is_end, valid


def scalar_returns(rollouts: list[tuple[Tensor, Tensor, Tensor]], gamma: float, member: int) -> list[float]:
    """Every discounted return so far of one member, environment by environment."""
    history = []
    for env in range(E):
        running = 0.0
        for reward, is_end, valid in rollouts:
            for t in range(T):
                if valid[member, t, env]:
                    running = running * gamma + reward[member, t, env].item()
                    history.append(running)
                if is_end[member, t, env]:
                    running = 0.0
    return history


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_reward_scale_is_the_deviation_of_the_running_return(seed: int) -> None:
    """Over two rollouts, so that the running return has to survive from one to the next."""
    rollouts = [random_rollout(seed), random_rollout(seed + 1)]
    gamma = torch.tensor([0.5, 0.99], dtype=torch.float64)
    state = ReturnNormalizer.create(P, E)
    for reward, is_end, valid in rollouts:
        state.update_(reward, is_end, valid, gamma)
    for member in range(P):
        expected = np.std(scalar_returns(rollouts, gamma[member].item(), member))
        assert state.deviation(epsilon=0.0)[member].item() == pytest.approx(expected, rel=1e-9)


def test_a_reward_that_is_no_number_is_left_out() -> None:
    reward, is_end, valid = random_rollout(0)
    valid[:, 2] = True
    gamma = torch.full((P,), 0.9)
    expected, spoiled = ReturnNormalizer.create(P, E), ReturnNormalizer.create(P, E)
    without = valid.clone()
    without[:, 2] = False
    expected.update_(reward, is_end, without, gamma)
    reward[:, 2] = torch.nan
    spoiled.update_(reward, is_end, valid, gamma)
    assert torch.equal(spoiled.moments.var, expected.moments.var)
    assert torch.equal(spoiled.running_return, expected.running_return)


def test_scale_and_unscale() -> None:
    state = ReturnNormalizer.create(P, E)
    torch.testing.assert_close(state.scale(torch.full((P, T, E), 3.0), clip=10.0), torch.full((P, T, E), 3.0))
    state.moments.var.copy_(torch.tensor([4.0, 0.01]))
    reward = torch.full((P, T, E), 3.0)
    scaled = state.scale(reward, clip=10.0)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled[0], torch.full((T, E), 1.5))
    torch.testing.assert_close(scaled[1], torch.full((T, E), 10.0))
    torch.testing.assert_close(state.unscale(state.scale(reward, clip=1e6)), reward)
    torch.testing.assert_close(state.unscale(torch.ones(P, T, E, 11))[0], torch.full((T, E, 11), 2.0))


def test_an_exploit_copies_the_moments_and_restarts_the_running_return() -> None:
    state = ReturnNormalizer.create(P, E)
    reward, is_end, valid = random_rollout(1)
    is_end[:, -1] = False
    state.update_(reward, is_end, valid, torch.full((P,), 0.9))
    assert state.running_return.ne(0).any(1).all()
    moments, running = copy_of(state.moments), state.running_return.clone()
    exploit_(state, torch.tensor([0, 0]))
    for now, before in zip(tensors(state.moments), moments, strict=True):
        assert torch.equal(now, before[[0, 0]])
    assert torch.equal(state.running_return[0], running[0])
    assert state.running_return[1].eq(0).all()


@pytest.mark.parametrize("key", ["clip_observation", "clip_reward", "epsilon"])
def test_settings_refuse_what_cannot_be(key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        NormalizerSettings(**{key: 0.0})
