"""Worker: trains rl_games' PPO on the common work and reports its speed; `benchmarks.worker` has the protocol."""

from __future__ import annotations

import contextlib
import tempfile
from typing import Any

import gymnasium as gym
import numpy as np
from rl_games.common import env_configurations, vecenv
from rl_games.common.algo_observer import DefaultAlgoObserver
from rl_games.torch_runner import Runner

from benchmarks.worker import Clock, EnoughError, main, task

NAME = "cartpole-without-velocity"


class Environments(vecenv.IVecEnv):
    """The environments in this process, in rl_games' interface; its own runs one process of Ray for each."""

    def __init__(self, _: str, num_actors: int, seed: int) -> None:
        same_step = gym.vector.AutoresetMode.SAME_STEP
        self.envs = gym.vector.SyncVectorEnv([task] * num_actors, autoreset_mode=same_step)
        self.seed_of_first_reset: int | None = seed

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        obs, reward, terminated, truncated, _ = self.envs.step(actions)
        return obs, reward.astype(np.float32), terminated | truncated, {"time_outs": truncated}

    def reset(self) -> np.ndarray:
        obs, _ = self.envs.reset(seed=self.seed_of_first_reset)
        return obs

    def get_env_info(self) -> dict[str, Any]:
        return {"observation_space": self.envs.single_observation_space, "action_space": self.envs.single_action_space}


class Observer(DefaultAlgoObserver):
    """Marks the iterations: the trainer asks for its next number when one begins."""

    def __init__(self, work: dict[str, Any]) -> None:
        super().__init__()
        self.work = work
        self.clock: Clock

    def after_init(self, algo: Any) -> None:
        super().after_init(algo)
        self.clock = Clock(self.work, algo.model)
        following = algo.update_epoch

        def update_epoch() -> int:
            self.clock.mark_or_stop()
            return following()

        algo.update_epoch = update_epoch


def settings(work: dict[str, Any], folder: str) -> dict[str, Any]:
    """The common work in rl_games' words."""
    network = {
        "name": "actor_critic",
        "separate": False,
        "space": {"discrete": None},
        "mlp": {
            "units": [work["hidden"]],
            "activation": "tanh",
            "initializer": {"name": "default"},
            "regularizer": {"name": "None"},
        },
        "rnn": {"name": "lstm", "units": work["hidden"], "layers": 1, "before_mlp": False},
    }
    config = {
        "name": "bench",
        "env_name": NAME,
        "env_config": {"seed": work["seed"]},
        "train_dir": folder,
        "device": "cpu",
        "num_actors": work["num_envs"],
        "horizon_length": work["num_steps"],
        "seq_length": work["num_steps"],
        "minibatch_size": work["num_envs"] * work["num_steps"] // work["minibatches"],
        "mini_epochs": work["epochs"],
        "learning_rate": work["learning_rate"],
        "lr_schedule": None,
        "gamma": 0.99,
        "tau": 0.95,
        "e_clip": 0.2,
        "clip_value": False,
        "critic_coef": 0.5,
        "entropy_coef": 0.0,
        "grad_norm": 0.5,
        "truncate_grads": True,
        "normalize_advantage": True,
        "normalize_input": False,
        "reward_shaper": {"scale_value": 1.0},
        "score_to_win": 1e9,
        "max_epochs": 10**9,
        "print_stats": False,
        "torch_compile": False,
    }
    return {
        "seed": work["seed"] + 1,  # rl_games takes 0 as no seed
        "torch_threads": work["threads"],
        "algo": {"name": "a2c_discrete"},
        "model": {"name": "discrete_a2c"},
        "network": network,
        "config": config,
    }


def run(work: dict[str, Any]) -> dict[str, Any]:
    """Train for ``warmup + iterations`` iterations; count time and steps of the latter."""
    vecenv.register(NAME, Environments)
    env_configurations.register(NAME, {"vecenv_type": NAME, "env_creator": task})
    observer = Observer(work)
    runner = Runner(observer)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(EnoughError):
        runner.load({"params": settings(work, folder)})
        runner.run({"train": True})
    return observer.clock.result("gymnasium", "rl-games")


if __name__ == "__main__":
    main(run)
