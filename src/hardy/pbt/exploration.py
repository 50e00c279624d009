"""Exploration: the hyperparameters a population starts with, and those that a member tries after it copied another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from hardy.config import nearest
from hardy.pbt.settings import HyperparameterSpace, PBTRules
from hardy.population import stream_seed


@dataclass(frozen=True)
class Gain:
    """What one member gained between two exchanges: the data of ``explore = "pb2"``.

    Args:
        round: number of the exchange at the end of that time.
        member: whose gain it is.
        hyperparams: the values it trained with, by dotted path.
        gain: its score at the end less that at the beginning.
    """

    round: int
    member: int
    hyperparams: Mapping[str, float]
    gain: float


def draw_initial(rules: PBTRules, size: int, seed: int) -> dict[str, Float[np.ndarray, "P"]]:
    """The values that a population starts with, each drawn evenly from the whole of its space.

    A number depends on the seed, the member and the name only: a larger population begins with the same members.
    """
    return {
        name: np.array([_from_whole_range(space, _generator(seed, "initial", member, name)) for member in range(size)])
        for name, space in rules.hyperparams.items()
    }


def explore(
    hyperparams: Mapping[str, Float[np.ndarray, "P"]],
    replaced: Bool[np.ndarray, "P"],
    rules: PBTRules,
    *,
    seed: int,
    round: int,
    history: Sequence[Gain] = (),
) -> dict[str, Float[np.ndarray, "P"]]:
    """New values for the members that copied another, and for nobody else (Jaderberg et al. 2017, section 4.1).

    Each (member, hyperparameter) has a draw of its own: a step up or down with equal probability, on the scale on which the
    space is even, or a new value from the whole range, as ``rules.explore`` says. A copied value outside the bounds is brought
    to the nearest bound first, and one that is not finite is drawn anew. Results lie inside the bounds.

    Args:
        hyperparams: values after the copy, by dotted path. Those that ``rules.hyperparams`` does not name are returned as they
            are.
        replaced: members that took over another's hyperparameters.
        rules: the spaces, and how to explore.
        seed: of the run. Every draw has a stream of its own, named by seed, round, member and hyperparameter.
        round: number of this exchange, from 1.
        history: of all members so far, for ``explore = "pb2"``; the other ways do not read it.

    Returns:
        Fresh float64 arrays, in the order of ``hyperparams``.

    Raises:
        ValueError: a hyperparameter of the rules is missing, or an array has not one number per member.
    """
    for name in rules.hyperparams:
        if name not in hyperparams:
            raise ValueError(f"no values for hyperparameter '{name}', which the rules tune{nearest(name, hyperparams)}")
    values = {name: np.array(column, dtype=np.float64) for name, column in hyperparams.items()}
    for name, column in values.items():
        if column.shape != replaced.shape:
            raise ValueError(f"hyperparameter '{name}' has shape {column.shape}: replaced names {len(replaced)} members")
    members = [int(member) for member in np.flatnonzero(replaced)]
    if rules.explore == "pb2":
        _suggested_(values, members, rules, history, seed, round)
        return values
    for name, space in rules.hyperparams.items():
        chance = {"perturb": 0.0, "resample": 1.0, "both": space.resample_probability}[rules.explore]
        for member in members:
            generator = _generator(seed, "explore", round, member, name)
            value = float(values[name][member])
            if not math.isfinite(value) or generator.random() < chance:
                values[name][member] = _from_whole_range(space, generator)
            else:
                values[name][member] = _step(value, space, up=generator.random() < 0.5)
    return values


def _suggested_(
    values: dict[str, Float[np.ndarray, "P"]],
    members: list[int],
    rules: PBTRules,
    history: Sequence[Gain],
    seed: int,
    round: int,
) -> None:
    """Write the suggestions of PB2 for ``members`` into ``values``."""
    from hardy.pbt.pb2 import suggest  # no other way of exploring needs a Gaussian process

    if not members:
        return
    size = len(next(iter(values.values())))
    running = [
        {name: float(values[name][member]) for name in rules.hyperparams} for member in range(size) if member not in members
    ]
    suggestions = suggest(rules, history, running, len(members), seed=seed, round=round)
    for member, suggestion in zip(members, suggestions, strict=True):
        for name in rules.hyperparams:
            values[name][member] = suggestion[name]


def _generator(seed: int, *stream: int | str) -> np.random.Generator:
    return np.random.default_rng(stream_seed(seed, *stream))


def _from_whole_range(space: HyperparameterSpace, generator: np.random.Generator) -> float:
    return space.from_even(generator.uniform(space.to_even(space.low), space.to_even(space.high)))


def _step(value: float, space: HyperparameterSpace, *, up: bool) -> float:
    width = (space.factor - 1) * (space.high - space.low) if space.space == "linear" else math.log(space.factor)
    inside = min(max(value, space.low), space.high)
    return space.from_even(space.to_even(inside) + (width if up else -width))
