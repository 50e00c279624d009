"""A walk along a cliff in gusty wind, where the way with the best mean and the way with the best bad end differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from jaxtyping import Bool, Float, Float64, Shaped

from hardy.envs.classic import ClassicControl

LENGTH = 6
"""Steps from start to goal; the columns in between, one fewer, are where there is wind."""
EDGE, ROUGH = 0, 1
PHYSICS = {"gust": 0.03, "fall": 20.0, "rough": 0.8}
"""Probability of a fall at each step on the edge, what a fall costs, what a step over the rough ground costs besides 1."""


def path_returns(choices: Sequence[int], gamma: float = 1.0) -> tuple[Float64[np.ndarray, "K"], Float64[np.ndarray, "K"]]:
    """Every possible return of a path, ascending, and its probability.

    Args:
        choices: `EDGE` or `ROUGH` for each of the ``LENGTH − 1`` windy columns.
        gamma: discount of the returns.
    """
    gust, fall, rough = (PHYSICS[name] for name in ("gust", "fall", "rough"))
    outcomes, alive, total = [], 1.0, 0.0
    for k, choice in enumerate(choices):
        if choice == EDGE:
            outcomes.append((total - gamma**k * (1 + fall), alive * gust))
            alive *= 1 - gust
        total -= gamma**k * (1 + rough * (choice == ROUGH))
    outcomes.append((total - gamma ** len(choices), alive))
    values, probabilities = zip(*sorted(outcomes), strict=True)
    return np.array(values), np.array(probabilities)


class WindyCliff(ClassicControl):
    """A walk of six steps, each along the edge of a cliff (0) or over the rough ground behind it (1).

    Observation: column, and row (0 at the edge). A step costs 1, over rough ground 0.8 more, and the last one leads to the goal
    wherever it comes from. At each of the five steps before, a gust on the edge ends the walk with the probability ``gust``
    in a fall that costs 20. Straight along the edge has the best mean, the rough ground the best bad end, and for CVaR in
    between the best path is known in closed form (`path_returns`).
    """

    action_space = Discrete(2)
    full_observation_space = Box(np.zeros(2, np.float32), np.array([LENGTH, 1], np.float32), dtype=np.float32)
    published_time_limit = LENGTH
    default_physics: ClassVar[Mapping[str, float]] = PHYSICS
    state_size = 2

    def _draw(self, generator: np.random.Generator) -> Float64[np.ndarray, "2"]:
        return np.zeros(2)

    def _advance(self, actions: Shaped[np.ndarray, "N ..."]) -> tuple[Float[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
        luck = np.array([generator.random() for generator in self._generators])
        column = self._state[0] + 1
        self._state = np.stack((column, actions.astype(np.float64)))
        arrived = column >= LENGTH
        fallen = ~arrived & (actions == EDGE) & (luck < self._physics["gust"])
        slow = ~arrived & (actions == ROUGH)
        reward = -1.0 - self._physics["fall"] * fallen - self._physics["rough"] * slow
        return reward, fallen | arrived

    def _features(self) -> tuple[Float[np.ndarray, "N"], ...]:
        return tuple(self._state)


class WindyCliffEnv(gymnasium.Env[Any, Any]):
    """The same walk as an ordinary Gymnasium environment."""

    action_space = WindyCliff.action_space
    observation_space = WindyCliff.full_observation_space

    def __init__(self, gust: float = PHYSICS["gust"], fall: float = PHYSICS["fall"], rough: float = PHYSICS["rough"]) -> None:
        self.gust, self.fall, self.rough = gust, fall, rough
        self.column = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Back to the start."""
        super().reset(seed=seed)
        self.column = 0
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step of the walk."""
        self.column += 1
        reward, ended = -1.0, self.column == LENGTH
        if not ended and action == ROUGH:
            reward -= self.rough
        elif not ended and self.np_random.random() < self.gust:
            reward, ended = reward - self.fall, True
        return np.array([self.column, action], dtype=np.float32), reward, ended, False, {}
