"""Stepping of the built-in tasks beside Gymnasium's `SyncVectorEnv` and, for CartPole, its own vector environment."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import SyncVectorEnv, VectorEnv

from hardy.bench.options import Options
from hardy.bench.results import Part, measurement, ratio
from hardy.bench.timing import Say, take_turns, under
from hardy.envs import EnvSettings, make

TASKS = ("CartPole-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0")
ENVS = (64,)
ACTIONS = 64
"""Random actions that are drawn beforehand and taken in turn."""


def measure(options: Options, say: Say) -> Iterator[Part]:
    """One part for each number of environments and task."""
    for envs in options.envs or ENVS:
        for task in TASKS:
            yield _compare(task, envs, options, say)


def _compare(task: str, envs: int, options: Options, say: Say) -> Part:
    group = f"{task}, N = {envs}"
    hardy = make(EnvSettings(id=task, num_envs=envs), [0])
    hardy.reset()
    hardy.action_space.seed(0)
    actions = np.stack([[hardy.action_space.sample() for _ in range(envs)] for _ in range(ACTIONS)])
    others: dict[str, VectorEnv[Any, Any, Any]] = {
        "gymnasium SyncVectorEnv": SyncVectorEnv([functools.partial(gymnasium.make, task)] * envs)
    }
    if gymnasium.spec(task).vector_entry_point is not None:
        others["gymnasium's vector environment"] = gymnasium.make_vec(task, envs, vectorization_mode="vector_entry_point")
    for other in others.values():
        other.reset(seed=0)
    calls = {"Hardy": _stepper(hardy.step, actions)}
    calls |= {name: _stepper(other.step, actions) for name, other in others.items()}
    times = take_turns(calls, options.repeats or 5, options.seconds or 0.5, under(group, say))
    hardy.close()
    for other in others.values():
        other.close()
    speeds = {name: [envs / second for second in seconds] for name, seconds in times.items()}
    return Part(
        measurements=tuple(measurement(group, name, "steps/s", speed) for name, speed in speeds.items()),
        ratios=tuple(ratio(f"Hardy over {name}; {group}", "higher", speeds["Hardy"], speeds[name]) for name in others),
    )


def _stepper(step: Callable[[Any], object], actions: np.ndarray) -> Callable[[], object]:
    turn = 0

    def run() -> object:
        nonlocal turn
        turn = (turn + 1) % len(actions)
        return step(actions[turn])

    return run
