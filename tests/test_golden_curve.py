"""A recorded loss curve: what changes it changes training, on purpose or not."""

from __future__ import annotations

import torch
from small_runs import EVERYTHING, tiny, trainer

# Policy loss, value loss and entropy of six iterations of two members. A refactor reproduces them. They may change only with
# learning curves, old and new, in the changelog: record what `curve` returns.
GOLDEN = {
    "train/policy_loss": [
        [-0.00230908666034, -0.0522874409229],
        [-0.0785450159018, 0.020436816047],
        [-0.00538918294775, -5.1293010758e-05],
        [-0.0715621040444, 0.0522467793176],
        [-0.0165602682758, 0.00995120587886],
        [0.0271650783195, -0.0125940548207],
    ],
    "train/value_loss": [
        [0.387527198382, 0.37624974828],
        [0.322974255119, 0.291688112117],
        [0.261029795989, 0.217305471792],
        [0.294918124228, 0.223809219769],
        [0.175509832204, 0.171849186252],
        [0.253740803663, 0.179098631204],
    ],
    "train/entropy": [
        [0.691252230515, 0.6925582107],
        [0.690743022452, 0.688802716446],
        [0.691469525281, 0.673413152708],
        [0.691422087548, 0.677433453333],
        [0.692864254045, 0.670452409474],
        [0.692557902665, 0.668913011522],
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
