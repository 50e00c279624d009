"""Worker: trains AgileRL's recurrent PPO on the common work and reports its speed; `benchmarks.worker` has the protocol.

A population is trained as AgileRL's own loop does it, one agent after the other; its evolution between iterations is left out.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from agilerl.algorithms import PPO
from agilerl.rollouts.on_policy import collect_rollouts_recurrent

from benchmarks.worker import Clock, main, task

WIDER = 162 / 128
"""AgileRL has no layer in front of the LSTM: with that many more units, the number of weights is that of the common work."""


def population(work: dict[str, Any], envs: gym.vector.VectorEnv) -> list[PPO]:
    """The agents."""
    head = {"hidden_size": [16]}
    return PPO.population(
        size=work["population"],
        observation_space=envs.single_observation_space,
        action_space=envs.single_action_space,
        net_config={
            "encoder_config": {"hidden_state_size": round(work["hidden"] * WIDER), "num_layers": 1},
            "latent_dim": work["hidden"],
            "head_config": head,
        },
        lr=work["learning_rate"],
        learn_step=work["num_envs"] * work["num_steps"],
        update_epochs=work["epochs"],
        share_encoders=True,
        num_envs=work["num_envs"],
        recurrent=True,
        max_seq_len=work["num_steps"],
    )


def sequences(agent: PPO) -> int:
    """Into how many sequences AgileRL cuts the rollout: one for each piece of an episode."""
    ends = agent.rollout_buffer.buffer["dones"].bool().reshape(-1, agent.num_envs)
    return int(ends.sum() + (~ends[-1]).sum())


def run(work: dict[str, Any]) -> dict[str, Any]:
    """Train for ``warmup + iterations`` iterations; count time and steps of the latter."""
    torch.manual_seed(work["seed"])
    np.random.seed(work["seed"])
    same_step = gym.vector.AutoresetMode.SAME_STEP
    each = [gym.vector.SyncVectorEnv([task] * work["num_envs"], autoreset_mode=same_step) for _ in range(work["population"])]
    agents = population(work, each[0])
    last: list[tuple[Any, ...]] = [(None, None, None, None)] * len(agents)
    clock = Clock(work, [torch.nn.ModuleList([agent.actor, agent.critic]) for agent in agents])
    while not clock.mark():
        for index, (agent, envs) in enumerate(zip(agents, each, strict=True)):
            agent.set_training_mode(True)
            obs, done, scores, info = last[index]
            _, *last[index] = collect_rollouts_recurrent(
                agent, envs, n_steps=work["num_steps"], last_obs=obs, last_done=done, last_scores=scores, last_info=info
            )
            agent.batch_size = -(-sequences(agent) // work["minibatches"])
            agent.learn()
    return clock.result("gymnasium", "agilerl")


if __name__ == "__main__":
    main(run)
