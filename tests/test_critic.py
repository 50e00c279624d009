"""Critics: each kind recovers known distributions, twins are independent and aggregated alike everywhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from small_runs import EVERYTHING, assert_nan_stays_with_its_member, assert_same, member, snapshot, tiny, trainer

import hardy.ppo as ppo
from hardy.config import ConfigError, settings_from_dict
from hardy.ops.categorical import MARGIN, MIN_WIDTH, SHRINK, atoms, follow_, project
from hardy.ops.critic import Critic, CriticSettings
from hardy.ops.distortion import cvar_distortion, distorted_mean
from hardy.ops.quantiles import expected_value, quantile_huber_loss, quantile_midpoints

LONG = 1000


def bimodal(level: np.ndarray) -> np.ndarray:
    """Quantiles of an even mixture of N(−2, 0.5²) and N(2, 0.5²), by inverting its distribution function on a grid."""
    grid = np.linspace(-6, 6, 100_001)
    return np.interp(level, 0.5 * (stats.norm.cdf(grid, -2, 0.5) + stats.norm.cdf(grid, 2, 0.5)), grid)


# Name: quantile function, and the errors stated for it: of the quantile critic's 32 quantiles (largest, the outer two of heavy
# tails aside), of the categorical critic's mean, and of its distribution function at any atom.
KNOWN = {
    "gaussian": (stats.norm.ppf, 0.02, 0.01, 0.01),
    "bimodal": (bimodal, 0.02, 0.01, 0.01),
    "heavy-tailed": (lambda level: stats.t.ppf(level, 3), 0.02, 0.02, 0.01),
    "deterministic": (lambda level: np.full_like(level, 0.7), 0.01, 0.01, 0.01),
}


def fitted(critic: Critic, samples: np.ndarray, steps: int = 700) -> torch.Tensor:
    """The outputs ``[2, 1, K]`` that the critic's own loss leads to, for two members."""
    target = torch.from_numpy(samples).expand(2, 1, len(samples))
    size = critic.heads * Critic.head_size(critic.settings)
    found = (0.1 * torch.randn(2, 1, size, dtype=torch.float64)).requires_grad_()
    optimizer = torch.optim.Adam([found], lr=0.1, betas=(0.8, 0.95))  # outer quantiles: gradients 60 times smaller one way
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.992)
    for _ in range(steps):
        optimizer.zero_grad()
        critic.loss(found, target, found.detach(), torch.zeros(2, dtype=torch.float64)).sum().backward()
        optimizer.step()
        schedule.step()
    return found.detach()


@pytest.mark.parametrize("name", KNOWN)
def test_twin_quantile_critics_recover_a_known_distribution(name: str) -> None:
    quantile_function, error, _, _ = KNOWN[name]
    critic = Critic(CriticSettings(quantiles=32, huber_threshold=0.01, twin=True))
    outputs = fitted(critic, quantile_function((np.arange(500) + 0.5) / 500))
    expected = torch.from_numpy(quantile_function(quantile_midpoints(32, dtype=torch.float64).numpy()))
    found = critic.distribution(outputs)
    inner = slice(1, -1) if name == "heavy-tailed" else slice(None)
    torch.testing.assert_close(found.locations[..., inner], expected[inner].expand(2, 1, -1), rtol=0, atol=error)
    torch.testing.assert_close(found.locations, expected.expand(2, 1, -1), rtol=0, atol=0.1)
    torch.testing.assert_close(found.probabilities.sum(-1), torch.ones(2, 1, dtype=torch.float64))
    torch.testing.assert_close(critic.mean(outputs), expected.mean().expand(2, 1), rtol=0, atol=0.01)
    for alpha in (0.05, 0.25):  # of the fitted distribution and of the exact quantiles
        tail = cvar_distortion(torch.full((2,), alpha, dtype=torch.float64))
        fitted_tail, exact = (
            distorted_mean(locations, found.probabilities, tail)
            for locations in (found.locations, expected.expand_as(found.locations))
        )
        torch.testing.assert_close(fitted_tail, exact, rtol=0, atol=0.06)
    assert torch.equal(critic.samples(outputs), found.locations)


@pytest.mark.parametrize("name", KNOWN)
def test_twin_categorical_critics_recover_a_known_distribution(name: str) -> None:
    quantile_function, _, error, step = KNOWN[name]
    samples = quantile_function((np.arange(1000) + 0.5) / 1000)
    support = torch.tensor([[-6.0, 6.0], [-15.0, 15.0]], dtype=torch.float64)
    critic = Critic(CriticSettings(kind="categorical", atoms=51, twin=True), support)
    outputs = fitted(critic, samples)
    found = critic.distribution(outputs)
    reach = np.stack([np.clip(samples, *ends) for ends in support.tolist()])
    torch.testing.assert_close(critic.mean(outputs), torch.from_numpy(reach.mean(1, keepdims=True)), rtol=0, atol=error)
    middles = 0.5 * (found.locations[..., 1:] + found.locations[..., :-1])
    spread = 0.5 * (support[:, 1] - support[:, 0]).numpy() / 50
    for p in range(2):  # a sample between two atoms lies on both: the distribution function is known to half a step
        cumulated = found.probabilities[p, 0].cumsum(0)[:-1].numpy()
        low, high = (np.searchsorted(np.sort(samples), middles[p, 0].numpy() + side * spread[p]) / 1000 for side in (-1, 1))
        assert (cumulated >= low - step).all()
        assert (cumulated <= high + step).all()
    torch.testing.assert_close(critic.samples(outputs).mean(-1), critic.mean(outputs))
    ordered = torch.from_numpy(quantile_function(quantile_midpoints(51, dtype=torch.float64).numpy()))
    inner = slice(2, -2)
    torch.testing.assert_close(
        critic.samples(outputs)[0, 0, inner], ordered[inner], rtol=0, atol=0.5 if name == "bimodal" else 0.25
    )


def test_a_scalar_critic_finds_the_mean_of_skewed_returns() -> None:
    samples = stats.expon.ppf((np.arange(1000) + 0.5) / 1000)
    outputs = fitted(Critic(CriticSettings(kind="scalar")), samples)
    torch.testing.assert_close(outputs, torch.full((2, 1, 1), samples.mean(), dtype=torch.float64), rtol=0, atol=0.01)


# ----------------------------------------------------------------------------------------------------------- categorical


@settings(deadline=None, max_examples=30)
@given(
    samples=st.lists(st.floats(-5, 5), min_size=1, max_size=5), low=st.floats(-3, -0.5), width=st.floats(0.5, 7),
    count=st.integers(2, 9),
)  # fmt: skip
def test_the_projection_is_the_published_one(samples: list[float], low: float, width: float, count: int) -> None:
    """Σ_k w_k [1 − |clip(x_k) − z_i| / Δz]⁺, one scalar at a time; the mean of what lies inside is kept."""
    support = torch.tensor([[low, low + width]], dtype=torch.float64)
    weights = torch.rand(len(samples), dtype=torch.float64) + 0.1
    weights = weights / weights.sum()
    given_samples = torch.tensor([[samples]], dtype=torch.float64)
    found = project(given_samples, support, count, weights)[0, 0]
    z = atoms(support, count)[0]
    for i in range(count):
        total = 0.0
        for x, weight in zip(samples, weights.tolist(), strict=True):
            inside = min(max(x, low), low + width)
            total += weight * max(0.0, 1 - abs(inside - float(z[i])) / (width / (count - 1)))
        assert float(found[i]) == pytest.approx(total, abs=1e-9)
    clipped = given_samples[0, 0].clamp(low, low + width)
    assert float((found * z).sum()) == pytest.approx(float((clipped * weights).sum()), abs=1e-9)


def test_each_member_projects_on_its_own_support() -> None:
    support = torch.tensor([[0.0, 1.0], [0.0, 2.0], [-4.0, 4.0]])
    found = project(torch.ones(3, 5, 1), support, 3)
    assert found[:, 0].tolist() == [[0, 0, 1], [0, 1, 0], [0, 0.75, 0.25]]
    nan = project(torch.tensor([[[torch.nan]], [[1.0]]]), support[:2], 3)
    assert nan[0].isnan().any()
    assert nan[1].tolist() == [[0, 1, 0]]


def test_the_support_grows_at_once_shrinks_slowly_and_ignores_what_does_not_count() -> None:
    support = torch.tensor([[-1.0, 1.0]] * 4)
    targets = torch.zeros(4, 2, 3)
    targets[0, 0, 0], targets[0, 1, 2] = 9.0, -1.0
    targets[1] = torch.nan
    targets[2] = 0.5
    targets[3, 0, 0], targets[3, 0, 1] = 100.0, torch.inf
    valid = torch.ones(4, 2, 3, dtype=torch.bool)
    valid[3, 0] = False
    follow_(support, targets, valid)
    assert support[0].tolist() == [-2.0, 10.0]
    assert support[1].tolist() == [-1.0, 1.0]
    half = MARGIN * MIN_WIDTH
    expected = [-1 + SHRINK * (0.5 - half + 1), 1 + SHRINK * (0.5 + half - 1)]
    torch.testing.assert_close(support[2], torch.tensor(expected))
    assert -1 < support[3, 0] < 0 < support[3, 1] < 1


def test_the_support_of_a_run_holds_its_returns_and_stands_still_within_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tiny(critic={"kind": "categorical", "atoms": 11}, normalizer={"reward": False}), [1, 2])
    support = run.state.parameters["critic.support"]
    assert support.data_ptr() == run.policy.values.support.data_ptr()
    seen, whole, loss, make_batch = [], [], ppo.loss, ppo.make_batch
    monkeypatch.setattr(ppo, "loss", lambda *args: (seen.append(support.clone()), loss(*args))[1])
    monkeypatch.setattr(ppo, "make_batch", lambda *args, **kw: (whole.append(make_batch(*args, **kw)), whole[-1])[1])
    for _ in range(3):
        seen.clear()
        before = support.clone()
        run.iterate(LONG)
        assert all(torch.equal(value, before) for value in seen)
        assert not torch.equal(support, before)
        for p in range(2):
            assert support[p, 0] < whole[-1].returns[p].min()
            assert support[p, 1] > whole[-1].returns[p].max()
    assert support[:, 1].min() > 3  # rewards of 1 in episodes of 7 steps


# ------------------------------------------------------------------------------------------------------------------ twins


def outputs_of(kind: str) -> tuple[Critic, torch.Tensor, torch.Tensor]:
    """A function of the aggregation, and outputs of two critics of which neither is lower everywhere."""
    outputs = torch.randn(3, 5, 2, 14, dtype=torch.float64)
    support = torch.tensor([[-1.0, 2.0]] * 3, dtype=torch.float64) if kind == "categorical" else None
    return (
        lambda aggregation: Critic(
            CriticSettings(kind=kind, quantiles=7, atoms=7, twin=True, aggregation=aggregation), support
        ),
        outputs,
        support,
    )


@pytest.mark.parametrize("kind", ["quantile", "categorical"])
def test_aggregations_are_what_they_say_for_the_mean_and_for_the_distribution(kind: str) -> None:
    make, outputs, support = outputs_of(kind)
    single = Critic(CriticSettings(kind=kind, quantiles=7, atoms=7), support)
    first, second = single.mean(outputs[..., :7]), single.mean(outputs[..., 7:])
    assert (first < second).any()
    assert (first > second).any()
    expected = {"mean": (first + second) / 2, "min": torch.minimum(first, second), "single": first}
    for aggregation, value in expected.items():
        critic = make(aggregation)
        torch.testing.assert_close(critic.mean(outputs), value)
        found = critic.distribution(outputs)
        torch.testing.assert_close((found.locations * found.probabilities).sum(-1), value)
        torch.testing.assert_close(critic.samples(outputs).mean(-1), value)
        assert (found.locations.diff(dim=-1) >= 0).all()
    lower = make("min").distribution(outputs)
    one, other = single.distribution(outputs[..., :7]), single.distribution(outputs[..., 7:])
    for field in ("locations", "probabilities"):
        picked = torch.where((first < second)[..., None], getattr(one, field), getattr(other, field))
        torch.testing.assert_close(getattr(lower, field), picked)


@pytest.mark.parametrize("aggregation", ["mean", "min", "single"])
def test_the_value_of_the_rollout_is_that_aggregation_for_advantages_bootstrap_and_log(aggregation, monkeypatch) -> None:
    run = trainer(tiny(critic={"quantiles": 5, "twin": True, "aggregation": aggregation}), [1, 2])
    held, update = [], run.ppo.update
    run.ppo.update = lambda rollout, *rest: (held.append(rollout), update(rollout, *rest))[1]
    logged = []
    monkeypatch.setattr(ppo, "explained_variance", lambda value, *_: logged.append(value) or value[:, 0, 0])
    run.iterate(LONG)
    (rollout,) = held
    combine = {"mean": lambda a, b: (a + b) / 2, "min": torch.minimum, "single": lambda a, b: a}[aggregation]
    for value, outputs in ((rollout.value, rollout.critic), (rollout.next_value, rollout.next_critic)):
        torch.testing.assert_close(value, combine(outputs[..., :5].mean(-1), outputs[..., 5:].mean(-1)))
    assert torch.equal(logged[0], rollout.value)
    assert not torch.allclose(rollout.critic[..., :5], rollout.critic[..., 5:])
    torch.testing.assert_close(rollout.next_critic[:, :-1][~rollout.truncated[:, :-1]],
                               rollout.critic[:, 1:][~rollout.truncated[:, :-1]])  # fmt: skip


@pytest.mark.parametrize("shared", [True, False])
def test_twins_start_apart_are_both_trained_and_leave_the_other_weights_as_they_are_without(shared: bool) -> None:
    change = {"policy": {"shared_memory": shared, "head": [6]}}
    alone, both = trainer(tiny(change), [1, 2]), trainer(tiny(change, critic={"twin": True}), [1, 2])
    for name, value in alone.state.parameters.items():
        assert torch.equal(both.state.parameters[name], value), name
    twins = {name: value for name, value in both.state.parameters.items() if name.startswith("critic.twin.")}
    assert len(twins) == 4
    for name, value in twins.items():
        assert value.eq(0).all() or not torch.equal(value, both.state.parameters[name.replace(".twin", "")])
    before = {name: value.clone() for name, value in twins.items()}
    both.iterate(LONG)
    for name, value in twins.items():
        assert not torch.equal(value, before[name]), name


def test_gradients_of_the_heads_do_not_mix() -> None:
    for kind in ("quantile", "categorical", "scalar"):
        support = torch.tensor([[-1.0, 2.0]], dtype=torch.float64) if kind == "categorical" else None
        critic = Critic(CriticSettings(kind=kind, quantiles=3, atoms=3, twin=True), support)
        size = Critic.head_size(critic.settings)
        outputs = torch.randn(1, 1, 2 * size, dtype=torch.float64, requires_grad=True)
        zero = torch.zeros(1, dtype=torch.float64)
        target = torch.full((1, 1, 1), 0.3, dtype=torch.float64)
        both = torch.autograd.grad(critic.loss(outputs, target, outputs.detach(), zero).sum(), outputs)[0]
        moved = outputs.detach().clone()
        moved[..., size:] += 1
        moved.requires_grad_()
        other = torch.autograd.grad(critic.loss(moved, target, outputs.detach(), zero).sum(), moved)[0]
        assert torch.equal(both[..., :size], other[..., :size])
        assert both[..., size:].abs().max() > 0


# --------------------------------------------------------------------------------------------------------------- clipping


def clipped_by_hand(new: torch.Tensor, old: torch.Tensor, target: torch.Tensor, reach: float) -> float:
    """Each quantile near its own old value, the larger loss of each critic, then the mean of the two critics."""
    losses = []
    for head in (slice(0, 3), slice(3, 6)):
        near = old[head] + (new[head] - old[head]).clamp(-reach, reach)
        pair = [float(quantile_huber_loss(q.view(1, 1, -1), target.view(1, 1), 1.0)) for q in (new[head], near)]
        losses.append(max(pair))
    return sum(losses) / 2


def test_clipping_is_around_each_quantiles_own_old_value_with_the_larger_loss_of_each_critic() -> None:
    critic = Critic(CriticSettings(quantiles=3, twin=True, value_clip=0.2))
    new, old = torch.randn(2, 7, 6, dtype=torch.float64), torch.randn(2, 7, 6, dtype=torch.float64)
    target, reach = torch.randn(2, 7, 1, dtype=torch.float64), torch.tensor([0.1, 0.5], dtype=torch.float64)
    found = critic.loss(new, target, old, reach)
    for p, k in itertools.product(range(2), range(7)):
        assert float(found[p, k]) == pytest.approx(clipped_by_hand(new[p, k], old[p, k], target[p, k], float(reach[p])))
    off = Critic(CriticSettings(quantiles=3, twin=True)).loss(new, target, old, reach)
    assert (found > off + 1e-3).any()


def test_clipping_moves_no_quantile_towards_the_others() -> None:
    """A distribution already right stays: around the old mean, every quantile would be pulled to the middle."""
    old = torch.tensor([[[-3.0, 0.0, 3.0]]], dtype=torch.float64)
    critic = Critic(CriticSettings(quantiles=3, value_clip=0.1))
    target, clip = torch.tensor([[[-3.0, 0.0, 3.0]]], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
    plain = Critic(CriticSettings(quantiles=3)).loss(old, target, old, clip)
    torch.testing.assert_close(critic.loss(old, target, old, clip), plain)


def test_in_training_the_clip_is_each_members_own_and_around_what_was_collected() -> None:
    change = {"critic": {"value_clip": 0.05}, "optimizer": {"lr": 0.1}, "ppo": {"n_epochs": 3}}
    runs = {}
    for reach in (1e6, 1e-3):
        run = trainer(tiny(change), [1, 2])
        run.state.hyper["critic.value_clip"].copy_(torch.tensor([1e6, reach]))
        run.iterate(LONG)
        runs[reach] = snapshot(run.state)
    unclipped = trainer(tiny(optimizer={"lr": 0.1}, ppo={"n_epochs": 3}), [1, 2])
    unclipped.iterate(LONG)
    free = {k: v for k, v in snapshot(unclipped.state).items() if k.startswith("parameters")}
    assert_same({k: runs[1e6][k] for k in free}, free, 1e-12)
    assert_same({k: runs[1e-3][k][:1] for k in free}, {k: v[:1] for k, v in free.items()}, 1e-12)
    assert any(not torch.allclose(runs[1e-3][k][1], free[k][1]) for k in free)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"kind": "categorical", "value_clip": 0.1}, "critic.value_clip = 0.1: must be 0 with critic.kind = 'categorical'"),
        ({"kind": "scalar", "bootstrap": "distribution"}, "critic.kind = 'scalar' has none; allowed are auto and mean"),
        ({"kind": "categoric"}, r"one of quantile, categorical, scalar \(did you mean 'categorical'\?\)"),
    ],
)
def test_what_does_not_fit_is_refused(section: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings_from_dict(CriticSettings, section)


# ---------------------------------------------------------------------------------------------------- in training, together

KINDS = [
    {"kind": "quantile", "quantiles": 3, "twin": True, "aggregation": "min", "value_clip": 0.1},
    {"kind": "categorical", "atoms": 7, "twin": True, "aggregation": "mean"},
    {"kind": "scalar", "twin": True, "aggregation": "single"},
]


@pytest.mark.parametrize(("critic", "shared"), list(zip(KINDS, (False, True, False), strict=True)))
def test_a_population_equals_its_members_alone(critic, shared) -> None:
    settings = tiny(EVERYTHING, critic=critic, policy={"shared_memory": shared})
    together = trainer(settings, [3, 4, 5])
    for _ in range(3):
        together.iterate(LONG)
    found = snapshot(together.state)
    for p, seed in enumerate([3, 4, 5]):
        alone = trainer(settings, [seed])
        for _ in range(3):
            alone.iterate(LONG)
        assert_same(member(found, p), snapshot(alone.state), 1e-10)


@pytest.mark.parametrize("critic", KINDS, ids=lambda critic: critic["kind"])
def test_nan_in_one_member_leaves_the_others_bit_identical(critic) -> None:
    assert_nan_stays_with_its_member(tiny(critic=critic))


def test_the_default_is_the_mean_of_the_quantiles_of_one_critic() -> None:
    critic, outputs = Critic(CriticSettings()), torch.randn(2, 3, 5, 32)
    assert torch.equal(critic.mean(outputs), expected_value(outputs))
    target = torch.randn(2, 3, 5)
    loss = critic.loss(outputs, target.unsqueeze(-1), outputs, torch.zeros(2))
    assert torch.equal(loss, quantile_huber_loss(outputs, target, 1.0))
