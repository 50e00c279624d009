"""Any ``gymnasium.vector.VectorEnv`` behind the batched protocol, whatever its autoreset mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete, Space
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from jaxtyping import Bool, Float, Float32, Shaped

from hardy.envs.base import BatchedEnv, EnvStep, as_actions, require_name


class GymVectorEnv(BatchedEnv):
    """Adapter that gives the three autoreset modes of Gymnasium one meaning.

    * ``SAME_STEP``: the environment resets within the step; the last observation comes from ``infos["final_obs"]``.
    * ``DISABLED``: the adapter resets the ended rows itself, so the result is that of ``SAME_STEP``.
    * ``NEXT_STEP``: the step that ends an episode returns its last observation; the next action of that row is ignored and
      the environment resets. That transition has ``valid = False`` and ``is_first = True``.

    Observations and rewards become float32; NaN and infinite ones are passed on. Flags raised on an ignored action are dropped.

    Args:
        env: the vector environment; the adapter owns it from here on and closes it.
        row_seeds: one seed per row, used at the first reset. Synchronous and asynchronous Gymnasium environments give each row
            its own; any other kind knows a single seed, and gets the first one.

    Raises:
        ValueError: the autoreset mode is missing or unknown, a space is not supported, or the number of seeds is wrong.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], row_seeds: Sequence[int]) -> None:
        if len(row_seeds) != env.num_envs:
            raise ValueError(f"{len(row_seeds)} seeds for {env.num_envs} environments")
        self.num_envs = env.num_envs
        self.observation_space = _observation_space(env.single_observation_space)
        self.action_space = _action_space(env.single_action_space)
        self._env = env
        self._mode = _autoreset_mode(env)
        # Many environments keep their seed in 32 bits.
        self._seeds: list[int | None] | None = [seed % 2**31 for seed in row_seeds]
        self._ended = np.zeros(self.num_envs, dtype=bool)
        self._physics = _numeric_attributes(env)

    def reset(self) -> Float32[np.ndarray, "N *obs"]:
        seed: Any = self._seeds
        if seed is not None and not isinstance(self._env.unwrapped, (SyncVectorEnv, AsyncVectorEnv)):
            seed = seed[0]
        obs, _ = self._env.reset(seed=seed)
        self._seeds = None
        self._ended = np.zeros(self.num_envs, dtype=bool)
        return _as_float32(obs)

    def step(self, actions: Shaped[np.ndarray, "N ..."]) -> EnvStep:
        raw, reward, terminated, truncated, infos = self._env.step(as_actions(actions, self.action_space, self.num_envs))
        obs = _as_float32(raw)
        ignored = self._ended if self._mode is AutoresetMode.NEXT_STEP else np.zeros(self.num_envs, dtype=bool)
        reward = np.where(ignored, np.float32(0), _as_float32(reward))
        terminated = np.asarray(terminated, dtype=bool) & ~ignored
        truncated = np.asarray(truncated, dtype=bool) & ~terminated & ~ignored
        self._ended = ended = terminated | truncated
        final_obs, is_first = None, ended
        if self._mode is AutoresetMode.NEXT_STEP:
            is_first = ignored
        if ended.any():
            final_obs = obs
            if self._mode is AutoresetMode.SAME_STEP:
                final_obs = self._final_obs(obs, ended, infos)
            elif self._mode is AutoresetMode.DISABLED:
                obs = np.where(_rows_of(ended, obs), self.reset_rows(ended), obs)
        return EnvStep(obs, reward, terminated, truncated, final_obs, is_first=is_first, valid=~ignored)

    def _final_obs(
        self, obs: Float32[np.ndarray, "N *obs"], ended: Bool[np.ndarray, "N"], infos: Mapping[str, Any]
    ) -> Float32[np.ndarray, "N *obs"]:
        if "final_obs" not in infos:
            raise ValueError(
                f"{self._env} resets in the same step, but infos has no 'final_obs' (only: {', '.join(sorted(infos))}): "
                "a truncated episode's value needs its last observation"
            )
        final = obs.copy()
        for row in ended.nonzero()[0]:
            final[row] = _as_float32(infos["final_obs"][row])
        return final

    @property
    def resets_rows(self) -> bool:
        # Others may take the mask of the option for a reset of everything.
        known = isinstance(self._env.unwrapped, (SyncVectorEnv, AsyncVectorEnv))
        return known or self._mode is AutoresetMode.DISABLED

    def reset_rows(self, rows: Bool[np.ndarray, "N"]) -> Float32[np.ndarray, "N *obs"]:
        if not self.resets_rows:
            return super().reset_rows(rows)
        fresh, _ = self._env.reset(options={"reset_mask": rows.copy()})
        self._ended = self._ended & ~rows
        return _as_float32(fresh)

    def close(self) -> None:
        self._env.close()

    @property
    def physics(self) -> Mapping[str, float]:
        """Numeric attributes of the unwrapped environments; empty where the environments live in other processes."""
        return self._physics

    def set_physics(self, name: str, values: Float[np.ndarray, "N"]) -> None:
        require_name("physics", name, self._physics)
        for single, value in zip(self._env.unwrapped.envs, values, strict=True):  # type: ignore[attr-defined]
            setattr(single.unwrapped, name, float(value))


def _rows_of(rows: Bool[np.ndarray, "N"], values: Shaped[np.ndarray, "N ..."]) -> Bool[np.ndarray, "N ..."]:
    """The mask with as many axes as ``values``."""
    return rows.reshape(-1, *([1] * (values.ndim - 1)))


def _as_float32(value: Any) -> Float32[np.ndarray, "..."]:
    """A float32 copy; what float32 cannot hold becomes infinite and is left for the learner to see."""
    with np.errstate(over="ignore"):
        return np.array(value, dtype=np.float32)


def _autoreset_mode(env: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    mode = env.metadata.get("autoreset_mode")
    try:
        return AutoresetMode(mode)
    except ValueError:
        allowed = ", ".join(f"AutoresetMode.{item.name}" for item in AutoresetMode)
        raise ValueError(f"{env}: metadata['autoreset_mode'] = {mode!r}, must be one of {allowed}") from None


def _observation_space(space: Space[Any]) -> Box:
    if not isinstance(space, Box):
        raise ValueError(f"observation space {space} is not supported: it must be a Box")
    return Box(_as_float32(space.low), _as_float32(space.high), dtype=np.float32)


def _action_space(space: Space[Any]) -> Discrete | Box:
    if isinstance(space, Discrete) or (isinstance(space, Box) and np.issubdtype(space.dtype, np.floating)):
        return space
    raise ValueError(f"action space {space} is not supported: it must be Discrete or a Box of floats")


def _numeric_attributes(env: VectorEnv[Any, Any, Any]) -> dict[str, float]:
    base = env.unwrapped
    if not isinstance(base, SyncVectorEnv):
        return {}
    attributes = vars(base.envs[0].unwrapped)
    return {
        name: float(value)
        for name, value in attributes.items()
        if isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and not name.startswith("_")
    }
