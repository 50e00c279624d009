"""The built-in classic-control tasks: all rows advance in one set of array operations, each row has its own random generator.

The arithmetic is in float64, rewards and observations leave as float32. Equations and constants are those of Gymnasium's
``CartPole-v1``, ``Pendulum-v1``, ``MountainCar-v0`` and ``MountainCarContinuous-v0``, so results compare with published ones.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete
from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped

from hardy.envs.base import BatchedEnv, EnvStep, as_actions, require_name

_PHILOX_WORDS = 13  # counter 4, key 2, buffer 4, position in the buffer, and a spare 32-bit half with its flag


class ClassicControl(BatchedEnv):
    """Base of the vectorised tasks: resets, time limit, observation entries, physics and exact state.

    Args:
        row_seeds: one seed per environment; environments share no random generator.
        kept: indices of the observation entries the policy sees; all if ``None``. Without velocities a task needs memory.
        max_episode_steps: steps until truncation; the published limit if ``None``.
    """

    full_observation_space: ClassVar[Box]
    published_time_limit: ClassVar[int]
    default_physics: ClassVar[Mapping[str, float]]
    signed_physics: ClassVar[frozenset[str]] = frozenset()
    state_size: ClassVar[int]

    def __init__(
        self, row_seeds: Sequence[int], *, kept: Sequence[int] | None = None, max_episode_steps: int | None = None
    ) -> None:
        self.num_envs = len(row_seeds)
        self.max_episode_steps = self.published_time_limit if max_episode_steps is None else max_episode_steps
        full = self.full_observation_space
        self._kept = tuple(range(full.shape[0])) if kept is None else tuple(kept)
        columns = list(self._kept)
        self.observation_space = Box(full.low[columns], full.high[columns], dtype=np.float32)
        self._generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in row_seeds]
        self._state = np.zeros((self.state_size, self.num_envs))
        self._elapsed = np.zeros(self.num_envs, dtype=np.int64)
        self._physics = {name: np.full(self.num_envs, value) for name, value in self.default_physics.items()}
        self._derive()

    @abc.abstractmethod
    def _draw(self, generator: np.random.Generator) -> Float[np.ndarray, "S"]:
        """Initial state of one episode."""

    @abc.abstractmethod
    def _advance(self, actions: Shaped[np.ndarray, "N ..."]) -> tuple[Float[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
        """Move ``_state`` on by one step; reward and terminated."""

    @abc.abstractmethod
    def _features(self) -> tuple[Float[np.ndarray, "N"], ...]:
        """The full observation, entry by entry."""

    def _derive(self) -> None:
        """Recompute what follows from the physical parameters."""
        return None

    def _observe(self) -> Float32[np.ndarray, "N O"]:
        features = self._features()
        obs = np.empty((self.num_envs, len(self._kept)), dtype=np.float32)
        for column, index in enumerate(self._kept):
            obs[:, column] = features[index]
        return obs

    def _start(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._state[:, row] = self._draw(self._generators[row])
            self._elapsed[row] = 0

    def reset(self) -> Float32[np.ndarray, "N O"]:
        self._start(range(self.num_envs))
        return self._observe()

    @property
    def resets_rows(self) -> bool:
        return True

    def reset_rows(self, rows: Bool[np.ndarray, "N"]) -> Float32[np.ndarray, "N O"]:
        self._start(rows.nonzero()[0].tolist())
        return self._observe()

    def step(self, actions: Shaped[np.ndarray, "N ..."]) -> EnvStep:
        reward, terminated = self._advance(as_actions(actions, self.action_space, self.num_envs))
        self._elapsed += 1
        truncated = (self._elapsed >= self.max_episode_steps) & ~terminated
        ended = terminated | truncated
        obs, final_obs = self._observe(), None
        rows = ended.nonzero()[0].tolist()
        if rows:
            final_obs = obs
            self._start(rows)
            obs = self._observe()
        return EnvStep(
            obs,
            reward.astype(np.float32, copy=False),
            terminated,
            truncated,
            final_obs,
            is_first=ended,
            valid=np.ones(self.num_envs, dtype=bool),
        )

    @property
    def physics(self) -> Mapping[str, float]:
        return self.default_physics

    def set_physics(self, name: str, values: Float[np.ndarray, "N"]) -> None:
        check_physics(type(self), name, values, self.num_envs)
        self._physics[name] = values.astype(np.float64)
        self._derive()

    def get_state(self) -> dict[str, Any]:
        return {
            "state": self._state.copy(),
            "elapsed": self._elapsed.copy(),
            "physics": np.stack([self._physics[name] for name in self.default_physics]),
            "generators": np.stack([_pack(generator) for generator in self._generators]),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        current = self.get_state()
        for key, array in current.items():
            found = np.shape(state[key]) if key in state else None
            if found != array.shape:
                raise ValueError(f"environment state {key!r} has shape {found}: {array.shape} is needed")
        self._state = np.array(state["state"], dtype=np.float64)
        self._elapsed = np.array(state["elapsed"], dtype=np.int64)
        self._physics = {
            name: np.array(row, dtype=np.float64) for name, row in zip(self.default_physics, state["physics"], strict=True)
        }
        for generator, words in zip(self._generators, state["generators"], strict=True):
            _unpack(generator, np.asarray(words, dtype=np.int64))
        self._derive()


def check_physics(task: type[ClassicControl], name: str, values: Float[np.ndarray, "N"], num_envs: int) -> None:
    """Refuse values of a physical parameter that a task cannot have.

    Raises:
        ValueError: no such parameter, not one value per environment, or an impossible one.
    """
    require_name("physics", name, task.default_physics)
    if values.shape != (num_envs,):
        raise ValueError(f"values of {name!r} have shape {values.shape}: one per environment is needed, ({num_envs},)")
    signed = name in task.signed_physics
    if not np.isfinite(values).all() or not (signed or (values > 0).all()):
        raise ValueError(f"{name!r} = {values.min()} … {values.max()}: must be finite{'' if signed else ' and above 0'}")


def _pack(generator: np.random.Generator) -> Int64[np.ndarray, "W"]:
    """A Philox generator's whole state as integers; int64, because every array format can hold it."""
    state: Any = generator.bit_generator.state
    last = np.array([state["buffer_pos"], state["has_uint32"], state["uinteger"]], dtype=np.uint64)
    return np.concatenate([state["state"]["counter"], state["state"]["key"], state["buffer"], last]).view(np.int64)


def _unpack(generator: np.random.Generator, words: Int64[np.ndarray, "W"]) -> None:
    numbers = words.view(np.uint64)
    position, has_uint32, uinteger = (int(number) for number in numbers[10:_PHILOX_WORDS])
    generator.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": numbers[:4], "key": numbers[4:6]},
        "buffer": numbers[6:10],
        "buffer_pos": position,
        "has_uint32": has_uint32,
        "uinteger": uinteger,
    }


def _box(*high: float) -> Box:
    bounds = np.array(high, dtype=np.float32)
    return Box(-bounds, bounds, dtype=np.float32)


class CartPole(ClassicControl):
    """A pole hinged on a cart that is pushed left (0) or right (1) with a fixed force; reward 1 per step.

    Full observation: position (m), velocity (m/s), angle (rad), angular velocity (rad/s). An episode terminates beyond 2.4 m
    or 12°. Dynamics: Barto, Sutton & Anderson (1983), in the frictionless form corrected by Florian (2007), eq. 23 and 24;
    explicit Euler, 0.02 s per step.
    """

    action_space = Discrete(2)
    full_observation_space = _box(4.8, math.inf, math.radians(24), math.inf)
    published_time_limit = 500
    default_physics: ClassVar[Mapping[str, float]] = {
        "gravity": 9.8,
        "masscart": 1.0,
        "masspole": 0.1,
        "length": 0.5,
        "force_mag": 10.0,
    }
    signed_physics = frozenset({"gravity"})
    state_size = 4
    tau = 0.02
    limits = np.array([[2.4], [math.radians(12)]])
    """Position and angle beyond which an episode terminates."""

    def _derive(self) -> None:
        self._total_mass = self._physics["masscart"] + self._physics["masspole"]
        self._polemass_length = self._physics["masspole"] * self._physics["length"]  # `length` is half the pole's
        self._backwards = -self._physics["force_mag"]

    def _draw(self, generator: np.random.Generator) -> Float64[np.ndarray, "4"]:
        return generator.uniform(-0.05, 0.05, size=4)

    def _advance(self, actions: Shaped[np.ndarray, "N ..."]) -> tuple[Float[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
        physics = self._physics
        _, velocity, angle, spin = self._state
        sin, cos = np.sin(angle), np.cos(angle)
        force = np.where(actions == 1, physics["force_mag"], self._backwards)
        push = (force + self._polemass_length * spin**2 * sin) / self._total_mass
        inertia = physics["length"] * (4 / 3 - physics["masspole"] * cos**2 / self._total_mass)
        following = np.empty_like(self._state)
        rate_of_position, acceleration, rate_of_angle, spin_rate = following
        rate_of_position[:], rate_of_angle[:] = velocity, spin
        np.divide(physics["gravity"] * sin - cos * push, inertia, out=spin_rate)
        np.subtract(push, self._polemass_length * spin_rate * cos / self._total_mass, out=acceleration)
        following *= self.tau
        following += self._state
        self._state = following
        beyond = np.abs(following[::2]) > self.limits
        return np.ones(self.num_envs, dtype=np.float32), beyond[0] | beyond[1]

    def _features(self) -> tuple[Float[np.ndarray, "N"], ...]:
        return tuple(self._state)


class Pendulum(ClassicControl):
    """A pendulum to be swung up and held with a limited torque (±2 N·m); never terminates.

    Full observation: cosine and sine of the angle from upright, angular velocity (rad/s, at most 8). Reward:
    −(angle² + 0.1·velocity² + 0.001·torque²), with angle and velocity before the step. A rod of mass m and length l;
    semi-implicit Euler, 0.05 s per step.
    """

    action_space = _box(2.0)
    full_observation_space = _box(1.0, 1.0, 8.0)
    published_time_limit = 200
    default_physics: ClassVar[Mapping[str, float]] = {"g": 10.0, "m": 1.0, "l": 1.0}
    signed_physics = frozenset({"g"})
    state_size = 2
    tau = 0.05
    max_speed = 8.0

    def _draw(self, generator: np.random.Generator) -> Float64[np.ndarray, "2"]:
        return generator.uniform((-math.pi, -1.0), (math.pi, 1.0))

    def _advance(self, actions: Shaped[np.ndarray, "N ..."]) -> tuple[Float[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
        angle, speed = self._state
        length = self._physics["l"]
        torque = actions[:, 0].astype(np.float64)
        wrapped = (angle + math.pi) % (2 * math.pi) - math.pi
        reward = -(wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2)
        acceleration = 1.5 * self._physics["g"] / length * np.sin(angle) + 3 * torque / (self._physics["m"] * length**2)
        speed = np.clip(speed + self.tau * acceleration, -self.max_speed, self.max_speed)
        self._state = np.stack((angle + self.tau * speed, speed))
        return reward, np.zeros(self.num_envs, dtype=bool)

    def _features(self) -> tuple[Float[np.ndarray, "N"], ...]:
        angle, speed = self._state
        return np.cos(angle), np.sin(angle), speed


class CarInValley(ClassicControl):
    """Base of the mountain cars (Moore 1990, PhD thesis): an underpowered car must gain momentum on the other hill first.

    Full observation: position (−1.2 … 0.6), velocity (at most 0.07 per step). Terminates at the goal, with a velocity that is
    not negative. The left wall is inelastic.
    """

    full_observation_space = Box(np.array([-1.2, -0.07], np.float32), np.array([0.6, 0.07], np.float32), dtype=np.float32)
    signed_physics = frozenset({"gravity"})
    state_size = 2
    min_position, max_position, max_speed = -1.2, 0.6, 0.07
    goal: ClassVar[float]
    """Position where an episode terminates."""

    def _draw(self, generator: np.random.Generator) -> Float64[np.ndarray, "2"]:
        return np.array((generator.uniform(-0.6, -0.4), 0.0))

    def _roll(self, push: Float64[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
        """Move ``_state`` on by one step under an acceleration of the engine's; whether the goal is reached."""
        position, speed = self._state
        speed = speed + push - self._physics["gravity"] * np.cos(3 * position)
        speed = np.clip(speed, -self.max_speed, self.max_speed)
        position = np.clip(position + speed, self.min_position, self.max_position)
        speed = np.where((position == self.min_position) & (speed < 0), 0.0, speed)
        self._state = np.stack((position, speed))
        arrived: Bool[np.ndarray, "N"] = (position >= self.goal) & (speed >= 0)
        return arrived

    def _features(self) -> tuple[Float[np.ndarray, "N"], ...]:
        return tuple(self._state)


class MountainCar(CarInValley):
    """`CarInValley` that accelerates to the left (0), not at all (1) or to the right (2); reward −1 per step, goal at 0.5."""

    action_space = Discrete(3)
    published_time_limit = 200
    default_physics: ClassVar[Mapping[str, float]] = {"force": 0.001, "gravity": 0.0025}
    goal = 0.5

    def _advance(self, actions: Shaped[np.ndarray, "N ..."]) -> tuple[Float[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
        arrived = self._roll((actions - 1) * self._physics["force"])
        return np.full(self.num_envs, -1.0, dtype=np.float32), arrived


class MountainCarContinuous(CarInValley):
    """`CarInValley` driven by a force in [−1, 1]; every step costs 0.1·force², and the goal, at 0.45, brings 100."""

    action_space = _box(1.0)
    published_time_limit = 999
    default_physics: ClassVar[Mapping[str, float]] = {"power": 0.0015, "gravity": 0.0025}
    goal = 0.45

    def _advance(self, actions: Shaped[np.ndarray, "N ..."]) -> tuple[Float[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
        force = actions[:, 0].astype(np.float64)
        arrived = self._roll(force * self._physics["power"])
        return np.where(arrived, 100.0, 0.0) - 0.1 * force**2, arrived
