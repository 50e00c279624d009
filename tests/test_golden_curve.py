"""A recorded loss curve: what changes it changes training, on purpose or not."""

from __future__ import annotations

import torch
from small_runs import EVERYTHING, tiny, trainer

# Policy loss, value loss and entropy of six iterations of two members. A refactor reproduces them. They may change only with
# learning curves, old and new, in the changelog: record what `curve` returns.
GOLDEN = {
    "train/policy_loss": [
        [-0.00150621559455, -0.0524345358203],
        [-0.0599227715959, 0.0281865878652],
        [-0.0102597492237, 0.00471143843689],
        [-0.0382771854432, 0.0233839053089],
        [-0.0197456038721, 0.0379984546317],
        [0.0254894689417, 0.0251509346724],
    ],
    "train/value_loss": [
        [0.420470788956, 0.409830164455],
        [0.30652074833, 0.296767444844],
        [0.292967516291, 0.290494368447],
        [0.361026231296, 0.267531315524],
        [0.215931499372, 0.234834035632],
        [0.244640325967, 0.246253232331],
    ],
    "train/entropy": [
        [0.692573993096, 0.692596092352],
        [0.692548633831, 0.692319995472],
        [0.692868672228, 0.692008903469],
        [0.692811556535, 0.692211800095],
        [0.692404864834, 0.691848438266],
        [0.692518102955, 0.692194649159],
    ],
}


def curve():
    """The metrics of each iteration, by name ``[iteration][member]``."""
    settings = tiny(
        EVERYTHING, env={"max_episode_steps": 20}, policy={"memory_size": 8}, optimizer={"lr": 0.03, "sigma": 0.01},
        vgs={"alpha": 1.0}, ppo={"n_steps": 16, "target_kl": None},
    )  # fmt: skip
    run = trainer(settings, [3, 4])
    metrics = [run.iterate(6 * run.steps_per_iteration) for _ in range(6)]
    names = ("train/policy_loss", "train/value_loss", "train/entropy")
    return {name: [found[name].tolist() for found in metrics] for name in names}


def test_the_loss_curve_is_the_recorded_one():
    found = curve()
    assert found.keys() == GOLDEN.keys()
    for name, values in GOLDEN.items():
        # Other machines' kernels round differently; a change of the mathematics shows far above this.
        mine, theirs = (torch.tensor(numbers, dtype=torch.float64) for numbers in (found[name], values))
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
