"""Where the agent walks in ``WindyCliff-v0`` as alpha falls, beside the path that is best for that alpha.

python -m benchmarks.cliff [--seeds 5] [--steps 30000] [--kind quantile]
"""

from __future__ import annotations

import argparse
import itertools
import json

import numpy as np
import torch

from benchmarks.learning import RESULTS, RunSettings
from hardy.config import settings_from_dict
from hardy.envs.cliff import EDGE, LENGTH, ROUGH, path_returns
from hardy.ops.distortion import cvar_distortion, distorted_mean
from hardy.trainer import Trainer

ALPHAS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1)
GAMMA = 0.99


def cvar_of(path: tuple[int, ...], alpha: float) -> float:
    """CVaR of the discounted return of a path."""
    values, probabilities = (torch.from_numpy(part)[None] for part in path_returns(path, GAMMA))
    return float(distorted_mean(values, probabilities, cvar_distortion(torch.tensor([alpha], dtype=torch.float64))))


def walked(trainer: Trainer) -> list[tuple[int, ...]]:
    """The path of each member when it takes the most probable action and no gust comes."""
    members = len(trainer.seeds)
    path = np.zeros((members, 0), dtype=int)
    first = torch.ones(members, 1, dtype=torch.bool)
    for column in range(LENGTH - 1):
        row = path[:, -1] if column else np.full(members, EDGE)
        obs = torch.tensor(np.stack([np.full(members, column), row], axis=1)[:, None], dtype=trainer.policy.dtype)
        found = trainer.policy.step(trainer.normalize(obs), trainer.policy.initial_state(members, 1), first)[0].mode()
        path = np.concatenate([path, found.numpy()], axis=1)
    return [tuple(row) for row in path.tolist()]


def main() -> None:
    """Train members of every alpha as one population without exchange; print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--kind", default="quantile", choices=("quantile", "categorical"))
    given = parser.parse_args()
    tree = {
        "env": {"id": "WindyCliff-v0", "num_envs": 16}, "policy": {"memory": "none", "encoder": [32]},
        "ppo": {"n_steps": 32, "n_epochs": 6, "n_minibatches": 2, "ent_coef": 0.02, "gamma": GAMMA, "lr_schedule": "linear"},
        "optimizer": {"lr": 0.01}, "vgs": {"enabled": False}, "risk": {"weight": 1.0},
        "critic": {"kind": given.kind, "huber_threshold": 0.05},
    }  # fmt: skip
    trainer = Trainer(settings_from_dict(RunSettings, tree), seeds=list(range(given.seeds * len(ALPHAS))))
    alphas = np.repeat(ALPHAS, given.seeds)
    trainer.state.hyper["risk.cvar_alpha"].copy_(torch.from_numpy(alphas))
    while trainer.timesteps < given.steps:
        metrics = trainer.iterate(given.steps)
    paths, results = walked(trainer), []
    for alpha in ALPHAS:
        here = [paths[index] for index in np.flatnonzero(alphas == alpha)]
        best = max(itertools.product((EDGE, ROUGH), repeat=LENGTH - 1), key=lambda path, alpha=alpha: cvar_of(path, alpha))
        found = {"alpha": alpha, "best": best, "cvar_of_best": cvar_of(best, alpha), "walked": here}
        found["cvar_of_walked"] = [cvar_of(path, alpha) for path in here]
        found["cvar_predicted"] = metrics["risk/cvar"][torch.from_numpy(alphas == alpha)].tolist()
        results.append(found)
        rough, reached, predicted = (
            np.mean(part) for part in ([sum(p) for p in here], found["cvar_of_walked"], found["cvar_predicted"])
        )
        print(f"{alpha:4} best {best} {found['cvar_of_best']:.2f}; rough {rough:.1f} of 5, {reached:.2f}, said {predicted:.2f}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"cliff_{given.kind}.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
