"""Worker: trains PufferLib's recurrent PPO on the common work and reports its speed; `benchmarks.worker` has the protocol.

What a setting does not say is PufferLib's own: its network and its trainer, in one process, not compiled.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from pufferlib import PufferEnv
from pufferlib.models import Default, LSTMWrapper
from pufferlib.pufferl import PuffeRL

from benchmarks.worker import Clock, Played, main


class SameStepCartPole(CartPoleVectorEnv):
    """Gymnasium's vector CartPole, in which the step that ends an episode begins the next, instead of the step after it."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        ended = self.prev_done
        if number := int(ended.sum()):
            self.state[:, ended] = self.np_random.uniform(self.low, self.high, (4, number))
            self.steps[ended] = 0
            obs[ended] = self.state[:, ended].T
            self.prev_done = np.zeros_like(ended)
            Played.episodes += number
        return obs, reward, terminated, truncated, info


class Environments(PufferEnv):
    """All environments as a batch without velocities, in PufferLib's own interface: it writes into arrays that are kept."""

    def __init__(self, num_envs: int) -> None:
        self.envs = SameStepCartPole(num_envs)
        space = self.envs.single_observation_space
        self.single_observation_space = gym.spaces.Box(space.low[[0, 2]], space.high[[0, 2]], dtype=space.dtype)
        self.single_action_space = self.envs.single_action_space
        self.num_agents = self.agents_per_batch = num_envs
        super().__init__()

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, list[dict[str, Any]]]:
        obs, _ = self.envs.reset(seed=seed)
        self.observations[:] = obs[:, ::2]
        Played.episodes += self.num_agents
        return self.observations, []

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        obs, self.rewards[:], self.terminals[:], self.truncations[:], _ = self.envs.step(actions)
        self.observations[:] = obs[:, ::2]
        Played.steps += self.num_agents
        return self.observations, self.rewards, self.terminals, self.truncations, []

    def close(self) -> None:
        self.envs.close()


def network(work: dict[str, Any], envs: Environments) -> LSTMWrapper:
    """The common network; PufferLib has GELU behind the linear layer."""
    hidden = work["hidden"]
    policy = Default(envs, hidden)
    policy.encoder[1] = torch.nn.Tanh()
    return LSTMWrapper(envs, policy, hidden, hidden)


def settings(work: dict[str, Any]) -> dict[str, Any]:
    """The common work in PufferLib's words."""
    steps = work["num_envs"] * work["num_steps"]
    return {
        "env": "cartpole-without-velocity",
        "seed": work["seed"],
        "device": "cpu",
        "torch_deterministic": True,
        "cpu_offload": False,
        "compile": False,
        "precision": "float32",
        "use_rnn": True,
        "batch_size": steps,
        "bptt_horizon": work["num_steps"],
        "minibatch_size": steps // work["minibatches"],
        "max_minibatch_size": steps,
        "update_epochs": work["epochs"],
        "optimizer": "adam",
        "learning_rate": work["learning_rate"],
        "anneal_lr": False,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_eps": 1e-8,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "clip_coef": 0.2,
        "vf_coef": 0.5,
        "vf_clip_coef": 0.2,
        "ent_coef": 0.0,
        "max_grad_norm": 0.5,
        "vtrace_rho_clip": 1.0,
        "vtrace_c_clip": 1.0,
        "prio_alpha": 0.8,
        "prio_beta0": 0.2,
        "total_timesteps": 10**9,  # the last iteration and every `checkpoint_interval` write a file
        "checkpoint_interval": 10**9,
    }


def trainer(work: dict[str, Any]) -> PuffeRL:
    """PufferLib's trainer, without the table that it writes four times a second."""
    torch.manual_seed(work["seed"])
    envs = Environments(work["num_envs"])
    made = PuffeRL(settings(work), envs, network(work, envs))
    made.print_dashboard = lambda *_, **__: None
    return made


def run(work: dict[str, Any]) -> dict[str, Any]:
    """Train for ``warmup + iterations`` iterations; count time and steps of the latter."""
    training = trainer(work)
    clock = Clock(work, training.uncompiled_policy)
    while not clock.mark():
        training.evaluate()
        training.train()
    training.utilization.stop()  # a thread of its own, for which Python would wait
    return clock.result("gymnasium", "pufferlib-core")


if __name__ == "__main__":
    main(run)
