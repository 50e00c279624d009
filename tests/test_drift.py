"""The drift schedule: what changes, when, how fast, and that (seed, steps) says it all."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hardy.envs import Drift, DriftSettings, EnvSettings, EnvStep, GymVectorEnv, make
from hardy.envs.classic import ClassicControl

RANGES = {"length": (0.3, 0.8), "gravity": (5.0, 15.0)}


def physics(every: int = 30, **kwargs: Any) -> DriftSettings:
    return DriftSettings(kind="physics", every=every, ranges=RANGES, **kwargs)


def build(drift: DriftSettings, seeds: list[int], num_envs: int = 3, task: str = "CartPole-v1", **kwargs: Any) -> Drift:
    env = make(EnvSettings(id=task, num_envs=num_envs, drift=drift), seeds, **kwargs)
    assert isinstance(env, Drift)
    env.reset()
    return env


def values(env: Drift, name: str = "length") -> np.ndarray:
    inner = env._env
    assert isinstance(inner, ClassicControl)
    return inner._physics[name].copy()


def advance(env: Drift, count: int = 1) -> list[EnvStep]:
    return [env.step(np.arange(env.num_envs) % 2) for _ in range(count)]


def test_sudden_change_comes_at_its_step_for_every_environment_of_the_member() -> None:
    env = build(physics(every=30), [1, 2])
    seen = []
    for _ in range(31):
        seen.append((env.steps[0], values(env).reshape(2, 3)))
        advance(env)
    assert all((value == 0.5).all() for steps, value in seen if steps < 30)
    for steps, value in seen:
        assert (value[:, :1] == value).all(), "one value per member"
        np.testing.assert_array_equal(value, seen[steps // 30 * 10][1], err_msg=f"constant between changes, step {steps}")
    changed = [seen[index][1][:, 0] for index in (10, 20, 30)]
    assert len({float(v) for value in changed for v in value}) == 6, "another draw at each change, for each member"
    assert all(0.3 <= v <= 0.8 for value in changed for v in value)
    assert values(env, "gravity")[0] != 9.8


def test_gradual_change_is_linear() -> None:
    env = build(physics(every=60, over=30), [4], num_envs=3)
    after_first = values(build(physics(every=60, over=30), [4], drift_step=90))[0]
    after_second = values(build(physics(every=60, over=30), [4], drift_step=150))[0]
    for _ in range(60):
        steps = int(env.steps[0])
        old, new = (0.5, after_first) if steps < 120 else (after_first, after_second)
        fraction = 0.0 if steps < 60 else min((steps % 60) / 30, 1.0)
        np.testing.assert_allclose(values(env), old + fraction * (new - old), rtol=1e-12)
        advance(env)
    assert after_first != after_second


@given(seed=st.integers(0, 2**32), steps=st.integers(0, 400), over=st.integers(0, 40), start=st.none() | st.integers(0, 100))
@settings(deadline=None, max_examples=25)
def test_value_depends_on_seed_and_steps_alone(seed: int, steps: int, over: int, start: int | None) -> None:
    """Walking there, and asking for it at once, alone or in a population, give the same physics."""
    drift = physics(every=40, over=over, start=start)
    jumped = build(drift, [seed], num_envs=2, drift_step=steps)
    walked = build(drift, [99, seed], num_envs=2)
    for at in range(0, steps, 7):
        walked.set_steps(np.array([at, at]))
    walked.set_steps(np.array([steps, steps]))
    for name in RANGES:
        np.testing.assert_array_equal(values(walked, name)[2:], values(jumped, name))


def test_start_and_number_of_changes() -> None:
    drift = physics(every=10, start=25, changes=2)
    counts, _ = drift.progress(np.array([0, 24, 25, 34, 35, 44, 45, 1000]))
    assert counts.tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    assert physics(every=10).progress(np.array([100]))[0].tolist() == [10]
    assert physics(every=10, start=0).progress(np.array([0]))[0].tolist() == [1]
    env = build(drift, [0], drift_step=1000)
    assert env.changes.tolist() == [2]
    np.testing.assert_array_equal(values(env), values(build(drift, [0], drift_step=35)))


def test_before_the_first_change_nothing_is_under_way() -> None:
    index, fraction = permuted(over=4).progress(np.arange(0, 15, 2))
    assert index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert fraction.tolist() == [1, 1, 1, 0, 0.5, 1, 0, 0.5]


def test_parameters_are_drawn_independently() -> None:
    env = build(physics(every=10), [3], drift_step=10)
    places = [(values(env, name)[0] - low) / (high - low) for name, (low, high) in RANGES.items()]
    assert abs(places[0] - places[1]) > 1e-6


def test_another_parameter_does_not_change_the_draws_of_the_first() -> None:
    one = DriftSettings(kind="physics", every=10, ranges={"length": RANGES["length"]})
    np.testing.assert_array_equal(values(build(one, [3], drift_step=10)), values(build(physics(every=10), [3], drift_step=10)))


def test_frozen_drift_does_not_advance_and_takes_the_seeds_of_the_training() -> None:
    drift = physics(every=10)
    training = build(drift, [6, 7])
    advance(training, 5)
    twin = build(drift, [60, 70], num_envs=2, drift_step=training.steps, drift_seeds=[6, 7])
    np.testing.assert_array_equal(values(twin)[::2], values(training)[::3])
    before = values(twin)
    advance(twin, 20)
    np.testing.assert_array_equal(values(twin), before)
    assert twin.steps.tolist() == [15, 15]
    at_zero = build(drift, [6], drift_step=0)
    advance(at_zero, 20)
    assert (values(at_zero) == 0.5).all(), "step 0 is a step like any other"


def test_own_seed_gives_all_members_the_same_drift() -> None:
    shared = values(build(physics(every=10, seed=5), [1, 2], drift_step=10))
    assert (shared == shared[0]).all() and shared[0] != 0.5
    own = values(build(physics(every=10), [1, 2], drift_step=10))
    assert own[0] != own[-1]


@pytest.mark.parametrize(
    "drift", [physics(every=12), DriftSettings(kind="permute", every=12, over=9)], ids=["physics", "permute"]
)
def test_population_of_three_equals_three_of_one(drift: DriftSettings) -> None:
    seeds = [2, 3, 5]
    together, alone = build(drift, seeds, 2), [build(drift, [seed], 2) for seed in seeds]
    rng = np.random.default_rng(0)
    for _ in range(41):
        actions = rng.integers(0, 2, 6)
        step = together.step(actions)
        parts = [env.step(actions[2 * p : 2 * p + 2]) for p, env in enumerate(alone)]
        np.testing.assert_array_equal(step.obs, np.concatenate([part.obs for part in parts]))
        np.testing.assert_array_equal(step.terminated, np.concatenate([part.terminated for part in parts]))


@pytest.mark.parametrize(
    "drift", [physics(every=12, over=5), DriftSettings(kind="permute", every=12)], ids=["physics", "permute"]
)
def test_state_round_trip_is_exact(drift: DriftSettings) -> None:
    env = build(drift, [1, 2])
    advance(env, 9)
    saved = env.get_state()
    assert saved is not None
    other = build(drift, [1, 2])
    other.set_state(saved)
    for one, two in zip(advance(env, 25), advance(other, 25), strict=True):
        np.testing.assert_array_equal(one.obs, two.obs)
        np.testing.assert_array_equal(one.truncated, two.truncated)
    with pytest.raises(ValueError, match="no 'drift_steps'"):
        other.set_state(saved["env"])


def permuted(task: str = "CartPole-v1", **kwargs: Any) -> DriftSettings:
    return DriftSettings(kind="permute", every=6, **kwargs)


def test_permutation_reorders_entries_member_by_member() -> None:
    seeds = [8, 9, 10]
    plain = make(EnvSettings(id="CartPole-v1", num_envs=2, max_episode_steps=5), seeds)
    env = make(EnvSettings(id="CartPole-v1", num_envs=2, max_episode_steps=5, drift=permuted()), seeds)
    assert isinstance(env, Drift)
    np.testing.assert_array_equal(env.reset(), plain.reset())
    orders: list[tuple[int, ...]] = []
    for index in range(1, 25):
        actions = np.arange(6) % 2
        seen, true = env.step(actions), plain.step(actions)
        for member in range(3):
            rows = slice(2 * member, 2 * member + 2)
            order = [int(np.flatnonzero(true.obs[2 * member] == entry)[0]) for entry in seen.obs[2 * member]]
            np.testing.assert_array_equal(seen.obs[rows], true.obs[rows][:, order])
            if seen.final_obs is not None and true.final_obs is not None:
                np.testing.assert_array_equal(seen.final_obs[rows], true.final_obs[rows][:, order])
            if index < 3:
                assert order == [0, 1, 2, 3]
            orders.append(tuple(order))
        np.testing.assert_array_equal(seen.reward, true.reward)
        np.testing.assert_array_equal(seen.is_first, true.is_first)
    assert len(set(orders)) > 6
    assert env.observation_space.contains(seen.obs[0])
    assert env.observation_space.low.tolist() == [-np.inf] * 4


def test_gradual_permutation_blends_the_two_orders() -> None:
    drift = permuted(over=4)
    plain = make(EnvSettings(id="CartPole-v1", num_envs=1), [3])
    env = make(EnvSettings(id="CartPole-v1", num_envs=1, drift=drift), [3])
    assert isinstance(env, Drift)
    env.reset()
    plain.reset()
    order = build(drift, [3], num_envs=1, drift_step=11)._new_order[0, 0]
    assert order.tolist() != [0, 1, 2, 3]
    for index in range(1, 12):
        action = np.array([index % 2])
        seen, true = env.step(action).obs[0], plain.step(action).obs[0]
        fraction = np.float32(np.clip((index - 6) / 4, 0, 1))
        np.testing.assert_allclose(seen, (1 - fraction) * true + fraction * true[order], rtol=1e-6)


def test_finished_blend_keeps_entries_apart() -> None:
    """An entry that is not finite must not reach the others once the change is complete, though another member still blends."""
    env = build(permuted(over=4), [3, 4], num_envs=1)
    env.set_steps(np.array([11, 7]))
    seen = env._see(np.array([[np.nan, 1, 2, 3], [4, 5, 6, 7]], dtype=np.float32))
    assert np.isnan(seen).sum() == 1


def test_steps_count_valid_transitions_only() -> None:
    vector = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1", max_episode_steps=3)] * 2)
    env = Drift(GymVectorEnv(vector, [0, 1]), DriftSettings(kind="permute", every=100), [0])
    env.reset()
    advance(env, 8)
    assert env.steps.tolist() == [12], "three steps of four are real"
    assert env.get_state() is None
    env.close()


def test_physics_of_gymnasium_environments_drift_too() -> None:
    vector = SyncVectorEnv([lambda: gymnasium.make("Pendulum-v1")] * 4)
    env = Drift(GymVectorEnv(vector, [0, 1, 2, 3]), DriftSettings(kind="physics", every=2, ranges={"g": (1.0, 2.0)}), [0, 1])
    env.reset()
    assert vector.get_attr("g") == (10.0,) * 4
    env.step(np.zeros((4, 1), dtype=np.float32))
    now = vector.get_attr("g")
    assert now[0] == now[1] != now[2] == now[3]
    assert all(1 <= value <= 2 for value in now)


def test_other_physics_stay_free() -> None:
    env = build(DriftSettings(kind="physics", every=10, ranges={"length": (0.3, 0.8)}), [0])
    env.set_physics("gravity", np.full(3, 1.0))
    assert (values(env, "gravity") == 1).all()
    assert set(env.physics) == {"gravity", "masscart", "masspole", "length", "force_mag"}
    with pytest.raises(ValueError, match="'length' drifts"):
        env.set_physics("length", np.ones(3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "physics"}, "ranges is empty"),
        ({"kind": "permute", "ranges": {"length": (1.0, 2.0)}}, "no meaning with kind = 'permute'"),
        ({"kind": "physics", "ranges": {"length": (2.0, 1.0)}}, "low must not exceed high"),
        ({"kind": "physics", "ranges": {"length": (2.0,)}}, "length"),
        ({"kind": "permute", "over": 11}, "over = 11 is longer than every = 10"),
        ({"kind": "permute", "every": 0}, "greater than 0"),
        ({"kind": "permute", "changes": 0}, "greater than 0"),
        ({"kind": "permute", "start": -1}, "greater than or equal to 0"),
        ({"kind": "melt"}, "'physics' or 'permute'"),
        ({"kind": "permute", "evry": 3}, "evry"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DriftSettings(**{"every": 10, **wrong})


def test_a_range_may_be_a_list() -> None:
    assert DriftSettings(kind="physics", every=1, ranges={"g": [1, 2.0]}).ranges == {"g": (1, 2.0)}


def test_what_does_not_fit_the_task_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"env\.drift\.ranges\.lenght: .*allowed are force_mag.*did you mean 'length'"):
        build(DriftSettings(kind="physics", every=10, ranges={"lenght": (0.3, 0.8)}), [0])
    with pytest.raises(ValueError, match=r"^env\.drift\.ranges\.length = \[-1\.0, 2\.0\]: must be finite and above 0$"):
        build(DriftSettings(kind="physics", every=10, ranges={"length": (-1.0, 2.0)}), [0])
    with pytest.raises(ValueError, match="fewer than two entries"):
        build(permuted(), [0], task="MountainCarContinuousNoVel-v0")
    with pytest.raises(ValueError, match="3 environments cannot be shared equally by 2 members"):
        Drift(make(EnvSettings(id="CartPole-v1", num_envs=3), [0]), permuted(), [0, 1])
    with pytest.raises(ValueError, match=r"steps have shape \(3,\)"):
        build(permuted(), [0, 1]).set_steps(np.zeros(3, dtype=np.int64))


def test_trying_a_range_leaves_the_defaults() -> None:
    """Trying both ends of a range at the start must not change the physics before the first change."""
    env = build(physics(), [0])
    assert (values(env) == 0.5).all() and (values(env, "gravity") == 9.8).all()


@pytest.mark.parametrize("kind", ["physics", "permute"])
def test_episodes_begin_in_chosen_rows_behind_a_drift(kind: str) -> None:
    ranges = {"ranges": {"gravity": (5.0, 15.0)}} if kind == "physics" else {}
    settings = EnvSettings(id="CartPole-v1", num_envs=2, drift=DriftSettings(kind=kind, every=3, **ranges))
    env = make(settings, [1, 2])
    env.reset()
    for _ in range(4):
        last = env.step(np.zeros(4, dtype=np.int64)).obs
    assert env.resets_rows
    chosen = np.array([True, False, False, True])
    obs = env.reset_rows(chosen)
    np.testing.assert_array_equal(obs[~chosen], last[~chosen])
    assert not np.isclose(obs[chosen], last[chosen]).all(axis=1).any()
    assert np.abs(obs[chosen]).max() <= 0.05  # where episodes of this task begin, in whatever order the entries come
    assert env.steps.tolist() == [8, 8]
