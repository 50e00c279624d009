"""Risk: measures against closed forms, the advantage that follows from them, units, twins, the limit, and a cliff."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from small_runs import EVERYTHING, assert_nan_stays_with_its_member, assert_same, member, snapshot, tiny, trainer

import hardy.ppo as ppo
from hardy.config import ConfigError
from hardy.envs.cliff import EDGE, LENGTH, ROUGH, path_returns
from hardy.ops.critic import Critic, CriticSettings, ReturnDistribution
from hardy.ops.distortion import cvar_distortion, distorted_mean, influence, wang_distortion
from hardy.ops.quantiles import expected_value, quantile_midpoints
from hardy.ops.returns import gae, sampled_returns
from hardy.ops.risk import SMOOTH_QUANTILES, RiskState, risk_advantage
from hardy.population import exploit_

LONG = 1000
SHARP = {"huber_threshold": 0.05}


def of(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def normal(count: int, mean: float = 0.0, std: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Midpoint quantiles of a normal distribution, and their probabilities, for one member."""
    quantiles = torch.from_numpy(stats.norm.ppf(quantile_midpoints(count, dtype=torch.float64).numpy(), mean, std))[None]
    return quantiles, torch.full_like(quantiles, 1 / count)


# --------------------------------------------------------------------------------------------------------------- measures


def exact_cvar(quantiles: torch.Tensor, alpha: float) -> float:
    """The integral of the piecewise-constant quantile function from 0 to α, divided by α, piece by piece."""
    ordered, total = sorted(quantiles.tolist()), 0.0
    for i, quantile in enumerate(ordered):
        low, high = i / len(ordered), (i + 1) / len(ordered)
        total += quantile * max(0.0, min(high, alpha) - low)
    return total / alpha


def cvar(quantiles: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """CVaR of equally probable quantiles in any order."""
    return distorted_mean(quantiles.sort().values, torch.full_like(quantiles, 1 / quantiles.shape[-1]), cvar_distortion(alpha))


@settings(deadline=None, max_examples=25)
@given(alpha=st.floats(1e-3, 1.0), count=st.integers(1, 12), seed=st.integers(0, 1000))
def test_cvar_is_the_integral_of_the_tail(alpha: float, count: int, seed: int) -> None:
    quantiles = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert float(cvar(quantiles[None], of(alpha))) == pytest.approx(exact_cvar(quantiles, alpha), rel=1e-8, abs=1e-10)


def test_cvar_from_the_lowest_quantile_to_the_mean_one_alpha_for_each_member() -> None:
    quantiles = torch.randn(5, 2, 3, 7)
    alpha = torch.tensor([0.0, 1e-6, 1.0, 1.5, 0.3])
    measured = cvar(quantiles, alpha)
    assert measured.shape == (5, 2, 3)
    torch.testing.assert_close(measured[:2], quantiles[:2].min(-1).values)
    torch.testing.assert_close(measured[2:4], expected_value(quantiles[2:4]))
    torch.testing.assert_close(measured[4:], cvar(quantiles[4:], alpha[4:]))


def test_the_tail_of_unequal_probabilities_counts_with_the_fraction_that_reaches_into_it() -> None:
    values, probabilities = of(-10.0, -1.0, 5.0).expand(4, 3), of(0.1, 0.2, 0.7).expand(4, 3)
    found = distorted_mean(values, probabilities, cvar_distortion(of(0.05, 0.2, 0.5, 1.0)))
    expected = [-10.0, (0.1 * -10 + 0.1 * -1) / 0.2, (0.1 * -10 + 0.2 * -1 + 0.2 * 5) / 0.5, 0.1 * -10 + 0.2 * -1 + 0.7 * 5]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("count", "error"), [(21, 0.052), (32, 0.043), (51, 0.024), (101, 0.010)])
def test_cvar_of_the_normal_distribution_is_within_the_stated_error(count: int, error: float) -> None:
    exact = -stats.norm.pdf(stats.norm.ppf(0.05)) / 0.05
    found = distorted_mean(*normal(count), cvar_distortion(of(0.05)))
    assert abs(float(found) / exact - 1) == pytest.approx(error, abs=6e-4)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_wangs_measure_of_a_normal_distribution_is_its_mean_minus_shift_deviations(shift: float) -> None:
    found = distorted_mean(*normal(2001, mean=3.0, std=2.0), wang_distortion(of(shift)))
    assert float(found) == pytest.approx(3 - 2 * shift, abs=0.03)


# -------------------------------------------------------------------------------------------------------------- influence


@pytest.mark.parametrize("distortion", [cvar_distortion(of(0.3)), cvar_distortion(of(1.0)), wang_distortion(of(0.7))])
def test_influence_is_the_derivative_of_the_measure_by_the_probability_of_the_samples(distortion) -> None:
    """Mixing a little of the samples' distribution into the state's, by finite differences."""
    locations, probabilities = normal(2001)
    samples = of(-2.5, -1.0, 0.2, 1.7)
    weight = 1e-4
    mixed = torch.cat([locations[0], samples])
    order = mixed.argsort()
    mass = torch.cat([probabilities[0] * (1 - weight), torch.full((4,), weight / 4, dtype=torch.float64)])
    before, after = (
        distorted_mean(z[None], p[None], distortion) for z, p in ((locations[0], probabilities[0]), (mixed[order], mass[order]))
    )
    found = influence(samples[None], locations, probabilities, distortion)
    torch.testing.assert_close(found, (after - before) / weight, rtol=0.02, atol=2e-3)


def test_influence_on_the_mean_is_the_distance_from_it_and_on_cvar_the_published_function() -> None:
    locations, probabilities = normal(2001)
    for x in (-3.0, -0.5, 0.0, 2.0):
        assert float(influence(of(x)[None], locations, probabilities, cvar_distortion(of(1.0)))) == pytest.approx(x, abs=1e-3)
        alpha = 0.2
        q, tail = stats.norm.ppf(alpha), -stats.norm.pdf(stats.norm.ppf(alpha)) / alpha
        expected = q - max(q - x, 0) / alpha - tail
        assert float(influence(of(x)[None], locations, probabilities, cvar_distortion(of(alpha)))) == pytest.approx(
            expected, abs=0.01
        )


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_distribution_has_no_influence_on_itself_and_each_member_its_own(count: int) -> None:
    locations = torch.randn(3, 5, 2, count, dtype=torch.float64).sort(-1).values
    probabilities = torch.rand(3, 5, 2, count, dtype=torch.float64).softmax(-1)
    alpha = of(0.1, 0.5, 1.0)
    index = torch.multinomial(probabilities.reshape(-1, count), 40_000, replacement=True).view(3, 5, 2, 40_000)
    found = influence(locations.gather(-1, index), locations, probabilities, cvar_distortion(alpha))
    assert found.shape == (3, 5, 2)
    assert found.abs().max() < 0.15
    for p in range(3):
        rows = slice(p, p + 1)
        samples = torch.randn(1, 5, 2, 4, dtype=torch.float64)
        together = influence(samples.expand(3, 5, 2, 4).contiguous(), locations, probabilities, cvar_distortion(alpha))[rows]
        alone = influence(samples, locations[rows], probabilities[rows], cvar_distortion(alpha[rows]))
        torch.testing.assert_close(together, alone)


def test_probabilities_of_zero_give_no_nan() -> None:
    locations, probabilities = of(-1.0, 0.0, 1.0, 2.0)[None], of(0.0, 1.0, 0.0, 0.0)[None]
    for distortion in (cvar_distortion(of(0.2)), wang_distortion(of(1.0))):
        assert distorted_mean(locations, probabilities, distortion).tolist() == pytest.approx([0.0])
        assert influence(of(-2.0, -0.5, 3.0)[None], locations, probabilities, distortion).isfinite().all()


# -------------------------------------------------------------------------------------------------------- sampled returns


def episode(members: int = 2, steps: int = 7, envs: int = 3, samples: int = 5) -> dict[str, torch.Tensor]:
    """Random outcomes with a termination, a truncation and an invalid step inside."""
    shape = (members, steps, envs)
    flags = {name: torch.zeros(shape, dtype=torch.bool) for name in ("terminated", "truncated")}
    flags["terminated"][:, 2, 0] = flags["truncated"][:, 3, 1] = True
    valid = torch.ones(shape, dtype=torch.bool)
    valid[:, 4, 1] = False
    own, following = (torch.randn(*shape, samples, dtype=torch.float64).sort(-1).values for _ in range(2))
    reward = torch.randn(shape, dtype=torch.float64)
    return {"reward": reward, **flags, "valid": valid, "own": own, "following": following}


def reference_sample(case: dict[str, torch.Tensor], at: tuple[int, int, int, int], gamma: float, lam: float, uniform) -> float:
    """One sample, step by step until the draw ends it."""
    p, t, e, g = at
    if not case["valid"][p, t, e]:
        return float(case["own"][p, t, e, g])
    reward = float(case["reward"][p, t, e])
    if case["terminated"][p, t, e]:
        return reward
    last = t + 1 == case["reward"].shape[1] or bool(case["truncated"][p, t, e])
    if last or uniform[p, t, e, g] >= lam:
        return reward + gamma * float(case["following"][p, t, e, g])
    return reward + gamma * reference_sample(case, (p, t + 1, e, g), gamma, lam, uniform)


def test_each_sample_goes_on_or_ends_as_drawn() -> None:
    case = episode()
    gamma, lam = of(0.9, 0.7), of(0.5, 0.95)
    uniform = torch.rand(case["own"].shape, dtype=torch.float64)
    found = sampled_returns(**case, gamma=gamma, gae_lambda=lam, uniform=uniform)
    for at in itertools.product(*(range(size) for size in found.shape)):
        expected = reference_sample(case, at, float(gamma[at[0]]), float(lam[at[0]]), uniform)
        assert float(found[at]) == pytest.approx(expected, abs=1e-12)


def test_their_mean_is_the_return_of_generalised_advantage_estimation() -> None:
    case = episode(samples=4)
    own, following = case.pop("own"), case.pop("following")
    goes_on = (case["valid"] & ~case["terminated"] & ~case["truncated"])[:, :-1, :, None]
    following[:, :-1] = torch.where(goes_on, own[:, 1:], following[:, :-1])  # the next state is the same state
    gamma, lam = of(0.9, 0.7), of(0.5, 0.95)
    _, returns = gae(**case, value=own.mean(-1), next_value=following.mean(-1), gamma=gamma, gae_lambda=lam)
    total = torch.zeros_like(own)
    for _ in range(3000):
        uniform = torch.rand(own.shape, dtype=torch.float64)
        total += sampled_returns(**case, own=own, following=following, gamma=gamma, gae_lambda=lam, uniform=uniform)
    torch.testing.assert_close((total / 3000).mean(-1), returns, rtol=0, atol=0.05)


def test_a_quadratic_zone_hides_the_tail_and_a_narrow_one_does_not() -> None:
    """Why risk with a wide `huber_threshold` warns: CVaR of a normal distribution, as fitted quantiles give it."""
    target = torch.from_numpy(stats.norm.ppf((np.arange(400) + 0.5) / 400)).expand(1, 1, 400)
    exact = -stats.norm.pdf(stats.norm.ppf(0.1)) / 0.1
    errors = {}
    for kappa in (1.0, SMOOTH_QUANTILES):
        critic = Critic(CriticSettings(quantiles=32, huber_threshold=kappa))
        found = torch.zeros(1, 1, 32, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([found], lr=0.05, betas=(0.8, 0.95))
        for _ in range(400):
            optimizer.zero_grad()
            critic.loss(found, target, found.detach(), of(0.0)).sum().backward()
            optimizer.step()
        state = critic.distribution(found.detach())
        errors[kappa] = float(distorted_mean(state.locations, state.probabilities, cvar_distortion(of(0.1)))) / exact - 1
    assert errors[1.0] < -0.15
    assert abs(errors[SMOOTH_QUANTILES]) < 0.05
    with pytest.warns(UserWarning, match=r"critic.huber_threshold = 1.0: .* use at most 0.1"):
        trainer(tiny(risk={"weight": 0.5}))


# ---------------------------------------------------------------------------------------------------------- the advantage


def mixture(*weights: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Hyperparameters of members with these weights of CVaR at 0.2, and multipliers of 0."""
    count = len(weights)
    return {
        "risk.weight": of(*weights), "risk.cvar_alpha": torch.full((count,), 0.2, dtype=torch.float64),
        "risk.wang_shift": torch.full((count,), 0.7, dtype=torch.float64),
    }, torch.zeros(count, dtype=torch.float64)  # fmt: skip


def test_the_advantage_mixes_mean_and_risk_by_weight_and_multiplier() -> None:
    hyper, multiplier = mixture(0.0, 0.25, 1.0, 0.5, 0.0)
    multiplier[3:] = of(3.0, 1.0)
    advantage = torch.randn(5, 3, 2, dtype=torch.float64)
    samples = torch.randn(5, 3, 2, 7, dtype=torch.float64)
    locations = torch.randn(5, 3, 2, 11, dtype=torch.float64).sort(-1).values
    state = ReturnDistribution(locations, torch.full_like(locations, 1 / 11))
    tail = influence(samples, locations, state.probabilities, cvar_distortion(hyper["risk.cvar_alpha"]))
    wang = influence(samples, locations, state.probabilities, wang_distortion(hyper["risk.wang_shift"]))
    found = risk_advantage(advantage, samples, state, hyper, multiplier, "cvar")
    assert torch.equal(found[0], advantage[0])
    torch.testing.assert_close(found[1], 0.75 * advantage[1] + 0.25 * tail[1])
    torch.testing.assert_close(found[2], tail[2])
    torch.testing.assert_close(found[3], (0.5 * advantage[3] + 0.5 * tail[3] + 3 * tail[3]) / 4)
    torch.testing.assert_close(found[4], (advantage[4] + tail[4]) / 2)
    found = risk_advantage(advantage, samples, state, hyper, multiplier, "wang")
    torch.testing.assert_close(found[2], wang[2])
    torch.testing.assert_close(found[3], (0.5 * advantage[3] + 0.5 * wang[3] + 3 * tail[3]) / 4)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_risk_reaches_the_policy_at_every_lambda(lam: float) -> None:
    """The edge against the rough ground, both from the start: the mean prefers the edge, CVaR the rough ground.

    With λ = 1 the values inside generalised advantage estimation cancel but for the first, so a distorted value there
    (DPPO's way) would be a baseline and nothing else.
    """
    levels = (np.arange(200) + 0.5) / 200

    def spread(path: tuple[int, ...], gamma: float = 0.99) -> torch.Tensor:
        values, probabilities = path_returns(path, gamma)
        return torch.from_numpy(values[np.searchsorted(probabilities.cumsum(), levels).clip(max=len(values) - 1)])

    edge, rough = spread((EDGE,) * 5), spread((ROUGH,) * 5)
    both = torch.cat([edge, rough]).sort().values
    state = ReturnDistribution(both[None], torch.full_like(both, 1 / len(both))[None])
    tail = cvar_distortion(of(0.2))
    on_edge, on_rough = (float(influence(path[None], state.locations, state.probabilities, tail)) for path in (edge, rough))
    assert edge.mean() > rough.mean()
    assert on_edge < -1 < 1 < on_rough
    # One step of the walk as a rollout: the first action has been taken, the rest is predicted or observed.
    own = both[None, None, None].expand(1, 2, 200, -1)
    reward = torch.zeros(1, 2, 200, dtype=torch.float64)
    reward[0, 1] = edge  # what really follows, in each of 200 rollouts
    ends = torch.zeros(1, 2, 200, dtype=torch.bool)
    ends[:, 1] = True
    following = edge[None, None, None].expand(1, 2, 200, -1).repeat(1, 1, 1, 2)
    samples = sampled_returns(
        reward, ends, torch.zeros_like(ends), torch.ones_like(ends), own, following, of(1.0), of(lam),
        torch.rand(1, 2, 200, 400, dtype=torch.float64),
    )  # fmt: skip
    first = ReturnDistribution(own[:, :1], torch.full_like(own[:, :1], 1 / 400))
    found = influence(samples[:, :1], first.locations, first.probabilities, tail).mean()
    assert float(found) == pytest.approx(on_edge, abs=0.3)


@pytest.mark.parametrize("aggregation", ["mean", "min", "single"])
def test_risk_and_value_come_from_the_same_critics(aggregation: str) -> None:
    """C × T: where the critic with the lower mean has the better tail, `min` takes the tail of that critic all the same."""
    risky, dull = of(-9.0, 1.0, 5.0, 11.0), of(0.9, 1.0, 1.1, 1.2)  # means 2 and 1.05
    run = trainer(tiny(critic={"quantiles": 4, "twin": True, "aggregation": aggregation}))
    outputs = torch.cat([risky, dull]).view(1, 1, 1, 8)
    hyper = {"risk.cvar_alpha": of(0.25)}
    found = run.ppo.objective.cvar(outputs, torch.ones(1, 1, 1, dtype=torch.bool), hyper)
    expected = {"mean": (-9.0 + 0.9) / 2, "min": 0.9, "single": -9.0}[aggregation]
    assert float(found) == pytest.approx(expected)
    value = {"mean": (2 + 1.05) / 2, "min": 1.05, "single": 2.0}[aggregation]
    assert float(run.policy.values.mean(outputs)) == pytest.approx(value)
    # The advantage too: by how much the samples are above the middle of the very same distribution.
    hyper |= {"risk.weight": of(1.0), "risk.wang_shift": of(0.0)}
    hyper["risk.cvar_alpha"] = of(1.0)
    advantage = run.ppo.objective.advantage(torch.zeros(1, 1, 1), of(7.0).view(1, 1, 1, 1), outputs, hyper)
    assert float(advantage) == pytest.approx(7.0 - value, abs=0.3)


def test_advantages_read_the_distribution_that_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch's targets are samples that end in the aggregated distribution; the critics' loss gets these very targets."""
    run = trainer(tiny(critic={"quantiles": 4, "twin": True, **SHARP}, risk={"weight": 0.5}), [1, 2])
    held, batches, update, make_batch = [], [], run.ppo.update, ppo.make_batch
    run.ppo.update = lambda rollout, *rest: (held.append(rollout), update(rollout, *rest))[1]
    monkeypatch.setattr(ppo, "make_batch", lambda *args, **kw: (batches.append(make_batch(*args, **kw)), batches[-1])[1])
    run.iterate(LONG)
    (rollout,), (batch,) = held, batches
    assert batch.targets.shape == (2, 11, 5, 4)
    following = run.policy.values.samples(rollout.next_critic)
    last = rollout.reward[:, -1, :, None] + 0.99 * following[:, -1] * ~rollout.terminated[:, -1, :, None]
    torch.testing.assert_close(batch.targets[:, -1], last)
    plain = ppo.make_batch(rollout, run.state.hyper, normalize=False)
    assert plain.targets.shape == (2, 11, 5, 1)
    assert torch.equal(plain.targets[..., 0], plain.returns)


# ------------------------------------------------------------------------------------------------------------- the limit


def test_the_multiplier_rises_below_the_limit_falls_above_and_ignores_nan() -> None:
    state = RiskState(of(0.0, 0.0, 0.5, 0.5, 9.95, 0.05))
    shortfall, deviation = of(3.0, -3.0, float("nan"), 0.5, 100.0, -100.0), of(10.0, 10.0, 1.0, 1.0, 1.0, 1.0)
    state.adapt_(shortfall, deviation, of(1.0, 1.0, 1.0, 0.2, 1.0, 1.0), 10.0)
    assert state.multiplier.tolist() == pytest.approx([0.3, 0.0, 0.5, 0.6, 10.0, 0.0])
    exploit_(state, torch.tensor([4, 1, 2, 3, 4, 5]))
    assert state.multiplier[0] == 10.0


def scaled_rewards(run, factor: float) -> None:
    step = run.env.step
    run.env.step = lambda actions: dataclasses.replace(found := step(actions), reward=found.reward * np.float32(factor))


def test_the_limit_is_in_the_units_of_the_reward_at_any_scale_of_it() -> None:
    """Rewards and limit 1024 times larger: the same multipliers and weights, CVaR and violation 1024 times larger."""
    found = {}
    for factor in (1.0, 1024.0):
        change = {"risk": {"cvar_limit": -1.0 * factor, "cvar_alpha": 0.3}, "critic": {"quantiles": 5, **SHARP}}
        run = trainer(tiny(change, env={"id": "PendulumNoVel-v1"}, normalizer={"epsilon": 1e-12}), [1, 2])
        scaled_rewards(run, factor)
        metrics = [run.iterate(LONG) for _ in range(4)]
        found[factor] = {
            name: torch.stack([m[name] for m in metrics]) for name in ("risk/cvar", "risk/lambda", "risk/violation")
        } | {"weights": run.state.parameters["critic.output.weight"].clone()}
    one, many = found.values()
    close = {"rtol": 1e-5, "atol": 1e-8}
    torch.testing.assert_close(many["risk/lambda"], one["risk/lambda"], **close)
    torch.testing.assert_close(many["weights"], one["weights"], **close)
    torch.testing.assert_close(many["risk/cvar"], 1024 * one["risk/cvar"], **close)
    torch.testing.assert_close(many["risk/violation"], 1024 * one["risk/violation"], **close)
    assert one["risk/lambda"][-1].min() > 0
    torch.testing.assert_close(one["risk/violation"], (-1 - one["risk/cvar"]).clamp(min=0))


def test_cvar_is_logged_for_starts_of_episodes_only_and_nan_without_any() -> None:
    run = trainer(tiny(env={"max_episode_steps": 100}, critic=SHARP, risk={"cvar_limit": 100.0}), [1, 2])
    held, update = [], run.ppo.update
    run.ppo.update = lambda rollout, *rest: (held.append(rollout), update(rollout, *rest))[1]
    metrics = run.iterate(LONG)
    hyper = run.state.hyper
    first = cvar(held[0].critic[:, 0], hyper["risk.cvar_alpha"])  # all episodes started there, and some later
    starts = held[0].is_first
    expected = torch.stack([cvar(held[0].critic, hyper["risk.cvar_alpha"])[p][starts[p]].mean() for p in range(2)])
    torch.testing.assert_close(metrics["risk/cvar"], run.state.reward.unscale(expected))
    assert first.shape == (2, 5)
    before = run.state.risk.multiplier.clone()
    none = torch.zeros_like(starts)
    nothing = run.ppo.objective.cvar(held[0].critic, none, hyper)
    assert nothing.isnan().all()
    said = run.ppo.objective.adapt_(nothing, torch.ones(2, dtype=torch.float64), hyper)
    assert said["risk/violation"].isnan().all()
    assert torch.equal(run.state.risk.multiplier, before)
    assert before.gt(0).all()


def test_cvar_reads_the_distribution_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps start an episode; members that ask for different steps get what each would get alone, bit for bit."""
    objective = trainer(tiny(critic={"quantiles": 4, "twin": True}), [1, 2]).ppo.objective
    outputs, hyper = torch.randn(2, 6, 5, 8, dtype=torch.float64), {"risk.cvar_alpha": of(0.3, 0.6)}
    everywhere = cvar(outputs.unflatten(-1, (2, 4)).sort(-1).values.mean(-2), hyper["risk.cvar_alpha"])
    where = torch.zeros(2, 6, 5, dtype=torch.bool)
    where[0, 0, 2], where[1, 3, :3] = True, True
    sizes, distribution = [], objective.critic.distribution
    monkeypatch.setattr(
        objective.critic, "distribution", lambda part: (sizes.append(part.shape[1:-1].numel()), distribution(part))[1]
    )
    found = objective.cvar(outputs, where, hyper)
    assert sizes == [4]
    torch.testing.assert_close(found, torch.stack([everywhere[0, 0, 2], everywhere[1, 3, :3].mean()]))
    for p in range(2):
        alone = {"risk.cvar_alpha": hyper["risk.cvar_alpha"][p : p + 1]}
        assert torch.equal(found[p : p + 1], objective.cvar(outputs[p : p + 1], where[p : p + 1], alone))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"critic": {"kind": "scalar"}, "risk": {"weight": 0.5}}, "critic.kind = 'scalar' predicts a single number"),
        ({"critic": {"quantiles": 1}, "risk": {"cvar_limit": 0.0}}, "risk.cvar_limit = 0.0: risk needs a distribution"),
        ({"risk": {"distortion": "wang"}}, "risk.distortion = 'wang': needs risk.weight above 0"),
        ({"risk": {"cvar_alpha": 0.0}}, "risk.cvar_alpha = 0.0: must be a finite number > 0 and <= 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny(change)


# ------------------------------------------------------------------------------------------------------ in training

RISKY = [
    {"critic": {"quantiles": 5, "twin": True, **SHARP}, "risk": {"weight": 0.4, "cvar_limit": 2.0}},
    {"critic": {"kind": "categorical", "atoms": 7}, "risk": {"weight": 0.4, "distortion": "wang", "cvar_limit": 2.0}},
]


@pytest.mark.parametrize("change", RISKY, ids=["cvar", "wang"])
def test_a_population_equals_its_members_alone(change) -> None:
    settings = tiny(EVERYTHING, change)

    def train(seeds, positions):
        run = trainer(settings, seeds)
        for row, position in enumerate(positions):
            run.state.hyper["risk.weight"][row] *= position  # one member without any
            run.state.hyper["risk.cvar_alpha"][row] *= 1 + position
            run.state.hyper["risk.multiplier_lr"][row] *= 1 + position
        for _ in range(3):
            run.iterate(LONG)
        return snapshot(run.state)

    found = train([3, 4, 5], range(3))
    assert len(found["risk.multiplier"].unique()) == 3
    for p, seed in enumerate([3, 4, 5]):
        assert_same(member(found, p), train([seed], [p]), 1e-10)


def test_nan_in_one_member_leaves_the_others_bit_identical() -> None:
    hurt = assert_nan_stays_with_its_member(tiny(RISKY[0]))
    assert hurt["risk.multiplier"].isfinite().all()


# ------------------------------------------------------------------------------------------------------------- the cliff


def best_path(alpha: float, gamma: float = 0.99) -> tuple[int, ...]:
    def value(path: tuple[int, ...]) -> float:
        values, probabilities = (torch.from_numpy(part)[None] for part in path_returns(path, gamma))
        return float(distorted_mean(values, probabilities, cvar_distortion(of(alpha))))

    return max(itertools.product((EDGE, ROUGH), repeat=LENGTH - 1), key=value)


def test_the_best_path_leaves_the_edge_step_by_step_as_alpha_falls() -> None:
    paths = [best_path(alpha) for alpha in (1.0, 0.8, 0.6, 0.5, 0.4, 0.1)]
    assert paths[0] == paths[1] == (EDGE,) * 5
    assert paths[4] == paths[5] == (ROUGH,) * 5
    on_edge = [path.count(EDGE) for path in paths]
    assert on_edge == sorted(on_edge, reverse=True)
    assert len(set(on_edge)) >= 4


def test_the_agent_leaves_the_edge_for_the_worst_fifth_of_its_returns_and_walks_on_it_for_all() -> None:
    """Two members of one population, alike but for alpha (1 is the mean)."""
    settings_ = tiny(
        env={"id": "WindyCliff-v0", "num_envs": 16, "max_episode_steps": None}, policy={"memory": "none", "encoder": [32]},
        ppo={"n_steps": 32, "n_epochs": 6, "ent_coef": 0.02}, optimizer={"lr": 0.01}, vgs={"enabled": False},
        critic={"quantiles": 16, **SHARP}, risk={"weight": 1.0},
    )  # fmt: skip
    run = trainer(settings_, [0, 4], torch.float32)
    run.state.hyper["risk.cvar_alpha"].copy_(torch.tensor([1.0, 0.2]))
    while run.timesteps < 9_000:
        run.iterate(9_000)
    rows = [[[column, row if column else EDGE] for column in range(LENGTH - 1)] for row in (EDGE, ROUGH)]
    obs = run.normalize(torch.tensor(rows, dtype=torch.float32))
    start = torch.ones(2, LENGTH - 1, dtype=torch.bool)
    actions = run.policy.step(obs, run.policy.initial_state(2, LENGTH - 1), start)[0].mode()
    assert [tuple(row) for row in actions.tolist()] == [best_path(1.0), best_path(0.2)]
