"""What can be measured, and which options have an effect on which section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from hardy.config import ConfigError, Settings, nearest, settings_from_dict
from hardy.parallel import MOST_THREADS

ALL = "all"
SECTIONS: dict[str, tuple[str, ...]] = {
    "throughput": ("envs", "population", "threads", "seconds", "repeats"),
    "population": ("envs", "population", "threads", "seconds", "repeats"),
    "optimizer": ("threads", "seconds", "repeats"),
    "recurrence": ("envs", "population", "threads", "seconds", "repeats"),
    "environments": ("envs", "seconds", "repeats"),
    "scaling": ("envs", "threads", "seconds", "repeats"),
    "memory": ("envs", "population", "threads", "repeats"),
}
"""By name, with the options that have an effect there."""
MINIBATCHES = 4
"""Of the common work; each holds whole sequences, so there are at least as many environments."""
_TRAINING = ("throughput", "population", "scaling", "memory")


class Options(Settings):
    """What the user asks for; ``None`` leaves the choice to the section.

    Attributes:
        envs: environments of each member.
        population: members.
        threads: processor threads.
        seconds: length of one repeat of one measurement.
        repeats: of every measurement.
        hidden: width of the encoder and of the LSTM; only tests change it, the common work has 128.
    """

    envs: tuple[int, ...] | None = Field(None, min_length=1)
    population: tuple[int, ...] | None = Field(None, min_length=1)
    threads: int | None = Field(None, ge=1, le=MOST_THREADS)
    seconds: float | None = Field(None, gt=0, le=3600)
    repeats: int | None = Field(None, ge=1, le=1000)
    hidden: int = Field(128, ge=1)


def choose(section: str, given: Mapping[str, Any]) -> tuple[list[str], Options]:
    """The sections to measure and their options.

    Args:
        section: one of `SECTIONS`, or ``all``.
        given: values by name; ``None`` where an option is not given.

    Raises:
        ConfigError: an unknown section, an impossible value, or an option that has no effect on any of the sections.
    """
    allowed = [*SECTIONS, ALL]
    if section not in allowed:
        raise ConfigError([f"SECTION {section}: must be one of {', '.join(allowed)}{nearest(section, allowed)}"])
    chosen = list(SECTIONS) if section == ALL else [section]
    useful = {option for name in chosen for option in SECTIONS[name]}
    wanted = {name: value for name, value in given.items() if value is not None}
    problems = [
        f"--{name}: has no effect on {section}, whose options are {', '.join(f'--{option}' for option in SECTIONS[section])}"
        for name in wanted
        if name not in useful
    ]
    for name in ("envs", "population"):
        least = MINIBATCHES if name == "envs" and set(chosen) & set(_TRAINING) else 1
        why = f", since the work has {MINIBATCHES} minibatches of whole sequences" if least > 1 else ""
        values = wanted.get(name, ())
        problems += [f"--{name} {value}: must be at least {least}{why}" for value in values if value < least]
        problems += [f"--{name} {value}: is given twice" for value in sorted(set(values)) if list(values).count(value) > 1]
    try:
        options = settings_from_dict(Options, wanted)
    except ConfigError as error:
        problems += [f"--{problem.removesuffix(' or null')}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return chosen, options
