"""From ids, factories and vector environments to one batched environment; what is refused, and how."""

from __future__ import annotations

import inspect
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv
from pydantic import ValidationError

from hardy.envs import Drift, DriftSettings, EnvSettings, GymVectorEnv, make, make_from
from hardy.envs.classic import CartPole


def test_known_id_gives_the_vectorised_twin() -> None:
    for name in ("CartPole-v1", "gymnasium:CartPole-v1", "hardy:CartPoleNoVel-v1"):
        assert isinstance(make(EnvSettings(id=name), [0]), CartPole)
    assert make(EnvSettings(id="CartPole-v1", num_envs=3), [0, 1]).num_envs == 6
    assert make(EnvSettings(id="CartPole-v1", num_envs=3), [0, 1], 5).num_envs == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CartPoleNovel-v1", "did you mean 'CartPoleNoVel-v1'"),
        ("cartpole", "did you mean 'CartPole-v"),
        ("CartPole", "did you mean 'CartPole-v"),
        ("no_such_module:Thing-v0", "No module named 'no_such_module'"),
        ("gymnasium:Thing-v0", "no such environment is registered"),
    ],
)
def test_unknown_id_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"env\.id = '{name}': .*{message}"):
        make(EnvSettings(id=name), [0])


def test_built_in_takes_no_arguments() -> None:
    with pytest.raises(ValueError, match=r"env\.kwargs = {'render_mode': 'human'}: the built-in CartPole-v1 takes none"):
        make(EnvSettings(id="CartPole-v1", kwargs={"render_mode": "human"}), [0])


@pytest.mark.parametrize("wrong", [{"num_envs": 0}, {"max_episode_steps": 0}, {"num_envs": 1.5}, {"nums": 1}, {"id": 3}])
def test_bad_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EnvSettings(**{"id": "CartPole-v1", **wrong})


def test_no_member_or_no_environment_is_refused() -> None:
    with pytest.raises(ValueError, match="num_envs = 0"):
        make(EnvSettings(id="CartPole-v1"), [0], 0)
    with pytest.raises(ValueError, match=r"seeds = \[\]"):
        make(EnvSettings(id="CartPole-v1"), [])


def test_from_an_id() -> None:
    env = make_from("PendulumNoVel-v1", [0, 1], num_envs=3)
    assert env.num_envs == 6
    np.testing.assert_array_equal(env.reset(), make(EnvSettings(id="PendulumNoVel-v1", num_envs=3), [0, 1]).reset())


def test_every_member_gets_every_factory() -> None:
    env = make_from([lambda g=g: gymnasium.make("Pendulum-v1", g=g) for g in (1.0, 2.0, 3.0)], [0, 1])
    assert isinstance(env, GymVectorEnv)
    assert [single.unwrapped.g for single in env._env.unwrapped.envs] == [1.0, 2.0, 3.0] * 2
    obs = env.reset()
    assert len(np.unique(obs[:, 0])) == 6
    np.testing.assert_array_equal(obs[3:], make_from([lambda: gymnasium.make("Pendulum-v1")] * 3, [1]).reset())


def test_rows_of_a_vector_environment_are_shared_out() -> None:
    vector = SyncVectorEnv([lambda: gymnasium.make("CartPoleNoVel-v1")] * 6)
    assert make_from(vector, [0, 1, 2]).reset().shape == (6, 2)
    with pytest.raises(ValueError, match="6 environments: they cannot be shared equally by 4 members"):
        make_from(vector, [0, 1, 2, 3])


@pytest.mark.parametrize("wrong", [[], [1], ["CartPole-v1"], 3, gymnasium.make])
def test_anything_else_is_refused(wrong: Any) -> None:
    unchecked = inspect.unwrap(make_from)  # the tests' own type checker would refuse it first, in other words
    with pytest.raises(TypeError, match=r"must be an id, a gymnasium\.vector\.VectorEnv, or a list of functions"):
        unchecked(wrong, [0])


def test_drift_goes_with_every_way_of_making() -> None:
    drift = DriftSettings(kind="physics", every=4, ranges={"g": (1.0, 2.0)})
    for env in (
        make_from("Pendulum-v1", [0], 2, drift=drift),
        make_from([lambda: gymnasium.make("Pendulum-v1")], [0], drift=drift),
    ):
        assert isinstance(env, Drift)
    with pytest.raises(ValueError, match="2 drift_seeds for 1 members"):
        make(EnvSettings(id="Pendulum-v1", num_envs=2, drift=drift), [0], drift_seeds=[1, 2])
