"""All parts at once: do they stay finite, does the first ratio of every update stay 1, and does the population learn?

LSTM, twin quantile critics, CVaR, state-adversarial training, VGS, AdaptiveUPGD and population-based training of four.

    python -m benchmarks.together [--iterations 500] [--out NAME] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.learning import RESULTS
from hardy.config import load_settings
from hardy.evolution import Evolution
from hardy.ppo import PPO
from hardy.rollout import Rollout
from hardy.settings import RunSettings
from hardy.trainer import Trainer

CONFIG = Path(__file__).parents[1] / "configs" / "config_pbt_adversarial.yaml"


class FirstRatios(PPO):
    """PPO that notes, before every update, how far the ratio of its whole batch is from 1."""

    largest = 0.0

    def update(self, rollout: Rollout, *rest: Any, **options: Any) -> dict[str, Tensor]:
        """As PPO's."""
        with torch.no_grad():
            log_prob = self.policy(rollout.obs, rollout.initial_state, rollout.is_first)[0].log_prob(rollout.action)
        away = (log_prob - rollout.log_prob).expm1().abs()[rollout.valid].max()
        self.largest = max(self.largest, float(away.nan_to_num(nan=math.inf)))  # max() would pass over NaN
        return super().update(rollout, *rest, **options)


def measure(settings: RunSettings, iterations: int) -> dict[str, Any]:
    """Train for ``iterations`` iterations, with exchanges, and evaluate every member."""
    began = told = time.monotonic()
    trainer = Trainer(settings)
    trainer.ppo.__class__ = FirstRatios
    assert isinstance(trainer.ppo, FirstRatios)
    evolution = Evolution(trainer)
    evolution.start()
    total = iterations * settings.ppo.n_steps * settings.env.num_envs
    not_finite, skipped = 0, 0.0
    for iteration in range(iterations):
        metrics = trainer.iterate(total)
        evolution.watch(metrics)
        not_finite += sum(not value.isfinite().all() for value in trainer.state.parameters.values())
        skipped += float(metrics["train/skipped_updates"].sum())
        if evolution.due(total):
            evolution.exchange()
        if time.monotonic() - told > 20:
            told = time.monotonic()
            scores = " ".join(f"{score:.0f}" for score in metrics["rollout/ep_rew_mean"])
            print(f"{iteration + 1} iterations, ratio - 1 at most {trainer.ppo.largest:.1e}, returns {scores}", flush=True)
    evolution.finish()
    returns = trainer.evaluate(settings.evaluation.episodes).mean(1)
    return {
        "members": len(trainer.seeds),
        "iterations": iterations,
        "steps_of_a_member": trainer.timesteps,
        "largest_first_ratio_minus_1": trainer.ppo.largest,
        "parameters_not_finite": int(not_finite),
        "skipped_updates": skipped,
        "exploits": evolution.exploits,
        "best_member": evolution.best_member,
        "return_of_each_member": returns.round(1).tolist(),
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--out", default="together", help="name of the result")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_intermixed_args()
    settings = load_settings(RunSettings, CONFIG, ["population.size=4", *given.overrides])
    result = {"overrides": given.overrides, **measure(settings, given.iterations)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{given.out}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
