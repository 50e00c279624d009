"""The three autoreset modes of Gymnasium mean one thing to the learner."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import MountainCarEnv
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from hardy.envs import EnvSettings, GymVectorEnv, make, make_from


class Counter(gymnasium.Env[Any, Any]):
    """Observation (episode, step), in one buffer that is overwritten. Even episodes terminate, odd ones are truncated."""

    def __init__(self, length: int = 3, space: Any = None, observation: Any = None) -> None:
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float64) if observation is None else observation
        self.action_space = Discrete(5, start=-2) if space is None else space
        self.length = length
        self.gain = 1
        self.flag = True
        self._hidden = 1.5
        self.taken: list[Any] = []
        self._buffer = np.array([-1.0, 0.0])
        self.first_draw = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._buffer[0] += 1
        self._buffer[1] = 0
        self.first_draw = float(self.np_random.random())
        return self._buffer, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.taken.append(action)
        self._buffer[1] += 1
        end = self._buffer[1] >= self.length
        even = self._buffer[0] % 2 == 0
        return (
            self._buffer,
            self.gain * float(10 * self._buffer[0] + self._buffer[1]),
            bool(end and even),
            bool(end and not even),
            {},
        )


def lengths(count: int) -> list[Any]:
    return [lambda length=length: Counter(length) for length in (2, 3, 5)[:count]]


def adapter(mode: AutoresetMode | None, count: int = 3, **kwargs: Any) -> GymVectorEnv:
    return GymVectorEnv(SyncVectorEnv(lengths(count), autoreset_mode=mode, **kwargs), list(range(count)))


def transitions(env: GymVectorEnv, row: int, steps: int) -> list[tuple[Any, ...]]:
    """What a learner sees of one row: (obs, reward, terminated, truncated, next obs of the same episode) of valid steps."""
    actions = np.zeros(env.num_envs, dtype=np.int64)
    obs, seen, first = env.reset(), [], True
    for _ in range(steps):
        step = env.step(actions)
        ended = step.terminated[row] or step.truncated[row]
        following = step.final_obs[row] if ended else step.obs[row]
        if step.valid[row]:
            seen.append(
                (
                    tuple(obs[row]),
                    float(step.reward[row]),
                    bool(step.terminated[row]),
                    bool(step.truncated[row]),
                    tuple(following),
                    bool(first),
                )
            )
        else:
            assert step.reward[row] == 0 and not ended
        obs, first = step.obs, step.is_first[row]
    return seen


def expected(length: int, count: int) -> list[tuple[Any, ...]]:
    rows = []
    for index in range(count):
        episode, at = divmod(index, length)
        end = at == length - 1
        reward = 10 * episode + at + 1
        rows.append(
            (
                (float(episode), float(at)),
                float(reward),
                end and episode % 2 == 0,
                end and episode % 2 == 1,
                (float(episode), at + 1.0),
                at == 0,
            )
        )
    return rows


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("copy", [True, False])
def test_every_mode_gives_the_same_transitions(mode: AutoresetMode, copy: bool) -> None:
    if mode is AutoresetMode.SAME_STEP:
        # Gymnasium keeps a reference to the last observation while it resets: the environment must give a fresh array.
        factories = [
            lambda fn=fn: gymnasium.wrappers.TransformObservation(fn(), np.copy, Box(-np.inf, np.inf, (2,), np.float64))
            for fn in lengths(3)
        ]
        build = lambda: GymVectorEnv(SyncVectorEnv(factories, copy=copy, autoreset_mode=mode), [0, 1, 2])  # noqa: E731
    else:
        build = lambda: adapter(mode, copy=copy)  # noqa: E731
    for row, length in enumerate((2, 3, 5)):
        seen = transitions(build(), row, steps=31)
        assert seen == expected(length, len(seen))
        ignored = 31 - len(seen)
        assert ignored == (31 // (length + 1) if mode is AutoresetMode.NEXT_STEP else 0)


def test_next_step_marks_the_ignored_action_and_the_first_observation_together() -> None:
    env = adapter(AutoresetMode.NEXT_STEP, count=1)
    env.reset()
    steps = [env.step(np.zeros(1, dtype=np.int64)) for _ in range(4)]
    assert [bool(step.valid[0]) for step in steps] == [True, True, False, True]
    assert [bool(step.is_first[0]) for step in steps] == [False, False, True, False]
    assert [tuple(step.obs[0]) for step in steps] == [(0, 1), (0, 2), (1, 0), (1, 1)]
    assert [step.final_obs is None for step in steps] == [True, False, True, True]


def test_reset_forgets_a_pending_autoreset() -> None:
    env = adapter(AutoresetMode.NEXT_STEP, count=1)
    env.reset()
    env.step(np.zeros(1, dtype=np.int64))
    assert env.step(np.zeros(1, dtype=np.int64)).terminated[0]
    env.reset()
    assert env.step(np.zeros(1, dtype=np.int64)).valid[0]


class Scripted(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """Two environments that end on the first step; what they report is given."""

    num_envs = 2
    single_observation_space = Box(-1, 1, (1,), np.float32)
    single_action_space = Discrete(2)

    def __init__(self, mode: Any, infos: dict[str, Any] | None = None, flags: tuple[bool, bool] = (True, False)) -> None:
        self.metadata = {} if mode is None else {"autoreset_mode": mode}
        self.infos, self.flags, self.seed = infos or {}, flags, None

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.seed = seed
        return np.zeros((2, 1), dtype=np.float32), {}

    def step(self, actions: Any) -> Any:
        terminated, truncated = self.flags
        obs = np.array([[np.nan], [0.5]])
        return obs, np.array([np.inf, 1e300]), np.array([terminated] * 2), np.array([truncated] * 2), dict(self.infos)


@pytest.mark.parametrize("mode", [None, "sometimes", 3])
def test_missing_or_unknown_mode_is_refused(mode: Any) -> None:
    with pytest.raises(
        ValueError, match=r"must be one of AutoresetMode\.NEXT_STEP, AutoresetMode\.SAME_STEP, AutoresetMode\.DISABLED"
    ):
        GymVectorEnv(Scripted(mode), [0, 1])


def test_mode_may_be_given_by_its_value() -> None:
    env = GymVectorEnv(Scripted("NextStep"), [0, 1])
    env.reset()
    env.step(np.zeros(2, dtype=np.int64))
    again = env.step(np.zeros(2, dtype=np.int64))
    assert not again.valid.any() and not again.terminated.any(), "what comes with an ignored action is dropped"
    assert again.reward.tolist() == [0, 0]


def test_same_step_without_last_observation_is_refused() -> None:
    env = GymVectorEnv(Scripted(AutoresetMode.SAME_STEP, infos={"final_info": {}}), [0, 1])
    env.reset()
    with pytest.raises(ValueError, match=r"infos has no 'final_obs' \(only: final_info\)"):
        env.step(np.zeros(2, dtype=np.int64))


def test_same_step_takes_the_last_observations_as_one_array() -> None:
    env = GymVectorEnv(Scripted(AutoresetMode.SAME_STEP, infos={"final_obs": np.array([[0.25], [0.75]])}), [0, 1])
    env.reset()
    step = env.step(np.zeros(2, dtype=np.int64))
    assert step.final_obs is not None
    assert step.final_obs[:, 0].tolist() == [0.25, 0.75]


def test_not_finite_values_are_passed_on() -> None:
    env = GymVectorEnv(Scripted(AutoresetMode.NEXT_STEP, flags=(False, False)), [0, 1])
    env.reset()
    step = env.step(np.zeros(2, dtype=np.int64))
    assert np.isnan(step.obs[0, 0])
    assert step.reward.tolist() == [np.inf, np.inf], "what float32 cannot hold is infinite"


def test_both_flags_mean_terminated() -> None:
    env = GymVectorEnv(Scripted(AutoresetMode.NEXT_STEP, flags=(True, True)), [0, 1])
    env.reset()
    step = env.step(np.zeros(2, dtype=np.int64))
    assert step.terminated.all() and not step.truncated.any()


def test_seeds_reach_every_row_once() -> None:
    """The first reset seeds each row by itself; the second goes on, so it brings other episodes."""
    make_env = lambda: GymVectorEnv(SyncVectorEnv(lengths(3), autoreset_mode=AutoresetMode.DISABLED), [2**40 + 1, 2, 3])  # noqa: E731
    env, twin = make_env(), make_env()
    draws = []
    for each in (env, twin):
        each.reset()
        first = each._env.unwrapped.get_attr("first_draw")
        each.reset()
        draws.append((first, each._env.unwrapped.get_attr("first_draw")))
    assert draws[0] == draws[1]
    assert len({*draws[0][0], *draws[0][1]}) == 6
    shared = Scripted(AutoresetMode.NEXT_STEP)
    GymVectorEnv(shared, [2**40 + 5, 6]).reset()
    assert shared.seed == 5, "a vector environment of another kind knows one seed, and many keep 32 bits"


def test_number_of_seeds_must_fit() -> None:
    with pytest.raises(ValueError, match="3 seeds for 2 environments"):
        GymVectorEnv(Scripted(AutoresetMode.NEXT_STEP), [0, 1, 2])


def test_discrete_actions_are_counted_from_zero() -> None:
    env = adapter(AutoresetMode.DISABLED, count=2)
    env.reset()
    env.step(np.array([0, 4]))
    assert [single.taken for single in env._env.unwrapped.envs] == [[-2], [2]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("high", [1.0, np.inf])
def test_continuous_actions_are_shaped_and_clipped(high: float, dtype: Any) -> None:
    space = Box(-high, high, (2, 3), dtype)
    env = GymVectorEnv(SyncVectorEnv([lambda: Counter(space=space)], autoreset_mode=AutoresetMode.DISABLED), [0])
    env.reset()
    env.step(np.array([[-9, -1, -0.5, 0.5, 1, 9]], dtype=np.float64))
    taken = env._env.unwrapped.envs[0].taken[0]
    assert taken.dtype == dtype
    edge = min(high, 9.0)
    np.testing.assert_array_equal(taken, [[-edge, -1, -0.5], [0.5, 1, edge]])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"space": MultiDiscrete([2, 3])},
            r"action space MultiDiscrete\(\[2 3\]\) is not supported: it must be Discrete or a Box",
        ),
        ({"space": Box(0, 5, (2,), np.int64)}, "action space Box.* is not supported"),
        ({"observation": Dict({"a": Discrete(2)})}, r"observation space Dict.* is not supported: it must be a Box"),
    ],
)
def test_other_spaces_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GymVectorEnv(SyncVectorEnv([lambda: Counter(**kwargs)], autoreset_mode=AutoresetMode.DISABLED), [0])


def test_observations_of_any_shape_and_type_become_float32() -> None:
    space = Box(0, 255, (7, 5, 3), np.uint8)

    def image() -> Any:
        return gymnasium.wrappers.TransformObservation(Counter(), lambda obs: np.full(space.shape, obs[1], np.uint8), space)

    env = GymVectorEnv(SyncVectorEnv([image, image], autoreset_mode=AutoresetMode.DISABLED), [0, 1])
    assert env.observation_space == Box(0, 255, (7, 5, 3), np.float32)
    env.reset()
    obs = env.step(np.zeros(2, dtype=np.int64)).obs
    assert obs.shape == (2, 7, 5, 3) and obs.dtype == np.float32 and (obs == 1).all()


def test_results_stay_with_the_caller() -> None:
    """A vector environment may reuse its buffer; what a step returned must not change with the next."""
    vector = SyncVectorEnv([lambda: gymnasium.make("Pendulum-v1")], copy=False, autoreset_mode=AutoresetMode.DISABLED)
    env = GymVectorEnv(vector, [0])
    first = env.reset()
    before = first.copy()
    env.step(np.ones((1, 1), dtype=np.float32))
    np.testing.assert_array_equal(first, before)


def test_state_cannot_be_saved_and_says_so() -> None:
    env = adapter(AutoresetMode.DISABLED)
    assert env.get_state() is None
    with pytest.raises(ValueError, match="GymVectorEnv cannot restore a state"):
        env.set_state({})


def test_physics_are_the_numeric_attributes() -> None:
    env = adapter(AutoresetMode.DISABLED, count=2)
    assert dict(env.physics) == {"length": 2.0, "gain": 1.0, "first_draw": 0.0}
    env.reset()
    env.set_physics("gain", np.array([2.0, -3.0]))
    assert env.step(np.zeros(2, dtype=np.int64)).reward.tolist() == [2.0, -3.0]
    with pytest.raises(ValueError, match=r"physics = 'gian': allowed are first_draw, gain, length \(did you mean 'gain'\?\)"):
        env.set_physics("gian", np.ones(2))


def test_environments_in_other_processes() -> None:
    env = make_from(AsyncVectorEnv(lengths(2)), [4])
    try:
        assert not env.physics
        env.reset()
        steps = [env.step(np.zeros(2, dtype=np.int64)) for _ in range(3)]
        assert steps[1].terminated.tolist() == [True, False]
        assert steps[2].valid.tolist() == [False, True]
    finally:
        env.close()


def test_gymnasium_id_with_arguments_and_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gymnasium.registry, "Valley-v0", EnvSpec("Valley-v0", entry_point=MountainCarEnv))
    settings = EnvSettings(id="Valley-v0", num_envs=2, kwargs={"goal_velocity": 0.03}, max_episode_steps=5)
    env = make(settings, [1])
    assert env.physics["goal_velocity"] == 0.03
    env.reset()
    steps = [env.step(np.zeros(2, dtype=np.int64)) for _ in range(6)]
    assert [step.truncated.tolist() for step in steps] == [[False] * 2] * 4 + [[True] * 2, [False] * 2]
    assert all(step.valid.all() for step in steps)
    env.close()


def test_members_are_independent_behind_the_adapter() -> None:
    settings = EnvSettings(id="Acrobot-v1", num_envs=2, max_episode_steps=4)
    together, seeds = make(settings, [3, 5, 7]), [3, 5, 7]
    alone = [make(settings, [seed]) for seed in seeds]
    np.testing.assert_array_equal(together.reset(), np.concatenate([env.reset() for env in alone]))
    rng = np.random.default_rng(0)
    for _ in range(11):
        actions = rng.integers(0, 3, 6)
        parts = [env.step(actions[2 * p : 2 * p + 2]) for p, env in enumerate(alone)]
        np.testing.assert_array_equal(together.step(actions).obs, np.concatenate([part.obs for part in parts]))


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
def test_episodes_begin_in_the_chosen_rows_only(mode: AutoresetMode, kind: Any) -> None:
    env = GymVectorEnv(kind(lengths(3), autoreset_mode=mode), [0, 1, 2])
    try:
        before = env.reset()
        env.step(np.zeros(3, dtype=np.int64))
        assert env.resets_rows
        obs = env.reset_rows(np.array([False, False, True]))
        assert obs[2].tolist() == [before[2, 0] + 1, 0]
        step = env.step(np.zeros(3, dtype=np.int64))
        assert step.valid.all()
        assert step.obs[2].tolist() == [before[2, 0] + 1, 1]
        assert (step.terminated | step.truncated).tolist() == [True, False, False]  # rows 0 and 1 went on from where they were
    finally:
        env.close()


def test_a_row_that_ended_and_is_begun_anew_by_hand_is_not_reset_again() -> None:
    env = adapter(AutoresetMode.NEXT_STEP)
    env.reset()
    for _ in range(2):
        step = env.step(np.zeros(3, dtype=np.int64))
    assert step.terminated[0] | step.truncated[0]
    episode = env.reset_rows(np.array([True, False, False]))[0, 0]
    step = env.step(np.zeros(3, dtype=np.int64))
    assert step.valid[0] and not step.is_first[0]
    assert step.obs[0].tolist() == [episode, 1]


def test_environments_that_cannot_reset_rows_say_so() -> None:
    class Whole(SyncVectorEnv):
        @property
        def unwrapped(self) -> Any:
            return object()

    env = GymVectorEnv(Whole(lengths(2), autoreset_mode=AutoresetMode.SAME_STEP), [0, 1])
    assert not env.resets_rows
    with pytest.raises(ValueError, match="GymVectorEnv cannot start an episode in some rows only"):
        env.reset_rows(np.array([True, False]))
