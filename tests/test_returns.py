"""Generalised advantage estimation against its definition as a sum, and at its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardy.ops.returns import gae
from hardy.ops.schedules import ScheduleKind, schedule_factor

P, T, E = 2, 11, 3
Case = dict[str, Tensor]


def random_case(seed: int, p: int = P, t: int = T, e: int = E) -> Case:
    """A rollout with ends of both kinds; after some truncations a reset step that is no transition."""
    rng = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(p, t, e, generator=rng, dtype=torch.float64)

    kind = torch.randint(0, 6, (p, t, e), generator=rng)
    terminated, truncated = kind == 0, kind == 1
    follows_end = torch.zeros_like(terminated)
    follows_end[:, 1:] = (terminated | truncated)[:, :-1]
    invalid = follows_end & (torch.rand(p, t, e, generator=rng) < 0.5)
    return {
        "reward": normal(),
        "terminated": terminated & ~invalid,
        "truncated": truncated & ~invalid,
        "valid": ~invalid,
        "value": normal(),
        "next_value": normal(),
        "gamma": torch.rand(p, generator=rng, dtype=torch.float64),
        "gae_lambda": torch.rand(p, generator=rng, dtype=torch.float64),
    }


def brute_force(case: Case) -> Tensor:
    """A_t as the sum of (γλ)^k δ_{t+k} up to the end of the episode, each term from scratch."""
    advantage = torch.zeros_like(case["value"])
    p, steps, e = advantage.shape
    for i in range(p):
        gamma, decay = case["gamma"][i].item(), (case["gamma"][i] * case["gae_lambda"][i]).item()
        for j in range(e):
            for start in range(steps):
                total = 0.0
                for k in range(start, steps):
                    if not case["valid"][i, k, j]:
                        break
                    after = 0.0 if case["terminated"][i, k, j] else case["next_value"][i, k, j].item()
                    delta = case["reward"][i, k, j].item() + gamma * after - case["value"][i, k, j].item()
                    total += decay ** (k - start) * delta
                    if case["terminated"][i, k, j] or case["truncated"][i, k, j]:
                        break
                advantage[i, start, j] = total
    return advantage


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31 - 1))
def test_equals_brute_force(seed: int) -> None:
    case = random_case(seed)
    advantage, returns = gae(**case)
    expected = brute_force(case)
    torch.testing.assert_close(advantage, expected)
    torch.testing.assert_close(returns, expected + case["value"])


def test_the_random_cases_hold_every_kind_of_step() -> None:
    case = random_case(0)
    assert case["terminated"].any() and case["truncated"].any() and (~case["valid"]).any()


def test_by_hand() -> None:
    """One environment, γ = ½, λ = ½: go on, truncated, reset step, terminated, go on beyond the rollout."""

    def row(*numbers: float) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64).reshape(1, -1, 1)

    half = torch.tensor([0.5], dtype=torch.float64)
    advantage, returns = gae(
        reward=row(1, 2, 99, 4, 5),
        terminated=row(0, 0, 0, 1, 0).bool(),
        truncated=row(0, 1, 0, 0, 0).bool(),
        valid=row(1, 1, 0, 1, 1).bool(),
        value=row(10, 20, 30, 40, 50),
        next_value=row(20, 8, 77, 66, 60),
        gamma=half,
        gae_lambda=half,
    )
    # δ = 1+10−10, 2+4−20, -, 4−40, 5+30−50
    torch.testing.assert_close(advantage, row(1 - 0.25 * 14, -14, 0, -36, -15))
    torch.testing.assert_close(returns, row(7.5, 6, 30, 4, 35))


def test_lambda_zero_is_the_one_step_error() -> None:
    case = random_case(1)
    case["gae_lambda"] = torch.zeros(P, dtype=torch.float64)
    after = torch.where(case["terminated"], 0.0, case["next_value"])
    delta = case["reward"] + case["gamma"][:, None, None] * after - case["value"]
    torch.testing.assert_close(gae(**case)[0], torch.where(case["valid"], delta, 0.0))


def test_lambda_one_is_the_discounted_return_whatever_the_values_between() -> None:
    case = random_case(2)
    case["gae_lambda"] = torch.ones(P, dtype=torch.float64)
    inside = case["valid"] & ~case["terminated"] & ~case["truncated"]
    # V(obs[t+1]) stands twice, as value[t+1] and as next_value[t]: where both agree it must cancel.
    case["next_value"][:, :-1] = torch.where(inside[:, :-1], case["value"][:, 1:], case["next_value"][:, :-1])
    expected = gae(**case)[1]
    moved = torch.randn(P, T, E, dtype=torch.float64)
    value = case["value"] + moved
    next_value = case["next_value"].clone()
    next_value[:, :-1] = torch.where(inside[:, :-1], value[:, 1:], next_value[:, :-1])
    actual = gae(**{**case, "value": value, "next_value": next_value})[1]
    torch.testing.assert_close(actual[case["valid"]], expected[case["valid"]])


def test_members_do_not_share_discounts() -> None:
    case = random_case(3, p=3)
    together, _ = gae(**case)
    for i in range(3):
        alone, _ = gae(**{name: tensor[i : i + 1] for name, tensor in case.items()})
        assert torch.equal(together[i : i + 1], alone)


def test_nan_where_nothing_counts_reaches_nothing() -> None:
    case = random_case(4)
    expected = gae(**case)[0]
    spoiled = dict(case)
    for name in ("reward", "value", "next_value"):
        spoiled[name] = torch.where(case["valid"], case[name], torch.nan)
    spoiled["next_value"] = torch.where(case["terminated"], torch.nan, spoiled["next_value"])
    assert torch.equal(gae(**spoiled)[0], expected)


def test_nan_in_one_episode_stays_in_it() -> None:
    case = {name: tensor[:1] for name, tensor in random_case(5, e=1).items()}
    case["terminated"][:], case["truncated"][:], case["valid"][:] = False, False, True
    case["truncated"][0, 4] = True
    case["reward"][0, 7] = torch.nan
    advantage = gae(**case)[0]
    assert advantage[0, :5].isfinite().all() and advantage[0, 8:].isfinite().all()
    assert advantage[0, 5:8].isnan().all()


def test_targets_carry_no_gradient() -> None:
    case = random_case(6)
    case["value"].requires_grad_()
    advantage, returns = gae(**case)
    assert not advantage.requires_grad and not returns.requires_grad


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0]), ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, 0])],
)
def test_schedules_start_at_the_base_and_end_at_their_goal(kind: ScheduleKind, expected: list[float]) -> None:
    assert [schedule_factor(kind, x) for x in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(expected, abs=1e-12)
    assert schedule_factor(kind, 1.3) == schedule_factor(kind, 1.0)
    assert schedule_factor(kind, -0.1) == 1.0
