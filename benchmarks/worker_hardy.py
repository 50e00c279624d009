"""Worker: trains Hardy on the common work and reports its speed; `benchmarks.worker` has the protocol.

The network is that of the common work. What Hardy does on top stays on, as a user gets it: AdaptiveUPGD with VGS and normalised
observations and rewards. So the comparison counts more work for Hardy, not less. A population trains without exchanges.
"""

from __future__ import annotations

import platform
from typing import Any

import gymnasium
import torch

import hardy
from benchmarks.worker import Clock, main
from hardy.bench.work import LONG, common_settings, weights
from hardy.trainer import Trainer

NOT_SETTINGS = ("iterations", "warmup")


def run(work: dict[str, Any]) -> dict[str, Any]:
    """Train for ``warmup + iterations`` iterations; count time and steps of the latter."""
    trainer = Trainer(common_settings(**{name: value for name, value in work.items() if name not in NOT_SETTINGS}))
    clock = Clock(work, trainer.policy)
    step = trainer.ppo.optimizer.step_
    updates: list[int] = []
    episodes: list[int] = []

    def counted(*arguments: Any) -> Any:
        updates[-1] += work["population"]
        return step(*arguments)

    trainer.ppo.optimizer.step_ = counted  # type: ignore[method-assign]
    while not clock.mark():
        updates.append(0)
        metrics = trainer.iterate(LONG)
        episodes.append(int(torch.as_tensor(metrics["rollout/episodes"]).sum()))
    measured = work["population"] * trainer.steps_per_iteration * work["iterations"]
    return clock.result(
        steps=measured,
        episodes=episodes[-1] - episodes[work["warmup"] - 1],
        updates=sum(updates[work["warmup"] :]),
        weights=weights(trainer),
        observation_size=int(trainer.state.collector.obs.shape[-1]),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gymnasium": gymnasium.__version__,
            "hardy": hardy.__version__,
        },
    )


if __name__ == "__main__":
    main(run)
