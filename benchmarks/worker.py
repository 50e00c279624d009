"""What the workers of all libraries share: the task, the clock, and the evidence that the work was done.

Runs in the peers' own environments, so it needs torch and gymnasium alone, and nothing of Hardy. Protocol: the work as one JSON
argument (see `benchmarks.throughput.Work`), the result as one JSON line, the last of the standard output.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Played:
    """What the environments of this process have played so far."""

    steps = 0
    episodes = 0


class WithoutVelocity(gym.ObservationWrapper):
    """CartPole's position and angle; both velocities hidden. Counts in `Played`."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        space = env.observation_space
        self.observation_space = gym.spaces.Box(space.low[[0, 2]], space.high[[0, 2]], dtype=space.dtype)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[[0, 2]]

    def step(self, action: Any) -> tuple[Any, ...]:
        Played.steps += 1
        return super().step(action)

    def reset(self, **keywords: Any) -> tuple[Any, dict[str, Any]]:
        Played.episodes += 1
        return super().reset(**keywords)


def task(*_: Any, **__: Any) -> gym.Env:
    """One environment of the common work. Arguments are ignored: libraries pass configurations of their own."""
    return WithoutVelocity(gym.make("CartPole-v1"))


class EnoughError(Exception):
    """All iterations are measured. For libraries whose loop cannot be told to end at a given iteration."""


class Clock:
    """Marks the boundaries of iterations, and says what happened between the first and the last one measured.

    The measurement starts at boundary ``warmup`` (boundary 0 is where training starts) and ends ``iterations`` later.

    Args:
        work: the common work.
        model: whose weights must change, and whose first layer must read two numbers; several for a population.
    """

    def __init__(self, work: dict[str, Any], model: torch.nn.Module | Iterable[torch.nn.Module]) -> None:
        self.work = work
        self.models = [model] if isinstance(model, torch.nn.Module) else list(model)
        self.times: list[float] = []
        self.marks: list[tuple[int, int, int]] = []
        self.updates = 0
        self._before = [self._weights(model) for model in self.models]
        register_optimizer_step_post_hook(self._count)

    def mark(self) -> bool:
        """A boundary of iterations is reached. True when all are measured, and further marks are ignored."""
        done = self.work["warmup"] + self.work["iterations"]
        if len(self.times) <= done:
            self.times.append(time.perf_counter())
            self.marks.append((Played.steps, Played.episodes, self.updates))
        return len(self.times) > done

    def mark_or_stop(self) -> None:
        """`mark` for a loop without another way out.

        Raises:
            EnoughError: all iterations are measured.
        """
        if self.mark():
            raise EnoughError

    def result(self, *packages: str, **known: Any) -> dict[str, Any]:
        """What the worker reports.

        Args:
            packages: whose versions count, besides Python's and torch's.
            known: what this clock cannot see by itself in this library, in place of what it saw: the environments are not
                those of this module, the optimizers not torch's.
        """
        first, last = self.work["warmup"], self.work["warmup"] + self.work["iterations"]
        seconds = self.times[last] - self.times[first]
        counts = zip(("steps", "episodes", "updates"), self.marks[first], self.marks[last], strict=True)
        moved = [(self._weights(model) - before).norm().item() for model, before in zip(self.models, self._before, strict=True)]
        seen = {
            **{name: after - before for name, before, after in counts},
            "weights": self._before[0].numel(),
            "weight_change": min(moved),
            "observation_size": self._observation_size(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                **{name: importlib.metadata.version(name) for name in packages},
            },
        }
        seen |= known
        return {"seconds": seconds, "steps_per_second": seen["steps"] / seconds, **seen}

    @staticmethod
    def _weights(model: torch.nn.Module) -> torch.Tensor:
        """All weights in one row."""
        return torch.cat(
            [parameter.detach().reshape(-1).double() for parameter in model.parameters() if parameter.requires_grad]
        )

    def _observation_size(self) -> int:
        """How many numbers the network reads: the matrix behind the observation has the fewest columns."""
        return min(int(weight.shape[-1]) for weight in self.models[0].parameters() if weight.ndim > 1 and weight.requires_grad)

    def _count(self, *_: Any) -> None:
        self.updates += 1


def main(run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Do the work of the command line and print the result."""
    work = json.loads(sys.argv[1])
    torch.set_num_threads(work["threads"])
    print("\n" + json.dumps(run(work)), flush=True)
