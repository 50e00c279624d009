"""A recorded loss curve: what changes it changes training, on purpose or not."""

from __future__ import annotations

import torch
from small_runs import EVERYTHING, tiny, trainer

# Policy loss, value loss and entropy of six iterations of two members. A refactor reproduces them. They may change only with
# learning curves, old and new, in the changelog: record what `curve` returns.
GOLDEN = {
    "train/policy_loss": [
        [-0.00230415872694, -0.0523294825726],
        [-0.0785489749522, 0.0204255299439],
        [-0.00539823174067, -6.72999119073e-05],
        [-0.0715720194926, 0.0522390844186],
        [-0.0165235923935, 0.00994521888954],
        [0.0270546101218, -0.0126005577697],
    ],
    "train/value_loss": [
        [0.387767547215, 0.376104827761],
        [0.322982168922, 0.29163275002],
        [0.261125457151, 0.217181574933],
        [0.294991901032, 0.223737646053],
        [0.175515102308, 0.171801095232],
        [0.253734022864, 0.179045693418],
    ],
    "train/entropy": [
        [0.691260096329, 0.692559585493],
        [0.690747039222, 0.688800454101],
        [0.691487339085, 0.673432116499],
        [0.69143531465, 0.677457508619],
        [0.69286686626, 0.670486848604],
        [0.692563839875, 0.668964072247],
    ],
}


def curve():
    """The metrics of each iteration, by name ``[iteration][member]``."""
    settings = tiny(
        EVERYTHING, env={"max_episode_steps": 20}, policy={"memory_size": 8}, optimizer={"lr": 0.03, "sigma": 0.01},
        vgs={"alpha": 1.0, "beta": 0.9, "warmup_steps": 20}, ppo={"n_steps": 16, "target_kl": None},
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
