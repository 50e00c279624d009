"""The built-in tasks as tensors on any device: what a rollout needs of them never leaves it.

Equations, limits and constants are those of `hardy.envs.classic`, where the numbers stand; both calculate in float64.
The start of an episode follows from (the row's seed, the number of the episode) by a counter-based generator: a step asks
the host for nothing and is the same on every device.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.spaces import Box
from jaxtyping import Bool, Float, Float32, Float64, Shaped
from torch import Tensor

from hardy.envs.base import BatchedEnv, EnvStep, as_actions
from hardy.envs.classic import (
    CarInValley,
    CartPole,
    ClassicControl,
    MountainCar,
    MountainCarContinuous,
    Pendulum,
    check_physics,
)
from hardy.splitmix import split_mix, uniform


@dataclass(frozen=True, slots=True)
class TensorStep:
    """What one step of N environments returns, as in `EnvStep`. Every row counts; ``obs`` begins an episode where ``ended``."""

    obs: Float32[Tensor, "N O"]
    reward: Float32[Tensor, "N"]
    terminated: Bool[Tensor, "N"]
    truncated: Bool[Tensor, "N"]
    final_obs: Float32[Tensor, "N O"]
    """The observation before any reset: what ``obs`` is where the episode goes on."""

    @property
    def ended(self) -> Bool[Tensor, "N"]:
        """Whether an episode ended with this step."""
        return self.terminated | self.truncated


class TensorEnv(BatchedEnv):
    """N environments whose state lives in tensors of one device, which keep their addresses.

    `step_tensor` asks for no number on the host, so that it can be captured in a CUDA graph and replayed; what the host has to
    do before a step is done by `prepare_step`. The interface of `BatchedEnv` is the same environments seen through arrays.
    """

    device: torch.device

    @abc.abstractmethod
    def reset_tensor(self) -> Float32[Tensor, "N O"]:
        """Start a new episode in every row."""

    @abc.abstractmethod
    def step_tensor(self, actions: Shaped[Tensor, "N ..."]) -> TensorStep:
        """Take one action per row and reset the rows whose episode ends.

        Continuous actions are clipped; that discrete ones are in range is not checked.
        """

    def prepare_step(self) -> None:
        """Do the host's part of the next step; before each `step_tensor`."""
        return None

    def reset(self) -> Float32[np.ndarray, "N O"]:
        return _array(self.reset_tensor())

    def step(self, actions: Shaped[np.ndarray, "N ..."]) -> EnvStep:
        checked = np.ascontiguousarray(as_actions(actions, self.action_space, self.num_envs))
        self.prepare_step()
        step = self.step_tensor(torch.from_numpy(checked).to(self.device))
        ended = _array(step.ended)
        return EnvStep(
            _array(step.obs),
            _array(step.reward),
            _array(step.terminated),
            _array(step.truncated),
            _array(step.final_obs) if ended.any() else None,
            is_first=ended,
            valid=np.ones(self.num_envs, dtype=bool),
        )


class TensorTask(TensorEnv):
    """Base of the tasks: resets, time limit, observation entries, physics and exact state.

    Args:
        row_seeds: one seed per environment.
        kept: indices of the observation entries the policy sees; all if ``None``.
        max_episode_steps: steps until truncation; the published limit if ``None``.
        device: where the environments live.
    """

    twin: ClassVar[type[ClassicControl]]
    """The same task as arrays, which holds its spaces and constants."""

    def __init__(
        self,
        row_seeds: Sequence[int],
        *,
        kept: Sequence[int] | None = None,
        max_episode_steps: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        twin = self.twin
        self.num_envs, self.device = len(row_seeds), torch.device(device)
        self.max_episode_steps = twin.published_time_limit if max_episode_steps is None else max_episode_steps
        self.action_space = twin.action_space
        full = twin.full_observation_space
        self._kept = tuple(range(full.shape[0])) if kept is None else tuple(kept)
        columns = list(self._kept)
        self.observation_space = Box(full.low[columns], full.high[columns], dtype=np.float32)
        if isinstance(self.action_space, Box):
            self._lowest, self._highest = float(self.action_space.low[0]), float(self.action_space.high[0])
        self._keys = torch.tensor(row_seeds, dtype=torch.int64, device=self.device)
        self._episodes = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        """Episodes begun in each row."""
        self._elapsed = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self._state = torch.zeros(twin.state_size, self.num_envs, dtype=torch.float64, device=self.device)
        defaults = torch.tensor(list(twin.default_physics.values()), dtype=torch.float64)
        self._physics = defaults[:, None].repeat(1, self.num_envs).to(self.device)

    @abc.abstractmethod
    def _initial(self, uniform: Float64[Tensor, "S N"]) -> Float64[Tensor, "S N"]:
        """Initial states from numbers uniform in [0, 1)."""

    @abc.abstractmethod
    def _advance(
        self, actions: Shaped[Tensor, "N"], physics: Mapping[str, Tensor]
    ) -> tuple[Float64[Tensor, "S N"], Float[Tensor, "N"], Bool[Tensor, "N"]]:
        """State, reward and terminated after one step from ``_state``."""

    def _features(self) -> Sequence[Float64[Tensor, "N"]]:
        """The full observation, entry by entry."""
        return self._state.unbind(0)

    def _observe(self) -> Float32[Tensor, "N O"]:
        features = self._features()
        return torch.stack([features[index] for index in self._kept], dim=1).float()

    def _begin(self, where: Bool[Tensor, "N"]) -> None:
        size = self._state.shape[0]
        counter = self._episodes * size + torch.arange(size, device=self.device)[:, None]
        fresh = self._initial(uniform(split_mix(counter, self._keys)))
        self._state.copy_(torch.where(where, fresh, self._state))
        self._elapsed.masked_fill_(where, 0)
        self._episodes.add_(where)

    def reset_tensor(self) -> Float32[Tensor, "N O"]:
        self._begin(torch.ones(self.num_envs, dtype=torch.bool, device=self.device))
        return self._observe()

    @property
    def resets_rows(self) -> bool:
        return True

    def reset_rows(self, rows: Bool[np.ndarray, "N"]) -> Float32[np.ndarray, "N O"]:
        self._begin(torch.from_numpy(rows).to(self.device))
        return _array(self._observe())

    def step_tensor(self, actions: Shaped[Tensor, "N ..."]) -> TensorStep:
        if isinstance(self.action_space, Box):  # in the space's own precision, as the arrays
            actions = actions.reshape(self.num_envs).float().clamp(self._lowest, self._highest).double()
        physics = dict(zip(self.twin.default_physics, self._physics.unbind(0), strict=True))
        state, reward, terminated = self._advance(actions, physics)
        self._state.copy_(state)
        self._elapsed.add_(1)
        truncated = (self._elapsed >= self.max_episode_steps) & ~terminated
        final_obs = self._observe()
        self._begin(terminated | truncated)
        return TensorStep(self._observe(), reward.float(), terminated, truncated, final_obs)

    @property
    def physics(self) -> Mapping[str, float]:
        return self.twin.default_physics

    def set_physics(self, name: str, values: Float[np.ndarray, "N"]) -> None:
        check_physics(self.twin, name, values, self.num_envs)
        self._physics[list(self.twin.default_physics).index(name)].copy_(torch.from_numpy(values))

    def get_state(self) -> dict[str, Any]:
        return {name: _array(tensor).copy() for name, tensor in self._saved().items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for name, tensor in self._saved().items():
            found = np.shape(state[name]) if name in state else None
            if found != tuple(tensor.shape):
                raise ValueError(f"environment state {name!r} has shape {found}: {tuple(tensor.shape)} is needed")
        for name, tensor in self._saved().items():
            tensor.copy_(torch.from_numpy(np.asarray(state[name])))

    def _saved(self) -> dict[str, Tensor]:
        return {
            "state": self._state,
            "elapsed": self._elapsed,
            "physics": self._physics,
            "keys": self._keys,
            "episodes": self._episodes,
        }


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


class TensorCartPole(TensorTask):
    """`CartPole` as tensors."""

    twin = CartPole

    def _initial(self, uniform: Float64[Tensor, "S N"]) -> Float64[Tensor, "S N"]:
        return uniform * 0.1 - 0.05

    def _advance(
        self, actions: Shaped[Tensor, "N"], physics: Mapping[str, Tensor]
    ) -> tuple[Float64[Tensor, "S N"], Float[Tensor, "N"], Bool[Tensor, "N"]]:
        position, velocity, angle, spin = self._state
        total_mass = physics["masscart"] + physics["masspole"]
        polemass_length = physics["masspole"] * physics["length"]
        sin, cos = angle.sin(), angle.cos()
        force = torch.where(actions == 1, physics["force_mag"], -physics["force_mag"])
        push = (force + polemass_length * spin.square() * sin) / total_mass
        inertia = physics["length"] * (4 / 3 - physics["masspole"] * cos.square() / total_mass)
        spin_rate = (physics["gravity"] * sin - cos * push) / inertia
        acceleration = push - polemass_length * spin_rate * cos / total_mass
        rates = torch.stack([velocity, acceleration, spin, spin_rate])
        following = self._state + CartPole.tau * rates
        limits = CartPole.limits[:, 0].tolist()
        beyond = (following[0].abs() > limits[0]) | (following[2].abs() > limits[1])
        return following, torch.ones_like(position), beyond


class TensorPendulum(TensorTask):
    """`Pendulum` as tensors."""

    twin = Pendulum

    def _initial(self, uniform: Float64[Tensor, "S N"]) -> Float64[Tensor, "S N"]:
        angle, speed = 2 * uniform - 1
        return torch.stack([math.pi * angle, speed])

    def _advance(
        self, actions: Shaped[Tensor, "N"], physics: Mapping[str, Tensor]
    ) -> tuple[Float64[Tensor, "S N"], Float[Tensor, "N"], Bool[Tensor, "N"]]:
        angle, speed = self._state
        length = physics["l"]
        wrapped = (angle + math.pi) % (2 * math.pi) - math.pi
        reward = -(wrapped.square() + 0.1 * speed.square() + 0.001 * actions.square())
        acceleration = 1.5 * physics["g"] / length * angle.sin() + 3 * actions / (physics["m"] * length.square())
        speed = (speed + Pendulum.tau * acceleration).clamp(-Pendulum.max_speed, Pendulum.max_speed)
        return torch.stack([angle + Pendulum.tau * speed, speed]), reward, torch.zeros_like(angle, dtype=torch.bool)

    def _features(self) -> Sequence[Float64[Tensor, "N"]]:
        angle, speed = self._state
        return angle.cos(), angle.sin(), speed


class TensorCarInValley(TensorTask):
    """`CarInValley` as tensors."""

    twin: ClassVar[type[CarInValley]]

    def _initial(self, uniform: Float64[Tensor, "S N"]) -> Float64[Tensor, "S N"]:
        return torch.stack([0.2 * uniform[0] - 0.6, torch.zeros_like(uniform[1])])

    def _roll(
        self, push: Float64[Tensor, "N"], gravity: Float64[Tensor, "N"]
    ) -> tuple[Float64[Tensor, "S N"], Bool[Tensor, "N"]]:
        """State after one step under an acceleration of the engine's, and whether the goal is reached."""
        car = self.twin
        position, speed = self._state
        speed = speed + push - gravity * (3 * position).cos()
        speed = speed.clamp(-car.max_speed, car.max_speed)
        position = (position + speed).clamp(car.min_position, car.max_position)
        speed = torch.where((position == car.min_position) & (speed < 0), 0.0, speed)
        return torch.stack([position, speed]), (position >= car.goal) & (speed >= 0)


class TensorMountainCar(TensorCarInValley):
    """`MountainCar` as tensors."""

    twin = MountainCar

    def _advance(
        self, actions: Shaped[Tensor, "N"], physics: Mapping[str, Tensor]
    ) -> tuple[Float64[Tensor, "S N"], Float[Tensor, "N"], Bool[Tensor, "N"]]:
        state, arrived = self._roll((actions - 1) * physics["force"], physics["gravity"])
        return state, torch.full_like(state[0], -1.0), arrived


class TensorMountainCarContinuous(TensorCarInValley):
    """`MountainCarContinuous` as tensors."""

    twin = MountainCarContinuous

    def _advance(
        self, actions: Shaped[Tensor, "N"], physics: Mapping[str, Tensor]
    ) -> tuple[Float64[Tensor, "S N"], Float[Tensor, "N"], Bool[Tensor, "N"]]:
        state, arrived = self._roll(actions * physics["power"], physics["gravity"])
        return state, torch.where(arrived, 100.0, 0.0) - 0.1 * actions.square(), arrived
