"""From a user's words (an id, settings, factories, a vector environment) to a batched environment for a whole population."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import gymnasium
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from pydantic import Field

from hardy.config import Settings, nearest
from hardy.envs.base import BatchedEnv, row_seeds
from hardy.envs.device import TensorEnv
from hardy.envs.drift import Drift, DriftSettings, Steps, TensorDrift
from hardy.envs.gymnasium_adapter import GymVectorEnv
from hardy.envs.tasks import TASKS

Backend = Literal["auto", "numpy", "torch"]
EnvFactory = Callable[[], gymnasium.Env[Any, Any]]


class EnvSettings(Settings):
    """Which task, and how many copies of it each member plays.

    Args:
        id: a built-in task (``hardy envs``) or any id of Gymnasium's registry; ``module:Env-v0`` imports ``module`` first.
            ``CartPole-v1``, ``Pendulum-v1``, ``MountainCar-v0`` and ``MountainCarContinuous-v0`` are the built-in vectorised
            twins: same tasks, faster.
        num_envs: environments per member.
        kwargs: passed to ``gymnasium.make``; built-in tasks take none.
        max_episode_steps: steps until truncation; the task's own limit if ``None``.
        backend: ``numpy`` steps the environments on the CPU, ``torch`` as tensors on the device of the networks; ``auto`` takes
            tensors where that device is not the CPU and the task exists as such.
        drift: makes the task change while it is being learnt.
    """

    id: str
    num_envs: int = Field(default=8, gt=0)
    kwargs: dict[str, Any] = Field(default_factory=dict)
    max_episode_steps: int | None = Field(default=None, gt=0)
    backend: Backend = "auto"
    drift: DriftSettings | None = None

    def backend_on(self, device: str | torch.device) -> Literal["numpy", "torch"]:
        """What ``backend`` means with the networks on this device."""
        if self.backend != "auto":
            return self.backend
        task = TASKS.get(self.id.rpartition(":")[2])
        return "torch" if task is not None and task.tensors is not None and torch.device(device).type != "cpu" else "numpy"


def make(
    settings: EnvSettings,
    seeds: Sequence[int],
    num_envs: int | None = None,
    *,
    drift_step: Steps | None = None,
    drift_seeds: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
) -> BatchedEnv:
    """Environments for a population: ``len(seeds)`` members with ``num_envs`` each, row = p·E + e.

    Args:
        settings: the task.
        seeds: one per member; environment e of a member is seeded from (the member's seed, e).
        num_envs: environments per member, instead of the settings' number.
        drift_step: holds the drift at what it is after this many steps of a member (or one number per member).
        drift_seeds: members' seeds for the drift, where they differ from ``seeds``: an evaluation plays other episodes
            of the task that the training has drifted to.
        device: where the networks are.

    Raises:
        ValueError: unknown id, arguments the task does not take, no such task as tensors, unsupported spaces, or an impossible
            drift.
    """
    per_member = settings.num_envs if num_envs is None else num_envs
    if per_member < 1 or not seeds:
        raise ValueError(f"num_envs = {per_member}, seeds = {list(seeds)}: at least one environment and one member are needed")
    rows = row_seeds(seeds, per_member)
    name = _resolve(settings.id)
    if name in TASKS:
        if settings.kwargs:
            raise ValueError(
                f"env.kwargs = {settings.kwargs}: the built-in {name} takes none (it does not render either); "
                "change its physics with env.drift, or pass factories of gymnasium.make environments"
            )
        task, limit = TASKS[name], settings.max_episode_steps
        env: BatchedEnv
        if settings.backend_on(device) == "numpy":
            env = task.batched(rows, kept=task.kept, max_episode_steps=limit)
        elif task.tensors is None:
            raise _no_tensors(name)
        else:
            env = task.tensors(rows, kept=task.kept, max_episode_steps=limit, device=device)
    elif settings.backend == "torch":
        raise _no_tensors(name)
    else:
        single = functools.partial(
            gymnasium.make, name, max_episode_steps=settings.max_episode_steps, disable_env_checker=True, **settings.kwargs
        )
        env = _sync([single] * len(rows), rows)
    return _with_drift(env, settings.drift, seeds, drift_step, drift_seeds)


def _no_tensors(name: str) -> ValueError:
    known = ", ".join(task.id for task in TASKS.values() if task.tensors is not None)
    return ValueError(f"env.backend = 'torch': {name} does not exist as tensors; those that do are {known}")


def make_from(
    env: str | VectorEnv[Any, Any, Any] | Sequence[EnvFactory],
    seeds: Sequence[int],
    num_envs: int = 8,
    *,
    drift: DriftSettings | None = None,
    drift_step: Steps | None = None,
    drift_seeds: Sequence[int] | None = None,
) -> BatchedEnv:
    """Environments from what a Python user holds.

    Args:
        env: an id (``num_envs`` copies per member); a list of factories, which every member gets; or a vector environment,
            whose rows are shared out equally, member by member.
        seeds, num_envs, drift_step, drift_seeds: as in `make`; ``num_envs`` matters for an id only.
        drift: makes the task change while it is being learnt.

    Raises:
        ValueError: as in `make`; or the vector environment's rows cannot be shared out equally.
        TypeError: ``env`` is none of these.
    """
    if isinstance(env, str):
        settings = EnvSettings(id=env, num_envs=num_envs, drift=drift)
        return make(settings, seeds, drift_step=drift_step, drift_seeds=drift_seeds)
    if isinstance(env, VectorEnv):
        if env.num_envs % len(seeds):
            raise ValueError(f"env has {env.num_envs} environments: they cannot be shared equally by {len(seeds)} members")
        batched = GymVectorEnv(env, row_seeds(seeds, env.num_envs // len(seeds)))
    elif isinstance(env, Sequence) and env and all(callable(factory) for factory in env):
        batched = _sync([*env] * len(seeds), row_seeds(seeds, len(env)))
    else:
        raise TypeError(
            f"env = {env!r}: must be an id, a gymnasium.vector.VectorEnv, or a list of functions that make environments"
        )
    return _with_drift(batched, drift, seeds, drift_step, drift_seeds)


def _resolve(name: str) -> str:
    """The registered id behind ``name``; ``module:id`` imports the module, as Gymnasium does."""
    module, _, bare = name.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"env.id = {name!r}: {error}") from error
    known = {*TASKS, *gymnasium.registry}
    if bare not in known:
        raise ValueError(f"env.id = {name!r}: no such environment is registered{nearest(bare, known)}")
    return bare


def _sync(factories: Sequence[EnvFactory], rows: Sequence[int]) -> GymVectorEnv:
    # DISABLED: no fake transitions, and the last observation is copied before a reset can overwrite it.
    return GymVectorEnv(SyncVectorEnv(factories, copy=False, autoreset_mode=AutoresetMode.DISABLED), rows)


def _with_drift(
    env: BatchedEnv, drift: DriftSettings | None, seeds: Sequence[int], step: Steps | None, drift_seeds: Sequence[int] | None
) -> BatchedEnv:
    if drift is None:
        return env
    if drift_seeds is not None and len(drift_seeds) != len(seeds):
        raise ValueError(f"{len(drift_seeds)} drift_seeds for {len(seeds)} members")
    wrapper = TensorDrift if isinstance(env, TensorEnv) else Drift
    return wrapper(env, drift, seeds if drift_seeds is None else drift_seeds, frozen_at=step)
