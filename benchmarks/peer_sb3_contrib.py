"""Worker: trains sb3-contrib's RecurrentPPO on the common work and reports its speed; `benchmarks.worker` has the protocol."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.worker import Clock, main, task


class Encoder(BaseFeaturesExtractor):
    """One linear layer in front of the LSTM."""

    def __init__(self, observation_space: gym.Space, features_dim: int) -> None:
        super().__init__(observation_space, features_dim)
        self.layer = torch.nn.Linear(observation_space.shape[0], features_dim)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(observations))


class Iterations(BaseCallback):
    """Marks whole iterations: from the start of one rollout to the start of the next, or to the end of learning."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def _on_rollout_start(self) -> None:
        self.clock.mark()

    def _on_training_end(self) -> None:
        self.clock.mark()

    def _on_step(self) -> bool:
        return True


def run(work: dict[str, Any]) -> dict[str, Any]:
    """Train for ``warmup + iterations`` iterations; count time and steps of the latter."""
    steps = work["num_envs"] * work["num_steps"]
    envs = DummyVecEnv([task] * work["num_envs"])
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
    clock = Clock(work, model.policy)
    model.learn(steps * (work["warmup"] + work["iterations"]), callback=Iterations(clock))
    return clock.result("gymnasium", "stable-baselines3", "sb3-contrib")


if __name__ == "__main__":
    main(run)
