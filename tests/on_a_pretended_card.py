"""Trains on the pretended card and on the CPU and prints, as JSON, what differs and what crossed.

Usage: ``on_a_pretended_card.py LIBRARY``, the library made of ``pretended_card.cpp``.
"""

import ctypes
import json
import os
import sys
import traceback
import warnings

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before PyTorch
os.environ["HARDY_COMPILED"] = "0"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from pretended_card import Card, MixedDevicesError, crossings, graphs_captured, pretend  # noqa: E402
from replay import CaptureError  # noqa: E402
from small_runs import EVERYTHING, assert_same, snapshot, tiny, trainer  # noqa: E402
from test_device_update import CASES  # noqa: E402

SEEDS = [4, 9, 2]
ITERATIONS = 3
"""The third minibatch of a size is captured, in the second iteration; those after it are replayed."""
BURN_IN = {"pbt": {"after_exploit": "burn_in"}}
OTHERS = {
    "adversary": {"adversary": {"epsilon": 0.1, "ramp": 0.0}},
    "actor and critic apart": {"policy": {"shared_memory": False}},
    "more steps": {"ppo": {"n_steps": 17}},
}
ON_THE_HOST = ("everything", "adversary", "more steps")
"""Cases that also run with environments as arrays."""


def trained(device, settings):
    """State, metrics and returns after everything that training does, and what crossed in the last iteration."""
    run = trainer(settings.model_copy(update={"device": device}), SEEDS)
    for _ in range(ITERATIONS - 1):
        before = run.iterate(1000)["env/drift_changes"]
    run.exploit_(np.array([0, 0, 2]))
    crossings.clear()
    metrics = run.iterate(1000)
    crossed = {**crossings, "changes of the task": metrics["env/drift_changes"] - before}
    returns = run.evaluate(2)
    found = {name: value.cpu() for name, value in snapshot(run.state).items()}
    found |= {f"metrics {name}": value for name, value in metrics.items() if isinstance(value, torch.Tensor)}
    # Members that add no noise draw keys as well where that is captured.
    if settings.optimizer.sigma == 0:
        found.pop("generators.noise")
    return {**found, "returns": torch.from_numpy(returns)}, crossed


def compared(settings):
    """What is wrong on the card with these settings, or nothing, and what crossed."""
    expected, _ = trained("cpu", settings)
    before = graphs_captured()
    try:
        with Card():
            found, crossed = trained("cuda", settings)
        assert_same(found, expected, 1e-9)
    except Exception as error:
        return {"wrong": "".join(traceback.format_exception(error))[-2000:]}
    return {"wrong": None, "crossed": crossed, "graphs": graphs_captured() - before}


def refused():
    """Rules of the card, and whether breaking each is the error it should be: a stand-in may not allow everything."""
    host, found = torch.ones(3), {}
    with Card():
        there = torch.ones(3, device="cuda")
        captured = torch.cuda.CUDAGraph()
        for name, work in {
            "both sides": lambda: there + host,
            "the host's indices": lambda: there.index_select(0, torch.arange(2)),
            "the host's written from the card": lambda: torch.ones(()).add_(there[0]),
            "a number of the host among those of the card": lambda: torch.stack([there[0], torch.tensor(1.0)]),
            "the host's values": lambda: there.index_put_((torch.tensor([0], device="cuda"),), torch.ones(1)),
        }.items():
            found[name] = _raises(MixedDevicesError, work)
        for name, work in {
            "asked while captured": lambda: there.sum().item(),
            "a mask while captured": lambda: there[there > 0],
            "to the host while captured": lambda: there.cpu(),
            "to the card while captured": lambda: there + host.to("cuda"),
            "drawn while captured": lambda: there.normal_(),
        }.items():
            with torch.cuda.graph(captured):
                found[name] = _raises(CaptureError, work)
    return found


def _raises(error, work):
    try:
        work()
    except error:
        return True
    return False


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "adaptive_noise=False")
    warnings.filterwarnings("error", "a CUDA graph could not be captured")
    pretend()
    found = {}
    for case, change in {**CASES, **OTHERS}.items():
        for backend in ("torch", "numpy") if case in ON_THE_HOST else ("torch",):
            # A member that stops early draws no more keys on the CPU, but for a captured update.
            settings = tiny(EVERYTHING, BURN_IN, change, {"env": {"backend": backend}}, ppo={"target_kl": None})
            found[f"{case}, {backend}"] = {**compared(settings), "steps": settings.ppo.n_steps}
    print(json.dumps({"cases": found, "refused": refused()}))
