"""Worker: trains Sample Factory's PPO on the common work and reports its speed; `benchmarks.worker` has the protocol.

Serial and synchronous: one process samples and learns in turn, which is the common work. Its asynchronous mode trains on
experience of older weights, which is other work.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import gymnasium as gym
import numpy as np
from sample_factory.algo.runners.runner import AlgoObserver
from sample_factory.cfg.arguments import parse_full_cfg, parse_sf_args
from sample_factory.envs.env_utils import register_env
from sample_factory.train import make_runner

from benchmarks.worker import Clock, main, task

NAME = "cartpole-without-velocity"


class Environments(gym.Env):
    """All environments as one with many agents, which Sample Factory samples in batches."""

    is_multiagent = True

    def __init__(self, num_envs: int) -> None:
        self.envs = [task() for _ in range(num_envs)]
        self.num_agents = num_envs
        self.observation_space = self.envs[0].observation_space
        self.action_space = self.envs[0].action_space
        self.render_mode = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, list[dict]]:
        seeds = [None if seed is None else seed + index for index in range(self.num_agents)]
        return np.stack([env.reset(seed=each)[0] for env, each in zip(self.envs, seeds, strict=True)]), [{}] * self.num_agents

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        obs = np.empty((self.num_agents, *self.observation_space.shape), np.float32)
        reward = np.empty(self.num_agents, np.float32)
        terminated, truncated = np.empty(self.num_agents, bool), np.empty(self.num_agents, bool)
        for index, (env, action) in enumerate(zip(self.envs, np.asarray(actions).reshape(-1), strict=True)):
            obs[index], reward[index], terminated[index], truncated[index], _ = env.step(action)
            if terminated[index] or truncated[index]:
                obs[index], _ = env.reset()
        return obs, reward, terminated, truncated, [{}] * self.num_agents


def environments(num_envs: int, *_: Any, **__: Any) -> Environments:
    """What Sample Factory calls, also in the process in which it looks at the spaces."""
    return Environments(num_envs)


class Observer(AlgoObserver):
    """Marks the iterations: all epochs on one batch of rollouts are one training step."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.work = work
        self.clock: Clock | None = None

    def on_training_step(self, runner: Any, _: int) -> None:
        if self.clock is None:
            # There are no weights before the first iteration, which only warms up: its start is never read.
            self.clock = Clock(self.work, runner.learners[0].learner.actor_critic)
            self.clock.mark()
        if self.clock.mark():
            runner.total_train_seconds = float("inf")  # it looks there next, to see whether it should end


def settings(work: dict[str, Any], folder: str) -> list[str]:
    """The common work as Sample Factory's command line."""
    given = {
        "env": NAME,
        "experiment": "bench",
        "train_dir": folder,
        "seed": work["seed"],
        "device": "cpu",
        "serial_mode": True,
        "async_rl": False,
        "batched_sampling": True,
        "num_workers": 1,
        "worker_num_splits": 1,
        "num_envs_per_worker": 1,
        "rollout": work["num_steps"],
        "batch_size": work["num_envs"] * work["num_steps"] // work["minibatches"],
        "num_batches_per_epoch": work["minibatches"],
        "num_epochs": work["epochs"],
        "learning_rate": work["learning_rate"],
        "encoder_mlp_layers": work["hidden"],
        "nonlinearity": "tanh",
        "use_rnn": True,
        "rnn_type": "lstm",
        "rnn_size": work["hidden"],
        "normalize_input": False,
        "normalize_returns": False,
        "save_every_sec": 10**6,
        "save_best_every_sec": 10**6,
        "log_to_file": False,
    }
    return [f"--{key}={value}" for key, value in given.items()]


def run(work: dict[str, Any]) -> dict[str, Any]:
    """Train for ``warmup + iterations`` iterations; count time and steps of the latter."""
    register_env(NAME, functools.partial(environments, work["num_envs"]))
    observer = Observer(work)
    with tempfile.TemporaryDirectory() as folder:
        arguments = settings(work, folder)
        parser, _ = parse_sf_args(arguments)
        _, runner = make_runner(parse_full_cfg(parser, arguments))
        runner.register_observer(observer)
        runner.init()
        runner.run()
    assert observer.clock is not None, "Sample Factory ended without an iteration"
    return observer.clock.result("gymnasium", "sample-factory")


if __name__ == "__main__":
    main(run)
