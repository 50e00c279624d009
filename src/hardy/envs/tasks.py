"""The table of built-in tasks, and their masked twins as ordinary Gymnasium environments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv, Continuous_MountainCarEnv, MountainCarEnv, PendulumEnv
from gymnasium.spaces import Box
from gymnasium.utils import RecordConstructorArgs

from hardy.envs.classic import CartPole, ClassicControl, MountainCar, MountainCarContinuous, Pendulum
from hardy.envs.cliff import WindyCliff, WindyCliffEnv
from hardy.envs.device import TensorCartPole, TensorMountainCar, TensorMountainCarContinuous, TensorPendulum, TensorTask


@dataclass(frozen=True)
class Task:
    """One built-in task.

    Args:
        id: the name a user gives; without velocities it ends in ``NoVel``.
        batched: the vectorised dynamics.
        single: Gymnasium's own environment of the same task.
        entries: what the observation holds, in order.
        kept: indices of those entries in the full observation; ``None`` for all. The only place that says which are masked.
        description: one line for a listing.
        tensors: the dynamics as tensors on any device, where they exist.
    """

    id: str
    batched: type[ClassicControl]
    single: type[gymnasium.Env[Any, Any]]
    entries: tuple[str, ...]
    kept: tuple[int, ...] | None
    description: str
    tensors: type[TensorTask] | None = None


TASKS = {
    task.id: task
    for task in (
        Task(
            "CartPole-v1",
            CartPole,
            CartPoleEnv,
            ("position", "velocity", "angle", "angular velocity"),
            None,
            "balance a pole on a cart",
            TensorCartPole,
        ),
        Task(
            "CartPoleNoVel-v1",
            CartPole,
            CartPoleEnv,
            ("position", "angle"),
            (0, 2),
            "balance a pole without seeing velocities",
            TensorCartPole,
        ),
        Task(
            "Pendulum-v1",
            Pendulum,
            PendulumEnv,
            ("cos", "sin", "angular velocity"),
            None,
            "swing a pendulum up and hold it",
            TensorPendulum,
        ),
        Task(
            "PendulumNoVel-v1",
            Pendulum,
            PendulumEnv,
            ("cos", "sin"),
            (0, 1),
            "swing a pendulum up without seeing its velocity",
            TensorPendulum,
        ),
        Task(
            "MountainCar-v0",
            MountainCar,
            MountainCarEnv,
            ("position", "velocity"),
            None,
            "rock an underpowered car out of a valley, full throttle or none",
            TensorMountainCar,
        ),
        Task(
            "MountainCarNoVel-v0",
            MountainCar,
            MountainCarEnv,
            ("position",),
            (0,),
            "rock an underpowered car out of a valley, full throttle or none, without seeing its velocity",
            TensorMountainCar,
        ),
        Task(
            "MountainCarContinuous-v0",
            MountainCarContinuous,
            Continuous_MountainCarEnv,
            ("position", "velocity"),
            None,
            "rock an underpowered car out of a valley",
            TensorMountainCarContinuous,
        ),
        Task(
            "MountainCarContinuousNoVel-v0",
            MountainCarContinuous,
            Continuous_MountainCarEnv,
            ("position",),
            (0,),
            "rock an underpowered car out of a valley without seeing its velocity",
            TensorMountainCarContinuous,
        ),
        Task(
            "WindyCliff-v0",
            WindyCliff,
            WindyCliffEnv,
            ("column", "row"),
            None,
            "walk along a windy cliff: on its edge, or over the rough ground behind it",
        ),
    )
}


@dataclass(frozen=True)
class EnvInfo:
    """One line of `list_envs`: what the task is, sees, takes, its time limit, and which physical parameters may drift."""

    id: str
    description: str
    observation: str
    action: str
    max_episode_steps: int
    physics: tuple[str, ...]


def list_envs() -> list[EnvInfo]:
    """The built-in tasks. Any other id goes to Gymnasium's registry."""
    return [
        EnvInfo(
            id=task.id,
            description=task.description,
            observation=", ".join(task.entries),
            action=_describe_action(task.batched),
            max_episode_steps=task.batched.published_time_limit,
            physics=tuple(task.batched.default_physics),
        )
        for task in TASKS.values()
    ]


def _describe_action(batched: type[ClassicControl]) -> str:
    space = batched.action_space
    if isinstance(space, Box):
        return f"{space.shape[0]} in [{space.low[0]:g}, {space.high[0]:g}]"
    return f"one of {int(space.n)}"


class SelectEntries(gymnasium.ObservationWrapper[Any, Any, Any], RecordConstructorArgs):
    """Keep some entries of a one-dimensional observation.

    Args:
        env: a Gymnasium environment with a one-dimensional Box observation.
        kept: indices of the entries that stay, in order.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], kept: Sequence[int]) -> None:
        RecordConstructorArgs.__init__(self, kept=list(kept))
        super().__init__(env)
        self._kept = list(kept)
        full = env.observation_space
        if not isinstance(full, Box) or len(full.shape) != 1:
            raise ValueError(f"observation space {full}: entries can be selected from a one-dimensional Box")
        self.observation_space = Box(full.low[self._kept], full.high[self._kept], dtype=np.float32)

    def observation(self, observation: Any) -> Any:
        """The kept entries."""
        return observation[self._kept]


def make_single(task: str, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """Gymnasium's own environment of a built-in task, with the same observation entries; the registered entry point."""
    spec = TASKS[task]
    env = spec.single(**kwargs)
    return env if spec.kept is None else SelectEntries(env, spec.kept)


def register_tasks() -> None:
    """Let ``gymnasium.make`` know the masked tasks; idempotent."""
    for task in TASKS.values():
        if task.id not in gymnasium.registry:
            gymnasium.register(
                task.id,
                entry_point="hardy.envs.tasks:make_single",
                max_episode_steps=task.batched.published_time_limit,
                kwargs={"task": task.id},
            )
