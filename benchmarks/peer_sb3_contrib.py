"""Worker: trains sb3-contrib's RecurrentPPO on the common work and reports its speed. Runs in `.venv-bench`, without hardy.

Protocol of all workers: the work as one JSON argument (see `benchmarks.throughput.Work`), the result as one JSON line, the
last line of the standard output.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv


class WithoutVelocity(gym.ObservationWrapper):
    """CartPole's position and angle; both velocities hidden."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        space = env.observation_space
        self.observation_space = gym.spaces.Box(space.low[[0, 2]], space.high[[0, 2]], dtype=space.dtype)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[[0, 2]]


class Encoder(BaseFeaturesExtractor):
    """One linear layer in front of the LSTM."""

    def __init__(self, observation_space: gym.Space, features_dim: int) -> None:
        super().__init__(observation_space, features_dim)
        self.layer = torch.nn.Linear(observation_space.shape[0], features_dim)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(observations))


class IterationClock(BaseCallback):
    """Times whole iterations: from the start of one rollout to the start of the next, or to the end of learning."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.episodes: list[int] = []

    def _on_rollout_start(self) -> None:
        self.times.append(time.perf_counter())

    def _on_rollout_end(self) -> None:
        self.episodes.append(int(self.model.rollout_buffer.episode_starts.sum()))

    def _on_training_end(self) -> None:
        self.times.append(time.perf_counter())

    def _on_step(self) -> bool:
        return True


def run(work: dict[str, Any]) -> dict[str, Any]:
    """Train for ``warmup + iterations`` iterations; count time and steps of the latter."""
    torch.set_num_threads(work["threads"])
    steps = work["num_envs"] * work["num_steps"]
    envs = DummyVecEnv([lambda: WithoutVelocity(gym.make("CartPole-v1")) for _ in range(work["num_envs"])])
    model = RecurrentPPO(
        "MlpLstmPolicy",
        envs,
        learning_rate=work["learning_rate"],
        n_steps=work["num_steps"],
        batch_size=steps // work["minibatches"],
        n_epochs=work["epochs"],
        policy_kwargs={
            "features_extractor_class": Encoder,
            "features_extractor_kwargs": {"features_dim": work["hidden"]},
            "lstm_hidden_size": work["hidden"],
            "shared_lstm": True,
            "enable_critic_lstm": False,
            "net_arch": [],
        },
        seed=work["seed"],
        device="cpu",
    )
    clock = IterationClock()
    model.learn(steps * (work["warmup"] + work["iterations"]), callback=clock)
    seconds = clock.times[-1] - clock.times[work["warmup"]]
    measured = steps * work["iterations"]
    return {
        "steps": measured,
        "seconds": seconds,
        "steps_per_second": measured / seconds,
        "parameters": sum(parameter.numel() for parameter in model.policy.parameters()),
        "mean_episode_length": measured / max(sum(clock.episodes[work["warmup"] :]), 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gymnasium": gym.__version__,
            "stable-baselines3": stable_baselines3.__version__,
            "sb3-contrib": sb3_contrib.__version__,
        },
    }


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
