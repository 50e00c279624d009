"""Worker: trains Hardy on the common work and reports its speed. The protocol is that of `benchmarks.peer_sb3_contrib`.

The network is the peer's. What Hardy does on top stays on, as a user gets it: AdaptiveUPGD with VGS and normalised
observations and rewards. So the comparison counts more work for Hardy, not less.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping
from typing import Any

import gymnasium
import torch

import hardy
from hardy.algorithm import DistributionalPPO


def run(work: dict[str, Any]) -> dict[str, Any]:
    """Train for ``warmup + iterations`` iterations; count time and steps of the latter."""
    model = DistributionalPPO(
        "MlpLstmPolicy",
        "CartPoleNoVel-v1",
        num_envs=work["num_envs"],
        optimizer={"name": "AdaptiveUPGD", "lr": work["learning_rate"]},
        critic={"quantiles": work["quantiles"]},
        policy_kwargs={"encoder": [work["hidden"]], "memory_size": work["hidden"], "shared_memory": True},
        ppo={"n_steps": work["num_steps"], "n_epochs": work["epochs"], "n_minibatches": work["minibatches"]},
        seed=work["seed"],
        threads=work["threads"],
    )
    times: list[float] = []
    episodes: list[int] = []

    def clock(model: DistributionalPPO, metrics: Mapping[str, float]) -> None:
        times.append(time.perf_counter())
        episodes.append(int(metrics["rollout/episodes"]))

    steps = work["num_envs"] * work["num_steps"]
    model.learn(steps * (work["warmup"] + work["iterations"]), callback=clock)
    # The callback comes after each iteration, so the last one that warms up is where the measurement starts.
    began = work["warmup"] - 1
    seconds = times[-1] - times[began]
    measured = steps * work["iterations"]
    return {
        "steps": measured,
        "seconds": seconds,
        "steps_per_second": measured / seconds,
        "parameters": sum(parameter.numel() for parameter in model.policy.parameters()),
        "mean_episode_length": measured / max(episodes[-1] - episodes[began], 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gymnasium": gymnasium.__version__,
            "hardy": hardy.__version__,
        },
    }


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
