"""The one protocol through which every environment reaches the learner."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from jaxtyping import Bool, Float, Float32, Shaped

from hardy.config import nearest
from hardy.population import stream_seed


@dataclass(frozen=True, slots=True)
class EnvStep:
    """What one step of N environments returns. Arrays are fresh: the caller may keep them.

    ``reward``, ``terminated`` and ``truncated`` belong to the transition just taken; ``obs`` is what the policy sees next.
    An episode that reaches a terminal state on its last allowed step is terminated: the two flags are never both set.

    Args:
        obs: next observation. Where an episode was reset within this step it is the first one of the new episode.
        reward: reward of the transition, in the environment's own units.
        terminated: the episode ended in a terminal state, whose value is 0 by definition.
        truncated: the episode was cut off, so that its return goes on in the value of ``final_obs``.
        final_obs: last observation of the episodes that ended; only rows with ``terminated | truncated`` mean anything.
            ``None`` if no episode ended.
        is_first: ``obs`` is the first of a new episode: the memory is reset before it.
        valid: ``False`` where the environment ignored the action and only reset itself (next-step autoreset); such a
            transition is never trained on and never counted.
    """

    obs: Float32[np.ndarray, "N *obs"]
    reward: Float32[np.ndarray, "N"]
    terminated: Bool[np.ndarray, "N"]
    truncated: Bool[np.ndarray, "N"]
    final_obs: Float32[np.ndarray, "N *obs"] | None
    is_first: Bool[np.ndarray, "N"]
    valid: Bool[np.ndarray, "N"]


class BatchedEnv(abc.ABC):
    """N environments stepped together. For a population of P with E environments each, N = P·E and row = p·E + e.

    ``observation_space`` and ``action_space`` are those of a single environment. Actions are counted from 0, whatever the
    ``start`` of a discrete space; continuous ones are clipped here to the bounds of the space.
    """

    num_envs: int
    observation_space: Box
    action_space: Discrete | Box

    @abc.abstractmethod
    def reset(self) -> Float32[np.ndarray, "N *obs"]:
        """Start a new episode in every row; each row's random generator goes on from where it is."""

    @abc.abstractmethod
    def step(self, actions: Shaped[np.ndarray, "N ..."]) -> EnvStep:
        """Take one action per row; rows whose episode ends are reset.

        Raises:
            ValueError: the actions' shape, type or range does not fit the action space.
        """

    @property
    def resets_rows(self) -> bool:
        """Whether `reset_rows` works here."""
        return False

    def reset_rows(self, rows: Bool[np.ndarray, "N"]) -> Float32[np.ndarray, "N *obs"]:
        """Start a new episode in some rows, at least one; the others stay where they are.

        Returns:
            What the policy sees next; only the chosen rows mean anything.

        Raises:
            ValueError: these environments start episodes in all rows or none.
        """
        raise ValueError(f"{type(self).__name__} cannot start an episode in some rows only")

    def close(self) -> None:
        """Free what the environments hold."""
        return None

    def get_state(self) -> dict[str, Any] | None:
        """Everything needed to go on exactly, as JSON values and arrays; ``None`` if these environments cannot be saved."""
        return None

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned.

        Raises:
            ValueError: the state belongs to another number of environments, or these environments cannot be restored.
        """
        raise ValueError(f"{type(self).__name__} cannot restore a state: start new episodes with reset()")

    @property
    def physics(self) -> Mapping[str, float]:
        """Names and default values of the physical parameters that may change while the environments run."""
        return {}

    def set_physics(self, name: str, values: Float[np.ndarray, "N"]) -> None:
        """Give each row its own value of one physical parameter, from the next step on.

        Raises:
            ValueError: no such parameter, or an impossible value.
        """
        require_name("physics", name, self.physics)


def row_seeds(seeds: Sequence[int], num_envs: int) -> list[int]:
    """One seed per row, from (the member's seed, e) alone: a member meets the same episodes in any population."""
    return [stream_seed(seed, "env", index) for seed in seeds for index in range(num_envs)]


def require_name(argument: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not known.

    Raises:
        ValueError: names the argument, the name, the known ones and the nearest of them.
    """
    known = sorted(known)
    if name not in known:
        raise ValueError(f"{argument} = {name!r}: allowed are {', '.join(known) or 'none'}{nearest(name, known)}")


def as_actions(actions: Shaped[np.ndarray, "N ..."], space: Discrete | Box, num_envs: int) -> Shaped[np.ndarray, "N ..."]:
    """A policy's actions, checked and brought into the space: discrete ones gain ``start``, continuous ones are clipped.

    Raises:
        ValueError: wrong shape, type or range.
    """
    if isinstance(space, Discrete):
        if actions.shape != (num_envs,) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"actions have shape {actions.shape} and type {actions.dtype}: {space} takes ({num_envs},) integers"
            )
        if actions.min() < 0 or actions.max() >= space.n:
            raise ValueError(f"actions range from {actions.min()} to {actions.max()}: {space} takes 0 to {int(space.n) - 1}")
        return actions.astype(np.int64, copy=False) + space.start  # an unsigned action would wrap around in arithmetic
    size = int(np.prod(space.shape))
    if actions.shape[:1] != (num_envs,) or actions.size != num_envs * size:
        raise ValueError(f"actions have shape {actions.shape}: {space} takes {(num_envs, *space.shape)}")
    shaped = actions.reshape(num_envs, *space.shape).astype(space.dtype, copy=False)
    return np.clip(shaped, space.low, space.high)
