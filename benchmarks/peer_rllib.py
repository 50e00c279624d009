"""Worker: trains RLlib's PPO on the common work and reports its speed; `benchmarks.worker` has the protocol.

Environments, policy and learner live in one process, RLlib's fastest arrangement for work as small as this.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.tune.registry import register_env

from benchmarks.worker import Clock, main, task

NAME = "cartpole-without-velocity"


def settings(work: dict[str, Any]) -> PPOConfig:
    """The common work in RLlib's words."""
    steps = work["num_envs"] * work["num_steps"]
    model = DefaultModelConfig(
        fcnet_hiddens=[work["hidden"]],
        fcnet_activation="tanh",
        head_fcnet_hiddens=[],
        vf_share_layers=True,
        use_lstm=True,
        lstm_cell_size=work["hidden"],
        max_seq_len=work["num_steps"],
    )
    return (
        PPOConfig()
        .environment(NAME)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=work["num_envs"], rollout_fragment_length=work["num_steps"])
        .learners(num_learners=0)
        .training(
            lr=work["learning_rate"],
            train_batch_size_per_learner=steps,
            minibatch_size=steps // work["minibatches"],
            num_epochs=work["epochs"],
            grad_clip=0.5,
        )
        .rl_module(model_config=model)
        .debugging(seed=work["seed"], log_level="ERROR")
    )


def run(work: dict[str, Any]) -> dict[str, Any]:
    """Train for ``warmup + iterations`` iterations; count time and steps of the latter."""
    ray.init(num_cpus=work["threads"], include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    register_env(NAME, task)
    algorithm = settings(work).build_algo()
    clock = Clock(work, algorithm.learner_group._learner.module["default_policy"])
    while not clock.mark():
        algorithm.train()
    result = clock.result("gymnasium", "ray")
    algorithm.stop()
    ray.shutdown()
    return result


if __name__ == "__main__":
    main(run)
