"""The built-in tasks as tensors: step by step those of arrays, starts reproducible, state exact, nothing asked of the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import stats

from hardy.envs import DriftSettings, EnvSettings, TensorEnv, make
from hardy.envs.classic import CartPole, MountainCar, MountainCarContinuous, Pendulum
from hardy.envs.tasks import TASKS
from hardy.splitmix import split_mix, uniform

TENSOR_TASKS = [task for task in TASKS.values() if task.tensors is not None]
BOUNDS = {
    CartPole: ((-2.6, 2.6), (-3, 3), (-0.25, 0.25), (-3, 3)),
    Pendulum: ((-20, 20), (-8, 8)),
    MountainCar: ((-1.2, 0.6), (-0.07, 0.07)),
    MountainCarContinuous: ((-1.2, 0.6), (-0.07, 0.07)),
}


def build(task_id, seeds, num_envs, backend="torch", device="cpu", **changes):
    return make(EnvSettings(id=task_id, num_envs=num_envs, backend=backend, **changes), seeds, device=device)


def random_actions(env, rng):
    if isinstance(env.action_space, Box):
        return rng.uniform(1.5 * env.action_space.low, 1.5 * env.action_space.high, (env.num_envs, 1)).astype(np.float32)
    return rng.integers(0, int(env.action_space.n), env.num_envs)


def play(env, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [env.step(random_actions(env, rng)) for _ in range(steps)]


def assert_same(one, other, rows=slice(None), tolerance=0.0):
    np.testing.assert_array_equal(one.is_first, one.terminated | one.truncated)
    for name in ("obs", "reward", "terminated", "truncated", "is_first", "valid"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name)[rows], rtol=tolerance, atol=tolerance, err_msg=name)
    ended = one.is_first
    if ended.any():
        np.testing.assert_allclose(one.final_obs[ended], other.final_obs[rows][ended], rtol=tolerance, atol=tolerance)


def twins(task_id, rows, state, elapsed=0, device="cpu", **changes):
    """The task as arrays and as tensors, both in one state ``[S, rows]``."""
    arrays, tensors = (build(task_id, [0], rows, backend, device, **changes) for backend in ("numpy", "torch"))
    for env in (arrays, tensors):
        env.reset()
        env.set_state({**env.get_state(), "state": state, "elapsed": np.full(rows, elapsed)})
    return arrays, tensors


@pytest.mark.parametrize("task", TENSOR_TASKS, ids=lambda task: task.id)
@given(data=st.data())
@hypothesis_settings(deadline=None, max_examples=12)
def test_every_step_equals_that_of_the_arrays_in_double_precision(task, data):
    """From any state with any action, at the time limit too, and with any physics: state, observation, reward and end."""
    rows = 5
    state = np.array([[data.draw(st.floats(low, high)) for _ in range(rows)] for low, high in BOUNDS[task.batched]])
    limit = 7
    arrays, tensors = twins(task.id, rows, state, data.draw(st.sampled_from([0, limit - 1])), max_episode_steps=limit)
    for name, value in task.batched.default_physics.items():
        factors = np.array([data.draw(st.floats(0.5, 2.0)) for _ in range(rows)])
        for env in (arrays, tensors):
            env.set_physics(name, value * factors)
    actions = random_actions(arrays, np.random.default_rng(data.draw(st.integers(0, 10**6))))
    one, other = arrays.step(actions), tensors.step(actions)
    ended = one.terminated | one.truncated
    for name in ("terminated", "truncated", "is_first", "valid"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_allclose(one.reward, other.reward, rtol=1e-6)
    assert (one.final_obs is None) == (other.final_obs is None)
    if one.final_obs is not None:
        np.testing.assert_allclose(one.final_obs[ended], other.final_obs[ended], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(one.obs[~ended], other.obs[~ended], rtol=1e-6, atol=1e-7)
    after = [env.get_state() for env in (arrays, tensors)]
    np.testing.assert_allclose(after[0]["state"][:, ~ended], after[1]["state"][:, ~ended], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(after[0]["elapsed"], after[1]["elapsed"])


@pytest.mark.parametrize("task_id", ["MountainCar-v0", "MountainCarContinuous-v0"])
def test_a_car_stops_at_the_left_wall_and_arrives_only_with_speed_forward(task_id, device):
    goal = TASKS[task_id].batched.goal
    arrays, tensors = twins(task_id, 3, np.array([[-1.19, goal + 0.02, goal - 0.02], [-0.07, -0.005, 0.05]]), device=device)
    actions = np.ones(3, dtype=np.int64) if task_id == "MountainCar-v0" else np.zeros((3, 1), dtype=np.float32)
    one, other = arrays.step(actions), tensors.step(actions)
    assert other.terminated.tolist() == [False, False, True]
    np.testing.assert_array_equal(other.obs[0], np.array([-1.2, 0.0], dtype=np.float32))
    np.testing.assert_array_equal(one.reward, other.reward)


@pytest.mark.parametrize("task", TENSOR_TASKS, ids=lambda task: task.id)
def test_a_whole_episode_equals_that_of_the_arrays(task, device):
    start = np.random.default_rng(3).uniform(-0.04, 0.04, (task.batched.state_size, 4))
    limit = 150
    arrays, tensors = twins(task.id, 4, start, device=device, max_episode_steps=limit)
    assert build(task.id, [0], 1).max_episode_steps == task.batched.published_time_limit
    assert arrays.observation_space == tensors.observation_space
    assert arrays.action_space == tensors.action_space
    assert arrays.max_episode_steps == tensors.max_episode_steps
    running = np.ones(4, dtype=bool)
    rng = np.random.default_rng(0)
    for _ in range(limit):
        actions = random_actions(arrays, rng)
        one, other = arrays.step(actions), tensors.step(actions)
        for name in ("terminated", "truncated"):
            np.testing.assert_array_equal(getattr(one, name)[running], getattr(other, name)[running])
        np.testing.assert_allclose(one.reward[running], other.reward[running], rtol=1e-5, atol=1e-6)
        running &= ~one.is_first
        np.testing.assert_allclose(one.obs[running], other.obs[running], rtol=1e-5, atol=1e-6)
    assert not running.any()


STARTS = {
    CartPole: [(-0.05, 0.05)] * 4,
    Pendulum: [(-np.pi, np.pi), (-1.0, 1.0)],
    MountainCar: [(-0.6, -0.4)],
    MountainCarContinuous: [(-0.6, -0.4)],
}


@pytest.mark.parametrize("task", [task for task in TENSOR_TASKS if task.kept is None], ids=lambda task: task.id)
def test_starts_are_distributed_as_the_task_says_over_rows_and_over_episodes(task):
    many_rows, many_episodes = build(task.id, [0], 4000), build(task.id, [0], 4)
    many_rows.reset()
    states = [many_rows.get_state()["state"]]
    rows = []
    for _ in range(1000):
        many_episodes.reset()
        rows.append(many_episodes.get_state()["state"])
    states.append(np.concatenate(rows, axis=1))
    for state in states:
        for entry, (low, high) in zip(state, STARTS[task.batched], strict=False):
            assert stats.kstest(entry, "uniform", (low, high - low)).pvalue > 1e-3
        varying = state[: len(STARTS[task.batched])]
        assert (np.abs(np.corrcoef(varying) - np.eye(len(varying))) < 0.08).all()
        assert (state[len(varying) :] == 0).all()
        assert len(np.unique(state[0])) == 4000
        fractions = [(entry - low) / (high - low) for entry, (low, high) in zip(state, STARTS[task.batched], strict=False)]
        assert len(np.unique(np.round(fractions, 12))) == varying.size, "no number serves two entries or episodes"
    successive = np.array([row[0] for row in rows])  # [episode, row]
    assert np.abs(np.corrcoef(successive[:-1, 0], successive[1:, 0])[0, 1]) < 0.15


def test_uniform_numbers_lie_below_one_whatever_the_bits():
    bits = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    assert uniform(bits).tolist() == [0.0, 1 - 2**-53, 0.5 - 2**-53, 0.5]


def test_a_key_of_its_own_for_each_number_gives_what_single_keys_give():
    counter, keys = torch.arange(5), torch.tensor([0, 1, 2**40, 2**63 - 1, 7])
    expected = [int(split_mix(counter[k : k + 1], int(keys[k]))) for k in range(5)]
    assert split_mix(counter, keys).tolist() == expected


@pytest.mark.parametrize("task", TENSOR_TASKS, ids=lambda task: task.id)
def test_population_of_three_equals_three_of_one(task, device):
    seeds, per_member = [11, 13, 17], 2
    together = build(task.id, seeds, per_member, device=device, max_episode_steps=9)
    alone = [build(task.id, [seed], per_member, device=device, max_episode_steps=9) for seed in seeds]
    first = together.reset()
    assert len(np.unique(first[:, 0])) == len(first), "every row has its own starts"
    for member, env in enumerate(alone):
        np.testing.assert_array_equal(env.reset(), first[member * per_member : (member + 1) * per_member])
    rng = np.random.default_rng(0)
    for _ in range(29):
        actions = random_actions(together, rng)
        step = together.step(actions)
        for member, env in enumerate(alone):
            rows = slice(member * per_member, (member + 1) * per_member)
            assert_same(env.step(actions[rows]), step, rows)


def test_a_row_does_not_depend_on_how_many_environments_its_member_has():
    np.testing.assert_array_equal(build("CartPole-v1", [7], 2).reset(), build("CartPole-v1", [7], 5).reset()[:2])


@pytest.mark.parametrize("task", TENSOR_TASKS, ids=lambda task: task.id)
def test_masked_task_is_the_full_task_seen_in_part(task, device):
    full = build(task.id.replace("NoVel", ""), [5], 3, device=device, max_episode_steps=7)
    masked = build(task.id, [5], 3, device=device, max_episode_steps=7)
    kept = list(range(full.observation_space.shape[0])) if task.kept is None else list(task.kept)
    np.testing.assert_array_equal(masked.reset(), full.reset()[:, kept])
    for seen, whole in zip(play(masked, 23), play(full, 23), strict=True):
        np.testing.assert_array_equal(seen.obs, whole.obs[:, kept])
        if seen.final_obs is not None:
            np.testing.assert_array_equal(seen.final_obs, whole.final_obs[:, kept])


DRIFTS = {
    "none": None,
    "sudden physics": {"kind": "physics", "every": 9, "ranges": {}},
    "gradual physics": {"kind": "physics", "every": 12, "over": 6, "ranges": {}},
    "sudden order": {"kind": "permute", "every": 9},
    "gradual order": {"kind": "permute", "every": 12, "over": 8},
}


def drift_of(name, task):
    drift = DRIFTS[name]
    if drift is None:
        return {}
    ranges = {key: (0.7 * value, 1.4 * value) for key, value in task.batched.default_physics.items()}
    return {"drift": DriftSettings(**{**drift, "ranges": ranges if drift["kind"] == "physics" else {}})}


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("task_id", ["CartPole-v1", "PendulumNoVel-v1"])
def test_state_round_trip_is_exact(task_id, drift, device):
    changes = drift_of(drift, TASKS[task_id])
    env = build(task_id, [1, 2], 2, device=device, max_episode_steps=11, **changes)
    env.reset()
    if drift == "none":
        for name in env.physics:
            env.set_physics(name, np.linspace(0.9, 1.1, 4) * env.physics[name])
    play(env, 17)
    saved = env.get_state()
    rest = play(env, 31, seed=1)
    other = build(task_id, [8, 9], 2, device=device, max_episode_steps=11, **({} if drift == "none" else changes))
    if drift != "none":  # what a change brings follows from the seed, which the state does not hold
        other = build(task_id, [1, 2], 2, device=device, max_episode_steps=11, **changes)
    for _ in range(2):  # the saved state must survive its use
        other.set_state(saved)
        for one, two in zip(rest, play(other, 31, seed=1), strict=True):
            assert_same(one, two)


@pytest.mark.parametrize("drift", [name for name in DRIFTS if name != "none"])
@pytest.mark.parametrize("frozen", [None, 13])
def test_a_drifting_task_drifts_as_its_twin_of_arrays(drift, frozen, device):
    task = TASKS["CartPole-v1"]
    start = np.random.default_rng(3).uniform(-0.01, 0.01, (4, 6))
    arrays, tensors = (
        make(
            EnvSettings(id=task.id, num_envs=3, backend=backend, **drift_of(drift, task)),
            [4, 5],
            drift_step=frozen,
            device=device,
        )
        for backend in ("numpy", "torch")
    )
    assert isinstance(tensors, TensorEnv)
    assert tensors.observation_space == arrays.observation_space
    for env in (arrays, tensors):
        env.reset()
        saved = env.get_state()
        env.set_state({**saved, "env": {**saved["env"], "state": start}})
    changes = set()
    for step in range(18):
        actions = np.tile([step % 2, (step + 1) % 2, step % 2], 2)
        one, other = arrays.step(actions), tensors.step(actions)
        assert not one.is_first.any()
        assert_same(one, other, tolerance=2e-6)
        np.testing.assert_array_equal(arrays.steps, tensors.steps)
        np.testing.assert_array_equal(arrays.changes, tensors.changes)
        changes |= set(arrays.changes.tolist())
    last = 54 // DRIFTS[drift]["every"]
    assert changes == (set(range(last + 1)) if frozen is None else {1})


def test_state_of_other_sizes_and_of_the_other_backend_is_refused():
    env = build("CartPole-v1", [1], 3)
    with pytest.raises(ValueError, match=r"'state' has shape \(4, 2\): \(4, 3\) is needed"):
        env.set_state(build("CartPole-v1", [1], 2).get_state())
    before = env.get_state()
    with pytest.raises(ValueError, match="'keys' has shape None"):
        env.set_state(build("CartPole-v1", [1], 3, "numpy").get_state())
    for name, value in before.items():
        np.testing.assert_array_equal(env.get_state()[name], value)


def test_impossible_physics_and_actions_are_refused():
    env = build("CartPole-v1", [0], 2)
    env.reset()
    with pytest.raises(ValueError, match=r"physics = 'lenght': allowed are force_mag, .*did you mean 'length'"):
        env.set_physics("lenght", np.ones(2))
    with pytest.raises(ValueError, match=r"'length' = 0\.0 … 1\.0: must be finite and above 0"):
        env.set_physics("length", np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="takes 0 to 1"):
        env.step(np.array([0, 2]))


@pytest.mark.parametrize("task", TENSOR_TASKS, ids=lambda task: task.id)
def test_episodes_begin_in_the_chosen_rows_only(task, device):
    env, other = (build(task.id, [3, 4], 2, device=device) for _ in range(2))
    for one in (env, other):
        one.reset()
        play(one, 5)
    assert env.resets_rows
    env.reset_rows(np.array([False, True, False, False]))
    state, untouched = env.get_state(), other.get_state()
    assert state["elapsed"].tolist() == [5, 0, 5, 5]
    assert (state["episodes"] - untouched["episodes"]).tolist() == [0, 1, 0, 0]
    np.testing.assert_array_equal(state["state"][:, [0, 2, 3]], untouched["state"][:, [0, 2, 3]])
    assert not np.array_equal(state["state"][:, 1], untouched["state"][:, 1])


@pytest.mark.parametrize("drift", DRIFTS)
def test_the_state_keeps_its_addresses_so_that_a_captured_step_stays_valid(drift):
    env = build("CartPole-v1", [0], 4, max_episode_steps=5, **drift_of(drift, TASKS["CartPole-v1"]))
    addresses = []
    for _ in range(2):
        env.reset()
        play(env, 23)
        env.set_state(env.get_state())
        inner = env if drift == "none" else env._env
        tensors = [value for one in (env, inner) for value in vars(one).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) >= 5
        addresses.append([tensor.data_ptr() for tensor in tensors])
    assert addresses[0] == addresses[1]


@pytest.mark.parametrize(
    ("task_id", "backend", "device", "expected"),
    [
        ("CartPoleNoVel-v1", "auto", "cpu", "numpy"),
        ("CartPoleNoVel-v1", "auto", "cuda", "torch"),
        ("hardy:CartPoleNoVel-v1", "auto", "cuda", "torch"),
        ("CartPoleNoVel-v1", "numpy", "cuda", "numpy"),
        ("CartPoleNoVel-v1", "torch", "cpu", "torch"),
        ("WindyCliff-v0", "auto", "cuda", "numpy"),
        ("Acrobot-v1", "auto", "cuda", "numpy"),
    ],
)
def test_the_backend_follows_the_device_where_it_is_not_chosen(task_id, backend, device, expected):
    assert EnvSettings(id=task_id, backend=backend).backend_on(device) == expected


@pytest.mark.parametrize("task_id", ["WindyCliff-v0", "Acrobot-v1"])
def test_tensors_of_a_task_that_has_none_are_refused(task_id):
    with pytest.raises(ValueError, match=rf"env\.backend = 'torch': {task_id} does not exist as tensors; .*CartPoleNoVel-v1"):
        build(task_id, [0], 2)
    assert not isinstance(build(task_id, [0], 2, "auto", "cuda"), TensorEnv)
