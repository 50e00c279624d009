"""The common work: velocity-masked CartPole, linear 128 and LSTM 128, unroll 128, 4 epochs of 4 minibatches, float32.

With a critic of one quantile the network has 132,867 weights, as many as other libraries' for the same work. What Hardy does on
top stays on, as a user gets it: AdaptiveUPGD with VGS, normalised observations and rewards, two measures of plasticity.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from hardy.bench.machine import MIB
from hardy.bench.options import MINIBATCHES
from hardy.config import Settings, settings_from_dict
from hardy.settings import RunSettings
from hardy.trainer import Trainer

EPOCHS = 4
LONG = 10**9
"""Length of the run that schedules refer to: none that is measured comes near."""


class Work(Settings):
    """One training to measure."""

    num_envs: int = Field(ge=1)
    population: int = Field(1, ge=1)
    threads: int = Field(ge=1)
    num_steps: int = Field(128, ge=1)
    hidden: int = Field(128, ge=1)
    seconds: float = Field(0.0, ge=0)
    """Measured at least so long, in whole iterations, at least one."""


class Training(Settings):
    """What came out of a `Work`.

    Attributes:
        steps_per_second: environment steps, all members together, rollout and update.
        weights: of one member's network.
        peak_mib: the most memory that the process has held so far.
    """

    steps_per_second: float
    weights: int
    peak_mib: float


class BenchError(Exception):
    """A measuring process failed."""


def common_settings(
    *,
    num_envs: int,
    population: int = 1,
    num_steps: int = 128,
    hidden: int = 128,
    epochs: int = EPOCHS,
    minibatches: int = MINIBATCHES,
    learning_rate: float = 3e-4,
    quantiles: int = 1,
    backend: str = "auto",
    **run: object,
) -> RunSettings:
    """The common work in Hardy's words.

    Args:
        backend: of the environments.
        run: keys of a run, such as ``threads``.
    """
    tree = {
        "env": {"id": "CartPoleNoVel-v1", "num_envs": num_envs, "backend": backend},
        "policy": {"encoder": [hidden], "memory_size": hidden, "shared_memory": True},
        "critic": {"quantiles": quantiles},
        "ppo": {"n_steps": num_steps, "n_epochs": epochs, "n_minibatches": minibatches},
        "optimizer": {"name": "AdaptiveUPGD", "lr": learning_rate},
        "population": {"size": population},
        **run,
    }
    return settings_from_dict(RunSettings, tree)


def make(work: Work) -> Trainer:
    """A population at work, warmed up by one iteration."""
    trainer = Trainer(common_settings(**work.model_dump(exclude={"seconds"})))
    trainer.iterate(LONG)
    return trainer


def weights(trainer: Trainer) -> int:
    """Of one member's network."""
    return sum(parameter[0].numel() for parameter in trainer.policy.parameters())


def train(work: Work) -> Training:
    """Train in this process: one iteration to warm up, then as many as the seconds allow."""
    trainer = make(work)
    iterations, began = 0, time.perf_counter()
    while True:
        trainer.iterate(LONG)
        iterations += 1
        elapsed = time.perf_counter() - began
        if elapsed >= work.seconds:
            break
    steps = iterations * work.population * trainer.steps_per_iteration
    return Training(steps_per_second=steps / elapsed, weights=weights(trainer), peak_mib=peak_memory())


def train_in_fresh_process(work: Work) -> Training:
    """`train` where nothing has filled caches or memory before.

    Raises:
        BenchError: the process failed; the message holds the end of what it wrote.
    """
    return Training.model_validate(in_fresh_process("training", work))


def peak_of_imports() -> float:
    """Memory in MiB of a process that has imported what trains and done nothing."""
    return float(in_fresh_process("nothing", None)["peak_mib"])


def in_fresh_process(task: str, settings: Settings | None) -> Mapping[str, Any]:
    """Run one task of `hardy.bench.worker`; what it prints as its last line, as JSON."""
    done = subprocess.run(command(task, settings), capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchError(failure(task, done.returncode, done.stderr))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def command(task: str, settings: Settings | None) -> list[str]:
    """The command line of a worker; ``-P`` keeps files of the current folder from being imported in its place."""
    given = "{}" if settings is None else settings.model_dump_json()
    return [sys.executable, "-P", "-m", "hardy.bench.worker", task, given]


def failure(task: str, status: int, written: str) -> str:
    """Why a worker failed, for the user."""
    last = "\n".join(written.strip().splitlines()[-5:])
    return f"measuring {task} failed with status {status}:\n{last}"


def peak_memory() -> float:
    """The most memory that this process has held, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent held before this program was loaded
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / MIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
