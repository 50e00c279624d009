"""The built-in tasks equal Gymnasium's, step by step, and their state is exact."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.envs import EnvSettings, list_envs, make
from hardy.envs.base import BatchedEnv, EnvStep
from hardy.envs.classic import CartPole, ClassicControl, MountainCar, MountainCarContinuous, Pendulum
from hardy.envs.cliff import EDGE, LENGTH, ROUGH, WindyCliff, WindyCliffEnv, path_returns
from hardy.envs.tasks import TASKS

FULL = [task for task in TASKS.values() if task.kept is None and task.batched is not WindyCliff]
MASKED = [task for task in TASKS.values() if task.kept is not None]


def build(task_id: str, seeds: list[int], num_envs: int, max_episode_steps: int | None = None) -> ClassicControl:
    env = make(EnvSettings(id=task_id, num_envs=num_envs, max_episode_steps=max_episode_steps), seeds)
    assert isinstance(env, ClassicControl)
    return env


def random_actions(env: BatchedEnv, rng: np.random.Generator) -> np.ndarray:
    if isinstance(env.action_space, Box):
        return rng.uniform(1.5 * env.action_space.low, 1.5 * env.action_space.high, (env.num_envs, 1)).astype(np.float32)
    return rng.integers(0, int(env.action_space.n), env.num_envs)


def play(env: BatchedEnv, steps: int, seed: int = 0) -> list[EnvStep]:
    rng = np.random.default_rng(seed)
    return [env.step(random_actions(env, rng)) for _ in range(steps)]


def assert_same(one: EnvStep, other: EnvStep, rows: slice = slice(None)) -> None:
    ended = one.terminated | one.truncated
    for name in ("obs", "reward", "terminated", "truncated", "is_first", "valid"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name)[rows], err_msg=name)
    if ended.any():
        assert one.final_obs is not None and other.final_obs is not None
        np.testing.assert_array_equal(one.final_obs[ended], other.final_obs[rows][ended])


@pytest.mark.parametrize("task", FULL, ids=lambda task: task.id)
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_every_step_equals_gymnasium(task, data) -> None:
    """Same state, same action: same next state, reward and termination. States cover the whole range, both edges included."""
    bounds = {
        CartPole: ((-2.6, 2.6), (-3, 3), (-0.25, 0.25), (-3, 3)),
        Pendulum: ((-20, 20), (-8, 8)),
        MountainCar: ((-1.2, 0.6), (-0.07, 0.07)),
        MountainCarContinuous: ((-1.2, 0.6), (-0.07, 0.07)),
    }[task.batched]
    rows = 3
    state = np.array([[data.draw(st.floats(low, high)) for _ in range(rows)] for low, high in bounds])
    env = build(task.id, [0], rows)
    env.reset()
    env._state = state.copy()
    actions = random_actions(env, np.random.default_rng(data.draw(st.integers(0, 10**6))))
    clipped = np.clip(actions, env.action_space.low, env.action_space.high) if isinstance(env.action_space, Box) else actions
    expected_state = state.copy()
    step = env.step(actions)
    for row in range(rows):
        single = task.single()
        single.reset(seed=0)
        single.state = state[:, row].copy()
        obs, reward, terminated, _, _ = single.step(clipped[row])
        expected_state[:, row] = single.state
        seen = step.obs[row] if step.final_obs is None else step.final_obs[row]
        np.testing.assert_allclose(seen, obs, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(step.reward[row], reward, rtol=1e-6, atol=1e-6)
        assert step.terminated[row] == terminated
    alive = ~step.terminated
    np.testing.assert_allclose(env._state[:, alive], expected_state[:, alive], rtol=1e-6, atol=1e-6)


def test_the_car_stops_at_the_left_wall_and_arrives_only_with_speed_forward() -> None:
    env = build("MountainCarContinuous-v0", [0], 2)
    env.reset()
    env._state = np.array([[-1.19, 0.455], [-0.07, -0.004]])
    step = env.step(np.zeros((2, 1), dtype=np.float32))
    np.testing.assert_array_equal(step.obs[0], np.array([-1.2, 0.0], dtype=np.float32))
    assert not step.terminated[1]
    env._state = np.array([[-1.19, 0.449], [-0.07, 0.07]])
    step = env.step(np.array([[0.0], [1.0]], dtype=np.float32))
    assert step.terminated.tolist() == [False, True]
    assert step.reward[1] == pytest.approx(99.9)
    env._state = np.array([[0.44, 0.44], [0.0150, 0.0100]])
    step = env.step(np.zeros((2, 1), dtype=np.float32))
    assert step.terminated.tolist() == [True, False], "0.4544 is at the goal, 0.4494 is not"


def test_the_car_with_three_actions_pays_for_every_step_and_arrives_at_half() -> None:
    env = build("MountainCar-v0", [0], 3)
    env.reset()
    env._state = np.array([[0.47, 0.45, 0.5], [0.04, 0.04, -0.01]])
    step = env.step(np.array([2, 2, 1]))
    assert step.terminated.tolist() == [True, False, False]
    assert step.reward.tolist() == [-1.0] * 3


@pytest.mark.parametrize("task", FULL, ids=lambda task: task.id)
def test_whole_episode_and_time_limit_equal_gymnasium(task) -> None:
    """From one initial state to the end under the published time limit."""
    env = build(task.id, [3], 1)
    first = env.reset()
    single = gymnasium.make(task.id)
    single.reset(seed=0)
    single.unwrapped.state = env._state[:, 0].copy()
    assert first.shape == (1, *single.observation_space.shape)
    np.testing.assert_array_equal(env.observation_space.low, single.observation_space.low)
    np.testing.assert_array_equal(env.observation_space.high, single.observation_space.high)
    assert env.action_space == single.action_space
    steps, ended = 0, False
    while not ended:
        # Bang-bang on the pole's own lean keeps it up for a while; the other tasks run to their limit.
        if task.batched is CartPole:
            actions = (env._state[2] + env._state[3] > 0).astype(np.int64)
            action = int(actions[0])
        elif task.batched is MountainCar:
            actions, action = np.zeros(1, dtype=np.int64), 0
        else:
            actions = action = np.zeros((1, 1), dtype=np.float32)
            action = actions[0]
        single.unwrapped.state = env._state[:, 0].copy()
        obs, reward, terminated, truncated, _ = single.step(action)
        step = env.step(actions)
        seen = step.obs if step.final_obs is None else step.final_obs
        np.testing.assert_allclose(seen[0], obs, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(step.reward[0], reward, rtol=1e-6, atol=1e-6)
        assert (step.terminated[0], step.truncated[0]) == (terminated, truncated and not terminated)
        assert step.is_first[0] == (terminated or truncated)
        steps, ended = steps + 1, terminated or truncated
    assert steps == task.batched.published_time_limit


@pytest.mark.parametrize("task", MASKED, ids=lambda task: task.id)
def test_masked_task_is_the_full_task_seen_in_part(task) -> None:
    full_id = task.id.replace("NoVel", "")
    masked, full = build(task.id, [5], 3, max_episode_steps=7), build(full_id, [5], 3, max_episode_steps=7)
    kept = list(task.kept)
    np.testing.assert_array_equal(masked.reset(), full.reset()[:, kept])
    assert masked.observation_space.shape == (len(kept),) == (len(task.entries),)
    for seen, whole in zip(play(masked, 23), play(full, 23), strict=True):
        np.testing.assert_array_equal(seen.obs, whole.obs[:, kept])
        np.testing.assert_array_equal(seen.reward, whole.reward)
        if seen.final_obs is not None:
            np.testing.assert_array_equal(seen.final_obs, whole.final_obs[:, kept])


@pytest.mark.parametrize("task", MASKED, ids=lambda task: task.id)
def test_gymnasium_makes_the_masked_task(task) -> None:
    env = gymnasium.make(task.id)
    twin = build(task.id, [0], 1)
    assert env.observation_space == twin.observation_space
    assert env.action_space == twin.action_space
    assert env.spec.max_episode_steps == task.batched.published_time_limit
    obs, _ = env.reset(seed=2)
    whole = np.asarray(env.unwrapped.state)
    assert obs in env.observation_space
    position = np.cos(whole[0]) if task.batched is Pendulum else whole[0]
    assert obs[0] == pytest.approx(position, abs=1e-6)
    assert gymnasium.make(env.spec).observation_space == env.observation_space, "the spec alone rebuilds it"


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.id)
def test_population_of_three_equals_three_of_one(task) -> None:
    seeds, per_member = [11, 13, 17], 2
    together = build(task.id, seeds, per_member, max_episode_steps=9)
    alone = [build(task.id, [seed], per_member, max_episode_steps=9) for seed in seeds]
    first = together.reset()
    for member, env in enumerate(alone):
        rows = slice(member * per_member, (member + 1) * per_member)
        np.testing.assert_array_equal(env.reset(), first[rows])
    if task.batched is not WindyCliff:  # which always starts alike; its gusts are each row's own, see below
        assert len(np.unique(first[:, 0])) == len(first), "every row has its own generator"
    rng = np.random.default_rng(0)
    for _ in range(29):
        actions = random_actions(together, rng)
        step = together.step(actions)
        for member, env in enumerate(alone):
            rows = slice(member * per_member, (member + 1) * per_member)
            assert_same(env.step(actions[rows]), step, rows)


@given(choices=st.lists(st.sampled_from([EDGE, ROUGH]), min_size=LENGTH, max_size=LENGTH), gust=st.sampled_from([1e-12, 1.0]))
@settings(deadline=None, max_examples=40)
def test_the_cliff_and_its_gymnasium_twin_take_the_same_steps(choices, gust) -> None:
    """Whatever the walker does, with a gust at every windy step or with none."""
    env, single = build("WindyCliff-v0", [0], 1), WindyCliffEnv(gust=gust, fall=7.0, rough=0.4)
    for name, value in {"gust": gust, "fall": 7.0, "rough": 0.4}.items():
        env.set_physics(name, np.array([value]))
    obs = env.reset()
    np.testing.assert_array_equal(obs[0], single.reset(seed=0)[0])
    for action in choices:
        step = env.step(np.array([action]))
        seen, reward, terminated, _, _ = single.step(action)
        np.testing.assert_array_equal((step.obs if step.final_obs is None else step.final_obs)[0], seen)
        assert (step.reward[0], step.terminated[0]) == (np.float32(reward), terminated)
        assert not step.truncated[0]
        if terminated:
            break
    assert terminated


@pytest.mark.parametrize("choices", [(EDGE,) * 5, (ROUGH,) * 5, (EDGE, ROUGH, EDGE, ROUGH, ROUGH)])
def test_returns_on_the_cliff_are_distributed_as_stated_and_each_row_has_its_own_gusts(choices) -> None:
    env = build("WindyCliff-v0", [0], 4000)
    env.reset()
    returns, running = np.zeros(4000), np.ones(4000, dtype=bool)
    for action in (*choices, EDGE):
        step = env.step(np.full(4000, action))
        returns += np.where(running, step.reward.astype(np.float64), 0)
        running &= ~step.terminated
    assert not running.any()
    values, probabilities = path_returns(choices)
    assert probabilities.sum() == pytest.approx(1)
    assert (np.diff(values) > 0).all()
    for value, probability in zip(values, probabilities, strict=True):
        assert np.mean(np.abs(returns - value) < 1e-5) == pytest.approx(probability, abs=0.02)


def test_a_row_does_not_depend_on_how_many_environments_its_member_has() -> None:
    np.testing.assert_array_equal(build("CartPole-v1", [7], 2).reset(), build("CartPole-v1", [7], 5).reset()[:2])


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.id)
def test_state_round_trip_is_exact(task) -> None:
    env = build(task.id, [1, 2], 2, max_episode_steps=11)
    env.reset()
    for name in env.physics:
        env.set_physics(name, np.linspace(0.9, 1.1, 4) * env.physics[name])
    play(env, 17)
    saved = env.get_state()
    rest = play(env, 31, seed=1)
    other = build(task.id, [8, 9], 2, max_episode_steps=11)
    for _ in range(2):  # the saved state must survive its use
        other.set_state(saved)
        for one, two in zip(rest, play(other, 31, seed=1), strict=True):
            assert_same(one, two)


def test_saved_state_is_nobodys_buffer() -> None:
    env = build("MountainCarContinuous-v0", [1], 3)
    env.reset()
    saved = env.get_state()
    copies = {key: array.copy() for key, array in saved.items()}
    env.reset()
    env.set_state(saved)
    env.reset()
    for key, array in copies.items():
        np.testing.assert_array_equal(saved[key], array, err_msg=key)


def test_every_episode_has_the_whole_time_limit() -> None:
    env = build("Pendulum-v1", [0], 2, max_episode_steps=4)
    env.reset()
    assert [bool(step.truncated.all()) for step in play(env, 12)] == [False, False, False, True] * 3


def test_state_of_other_sizes_is_refused() -> None:
    env = build("CartPole-v1", [1], 3)
    with pytest.raises(ValueError, match=r"'state' has shape \(4, 2\): \(4, 3\) is needed"):
        env.set_state(build("CartPole-v1", [1], 2).get_state())
    with pytest.raises(ValueError, match="'generators' has shape None"):
        env.set_state({key: value for key, value in env.get_state().items() if key != "generators"})


@pytest.mark.parametrize("action", [0, 1])
def test_physics_acts_per_row_and_derived_quantities_follow(action: int) -> None:
    """Heavier pole, other length: the result is that of Gymnasium with the same parameters and its derived ones recomputed."""
    env = build("CartPole-v1", [0], 2)
    env.reset()
    state = np.array([[0.1, 0.1], [0.2, 0.2], [0.05, 0.05], [-0.3, -0.3]])
    env._state = state.copy()
    changed = {"masspole": 0.3, "masscart": 1.7, "length": 0.9, "gravity": 5.0, "force_mag": 7.0}
    for name, value in changed.items():
        env.set_physics(name, np.array([env.physics[name], value]))
    step = env.step(np.array([action, action]))
    for row, physics in enumerate(({}, changed)):
        single = TASKS["CartPole-v1"].single()
        single.reset(seed=0)
        for name, value in physics.items():
            setattr(single, name, value)
        single.total_mass = single.masspole + single.masscart
        single.polemass_length = single.masspole * single.length
        single.state = state[:, row].copy()
        np.testing.assert_allclose(step.obs[row], single.step(action)[0], rtol=1e-6)
    assert not np.array_equal(step.obs[0], step.obs[1])


@pytest.mark.parametrize("task", FULL, ids=lambda task: task.id)
def test_every_physical_parameter_matters(task) -> None:
    for name, value in TASKS[task.id].batched.default_physics.items():
        env = build(task.id, [0], 2)
        env.reset()
        env._state = np.repeat(np.array([[0.1], [0.02], [0.05], [0.3]])[: env.state_size], 2, axis=1)
        env.set_physics(name, np.array([value, 1.5 * value]))
        continuous = isinstance(env.action_space, Box)
        env.step(np.full((2, 1), 0.7, np.float32) if continuous else np.full(2, env.action_space.n - 1))
        assert not np.array_equal(env._state[:, 0], env._state[:, 1]), name


def test_impossible_physics_is_refused() -> None:
    env = build("CartPole-v1", [0], 2)
    with pytest.raises(ValueError, match=r"physics = 'lenght': allowed are force_mag, .*did you mean 'length'"):
        env.set_physics("lenght", np.ones(2))
    with pytest.raises(ValueError, match=r"'length' = 0\.0 … 1\.0: must be finite and above 0"):
        env.set_physics("length", np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="'gravity' = nan … nan: must be finite"):
        env.set_physics("gravity", np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match=r"have shape \(3,\)"):
        env.set_physics("gravity", np.ones(3))
    env.set_physics("gravity", np.array([0.0, -1.0]))


def test_terminated_and_truncated_are_never_both_set() -> None:
    """A pole that falls on the last allowed step has terminated: its return ends there."""
    env = build("CartPole-v1", [0], 2, max_episode_steps=1)
    env.reset()
    env._state = np.array([[2.399, 0.0], [3.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    step = env.step(np.array([1, 1]))
    assert step.terminated.tolist() == [True, False]
    assert step.truncated.tolist() == [False, True]


def test_only_ended_rows_are_reset_and_results_stay_with_the_caller() -> None:
    env = build("Pendulum-v1", [0], 3, max_episode_steps=4)
    env.reset()
    env._elapsed[:] = [0, 3, 1]
    step = env.step(np.zeros((3, 1), dtype=np.float32))
    assert step.is_first.tolist() == step.truncated.tolist() == [False, True, False]
    assert step.valid.all()
    assert step.final_obs is not None
    np.testing.assert_array_equal(step.final_obs[[0, 2]], step.obs[[0, 2]])
    assert not np.array_equal(step.final_obs[1], step.obs[1])
    kept = [array.copy() for array in (step.obs, step.final_obs, step.reward)]
    play(env, 5)
    for before, after in zip(kept, (step.obs, step.final_obs, step.reward), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("task", ["CartPole-v1", "MountainCar-v0"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_discrete_actions_may_be_of_any_integer_type(task: str, dtype: type, backend: str) -> None:
    found = []
    for kind in (np.int64, dtype):
        env = make(EnvSettings(id=task, num_envs=2, backend=backend), [0])
        env.reset()
        for _ in range(3):
            step = env.step(np.array([0, 1], dtype=kind))
        found.append(step.obs)
    np.testing.assert_array_equal(*found)


def test_actions_that_do_not_fit_are_refused() -> None:
    pole, pendulum = build("CartPole-v1", [0], 3), build("Pendulum-v1", [0], 3)
    pole.reset()
    pendulum.reset()
    for wrong in (np.zeros(2, dtype=np.int64), np.zeros((3, 1), dtype=np.int64), np.zeros(3, dtype=np.float32)):
        with pytest.raises(ValueError, match=r"Discrete\(2\) takes \(3,\) integers"):
            pole.step(wrong)
    for wrong in (np.array([0, 2, 1]), np.array([0, -1, 1])):
        with pytest.raises(ValueError, match="takes 0 to 1"):
            pole.step(wrong)
    with pytest.raises(ValueError, match=r"takes \(3, 1\)"):
        pendulum.step(np.zeros((3, 2), dtype=np.float32))


def test_listing_tells_what_each_task_is() -> None:
    listed = {info.id: info for info in list_envs()}
    assert set(listed) == set(TASKS)
    for name, info in listed.items():
        env = build(name, [0], 1)
        assert len(info.observation.split(", ")) == env.observation_space.shape[0]
        assert info.max_episode_steps == env.max_episode_steps
        assert set(info.physics) == set(env.physics)
        assert info.description
    assert listed["PendulumNoVel-v1"].action == "1 in [-2, 2]"
    assert listed["CartPoleNoVel-v1"].action == "one of 2"


@pytest.mark.parametrize("task", FULL + MASKED, ids=lambda task: task.id)
def test_episodes_begin_in_the_chosen_rows_only(task) -> None:
    env, other = (build(task.id, [3, 4], 2) for _ in range(2))
    env.reset(), other.reset()
    play(env, 5), play(other, 5)
    assert env.resets_rows
    obs = env.reset_rows(np.array([False, True, False, False]))
    state, untouched = env.get_state(), other.get_state()
    assert state["elapsed"].tolist() == [5, 0, 5, 5]
    kept = [0, 2, 3]
    for name in ("state", "generators"):
        rows = state[name].T if name == "state" else state[name]
        theirs = untouched[name].T if name == "state" else untouched[name]
        np.testing.assert_array_equal(rows[kept], theirs[kept])
        assert not np.array_equal(rows[1], theirs[1])
    np.testing.assert_array_equal(obs, env._observe())
