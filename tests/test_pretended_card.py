"""Training as on a graphics card, without one: every tensor where it belongs, and next to nothing leaves the card."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
METRICS, RUNNING, DRAWN = 1, 2, 4
"""Transfers in an iteration: to the host the metrics together, and before each of two epochs who still trains; to the card the
noise of the actions, the keys of the optimizer's, and an order of the environments for each epoch."""
ASKED = 6
"""Times in an iteration that the host waits for an answer: whether there is an adversary, whether there is risk, after each
epoch whether anybody still trains, and twice for a mask of who asked for a CVaR."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `on_a_pretended_card.py` prints, from a process of its own: PyTorch believes in the card from its start or never."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        pytest.skip("this machine has no C++ compiler, which makes the pretended card")
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch is built for CUDA: it knows no pretended card beside the real ones")
    headers, libraries = (Path(torch.__file__).parent / part for part in ("include", "lib"))
    built = tmp_path_factory.mktemp("card") / "pretended_card.so"
    made = [*compiler, "-std=c++20", "-shared", "-fPIC", str(HERE / "pretended_card.cpp")]
    made += [f"-I{headers}", f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    subprocess.run([*made, "-o", str(built)], check=True)
    script = [sys.executable, str(HERE / "on_a_pretended_card.py"), str(built)]
    return json.loads(subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True).stdout)


def test_training_on_a_card_gives_the_numbers_of_the_processor(found):
    """Population, exploit, burn-in and evaluation included, with graphs captured and replayed."""
    wrong = {name: case["wrong"] for name, case in found["cases"].items() if case["wrong"]}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())


def test_minibatches_and_steps_of_the_environments_are_captured(found):
    for name, case in found["cases"].items():
        sizes = 0 if "adversary" in name else 1 if "microbatches" in name else 2  # of minibatches
        assert case["graphs"] == sizes + name.endswith("torch"), name


@pytest.mark.parametrize("case", ["everything", "more steps"])
def test_nothing_leaves_the_card_but_metrics_and_actions(found, case):
    on_card, on_host = (found["cases"][f"{case}, {backend}"] for backend in ("torch", "numpy"))
    assert on_card["crossed"]["to the host"] == METRICS + RUNNING
    assert on_host["crossed"]["to the host"] == METRICS + RUNNING + on_host["steps"]
    assert on_card["crossed"]["asked"] == on_host["crossed"]["asked"] == ASKED


@pytest.mark.parametrize("case", ["everything", "more steps"])
def test_what_comes_to_the_card_does_not_grow_with_the_steps(found, case):
    crossed = found["cases"][f"{case}, torch"]["crossed"]
    assert crossed["to the card"] == DRAWN + crossed["changes of the task"]


def test_the_pretended_card_refuses_what_a_card_refuses(found):
    assert found["refused"]
    assert all(found["refused"].values()), found["refused"]
