"""A recorded loss curve: what changes it changes training, on purpose or not."""

from __future__ import annotations

import torch
from small_runs import EVERYTHING, tiny, trainer

# Policy loss, value loss and entropy of six iterations of two members. A refactor reproduces them. They may change only with
# learning curves, old and new, in the changelog: record what `curve` returns.
GOLDEN = {
    "train/policy_loss": [
        [-0.00228723967203, -0.0522956423351],
        [-0.0785023770771, 0.0204457970562],
        [-0.00539260949609, -3.3140779959e-05],
        [-0.0715359937704, 0.0522420660691],
        [-0.016504540693, 0.00994944214691],
        [0.0270997573321, -0.0125930582816],
    ],
    "train/value_loss": [
        [0.388028183363, 0.376242667972],
        [0.323013402277, 0.291616390506],
        [0.261111317499, 0.217258051906],
        [0.294916078269, 0.223740468717],
        [0.175309590344, 0.171813754023],
        [0.253587990501, 0.179041555492],
    ],
    "train/entropy": [
        [0.691274713585, 0.692560206888],
        [0.690775022245, 0.68881461963],
        [0.691508230354, 0.673475945591],
        [0.691449790848, 0.677494608892],
        [0.692869936436, 0.67054269192],
        [0.692567558629, 0.668999578832],
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
