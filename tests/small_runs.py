"""Small runs and small environments for the tests of training."""

from __future__ import annotations

import copy

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from hardy.config import settings_from_dict
from hardy.envs import BatchedEnv, EnvStep, make_from
from hardy.population import leaves
from hardy.settings import RunSettings
from hardy.trainer import Trainer

TINY = {
    "threads": 1,
    "env": {"id": "CartPoleNoVel-v1", "num_envs": 5, "max_episode_steps": 7},
    "policy": {"memory_size": 5, "encoder": [7]},
    "critic": {"quantiles": 3},
    "ppo": {"n_steps": 11, "n_epochs": 2, "n_minibatches": 2},
    "vgs": {"warmup_steps": 1},
}

EVERYTHING = {
    "env": {"drift": {"kind": "physics", "every": 40, "ranges": {"gravity": [5.0, 15.0]}}},
    "policy": {"memory": "lstm", "layer_norm": True},
    "optimizer": {"name": "AdaptiveUPGD", "lr": 0.1, "sigma": 0.1},
    "ppo": {"ent_coef": 0.01, "target_kl": 0.003, "lr_schedule": "linear", "clip_schedule": "cosine"},
}
"""Every part that has a switch, switched on."""


def tiny(*changes, **sections):
    """Settings of a run of a fraction of a second: `TINY`, then each of ``changes``, then ``sections``."""
    tree = copy.deepcopy(TINY)
    for change in (*changes, sections):
        for name, value in change.items():
            tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return settings_from_dict(RunSettings, tree)


def snapshot(state):
    """A copy of every leaf by its path."""
    return {leaf.path: leaf.tensor.clone() for leaf in leaves(state)}


def assert_same(found, expected, tolerance=0.0):
    """Compare two snapshots, bit for bit unless a tolerance is given; NaN equals NaN."""
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        limits = {"atol": tolerance, "rtol": tolerance} if value.is_floating_point() else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(found[path], value, **limits, equal_nan=True, msg=lambda text, path=path: f"{path}: {text}")


def member(state, index):
    """A snapshot's rows of one member, as those of a population of one."""
    return {path: value[index : index + 1] for path, value in state.items()}


@torch.no_grad()
def shake_(policy, scale=0.3):
    """Move every weight by random numbers of each member's own, so that nothing is at its special initial value."""
    for parameter in policy.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=scale)


class Scripted(gymnasium.Env):
    """Episodes of given lengths and kinds of end; observations and rewards follow from (row, episode, step) alone.

    Args:
        script: ``(length, truncated)`` of each episode, repeated for ever.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(5)

    def __init__(self, row, script):
        self.row, self.script = row, script
        self.episode = -1

    def _obs(self):
        phase = 1.0 + 0.7 * self.row + 1.9 * self.episode + 0.4 * self.t
        return np.array([np.sin(phase), np.cos(1.3 * phase), np.sin(2.1 * phase)], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        length, truncated = self.script[self.episode % len(self.script)]
        ended = self.t == length
        return self._obs(), float(np.cos(self.row + self.episode + self.t)), ended and not truncated, ended and truncated, {}


TERMINATED, TRUNCATED = False, True


def scripted(scripts, mode=AutoresetMode.DISABLED, members=1):
    """A batched environment with one row per script, the same rows for every member."""
    factories = [lambda row=row, script=script: Scripted(row, script) for row, script in enumerate(list(scripts) * members)]
    return make_from(SyncVectorEnv(factories, autoreset_mode=mode), list(range(members)))


class Recorder(BatchedEnv):
    """Passes everything on and keeps each step."""

    def __init__(self, env):
        self.env, self.steps = env, []
        self.num_envs, self.observation_space, self.action_space = env.num_envs, env.observation_space, env.action_space

    def reset(self):
        return self.env.reset()

    def step(self, actions):
        self.steps.append(self.env.step(actions))
        return self.steps[-1]


class Primes(BatchedEnv):
    """Noise for observations and rewards, in sizes of which each is another prime: O = 13, A = 17."""

    def __init__(self, rows, continuous):
        self.num_envs, self.rng = rows, np.random.default_rng(0)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (13,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (17,), np.float32) if continuous else gymnasium.spaces.Discrete(17)

    def reset(self):
        return self.rng.normal(size=(self.num_envs, 13)).astype(np.float32)

    def step(self, actions):
        assert actions.shape == (self.num_envs, *self.action_space.shape)
        kind = self.rng.random(self.num_envs)
        terminated, truncated = kind < 0.1, kind > 0.9
        reward = self.rng.normal(size=self.num_envs).astype(np.float32)
        ended = terminated | truncated
        return EnvStep(self.reset(), reward, terminated, truncated, self.reset(), ended, np.ones(self.num_envs, dtype=bool))


def trainer(settings, seeds=(3,), dtype=torch.float64, env=None):
    """A trainer of members with these seeds, in double precision unless asked otherwise."""
    return Trainer(settings, list(seeds), env=env, dtype=dtype)


def assert_nan_stays_with_its_member(settings):
    """Weights of one of three members that are not numbers: it skips its updates, the others stay bit-identical.

    Returns:
        The state of the population that was hurt.
    """
    runs = [trainer(settings, [1, 2, 3]) for _ in range(2)]
    next(iter(runs[1].state.parameters.values()))[1].fill_(torch.nan)
    for _ in range(2):
        for run in runs:
            metrics = run.iterate(1000)
    assert metrics["train/skipped_updates"].tolist() == [0, 4, 0]
    clean, hurt = (snapshot(run.state) for run in runs)
    for p in (0, 2):
        assert_same(member(hurt, p), member(clean, p))
    return hurt


def rollout_shapes(P, T, E, O, action, S, K):  # noqa: E741
    """Shapes of a rollout's fields."""
    block = (P, T, E)
    names = ("is_first", "log_prob", "value", "next_value", "reward", "terminated", "truncated", "valid")
    special = {"raw_obs": (*block, O), "obs": (*block, O), "action": (*block, *action), "initial_state": (P, E, S),
               "critic": (*block, K), "next_critic": (*block, K)}  # fmt: skip
    return {**special, **dict.fromkeys(names, block)}
