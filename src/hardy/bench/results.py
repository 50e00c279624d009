"""What a benchmark leaves: numbers with their repeats and spread, what they were measured on, and the file that holds them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hardy.checkpoint import write_json_atomic
from hardy.config import ConfigError, Settings, nearest, settings_from_dict

FILE = "bench.json"
Better = Literal["higher", "lower"]
Unit = Literal["steps/s", "GFLOP/s", "ms", "MiB"]


class Repeated(Settings):
    """A number that was measured several times."""

    name: str = Field(min_length=1)
    repeats: tuple[float, ...] = Field(min_length=1)
    median: float
    low: float
    high: float
    """Lowest and highest repeat: the spread."""

    @model_validator(mode="after")
    def _summary_fits(self) -> Self:
        if (self.median, self.low, self.high) != _summary(self.repeats):
            raise ValueError(f"{self.name}: median, low and high are not those of its repeats")
        return self


class Measurement(Repeated):
    """A speed, a time or an amount of memory.

    Attributes:
        group: what is drawn side by side, such as ``N = 8``.
        label: what tells it apart within the group, such as ``P = 4``; the name is both.
        x: the label as a number, where the group is a curve.
    """

    group: str
    label: str
    unit: Unit
    x: int | None = None


class Ratio(Repeated):
    """A number without unit, such as one speed over another: what can be compared between runs and machines."""

    median: float = Field(gt=0, allow_inf_nan=False)
    better: Better


class Part(Settings):
    """What a section has found since the last part."""

    measurements: tuple[Measurement, ...] = ()
    ratios: tuple[Ratio, ...] = ()


class SectionResult(Part):
    """One section; ``complete`` is false where it was interrupted.

    Attributes:
        others: share of the machine's processor time that other programs took meanwhile, ``None`` where that is not known.
    """

    name: str
    complete: bool
    others: float | None = None


class Machine(Settings):
    """What the figures depend on besides the code."""

    processor: str
    cores: int
    memory_mib: int
    system: str
    compiled: bool
    """Whether Hardy's compiled library was used."""
    versions: dict[str, str]


class Result(Settings):
    """Content of ``bench.json``.

    Attributes:
        format: of the file; another one is refused.
        date: when the measurement began, UTC, ISO 8601.
        peers: the comparison with other libraries, where it was made.
    """

    format: Literal[1] = 1
    date: str
    machine: Machine
    sections: tuple[SectionResult, ...] = ()
    peers: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        for kind in ("measurements", "ratios"):
            names = [(section.name, found.name) for section in self.sections for found in getattr(section, kind)]
            if len(set(names)) != len(names):
                raise ValueError(f"{kind}: a name stands twice")
        return self


def measurement(group: str, label: str, unit: Unit, repeats: Sequence[float], x: int | None = None) -> Measurement:
    """A `Measurement` with its summary."""
    median, low, high = _summary(repeats)
    return Measurement(
        name=f"{group}, {label}", group=group, label=label, unit=unit, x=x, repeats=tuple(repeats), median=median, low=low,
        high=high,
    )  # fmt: skip


def ratio(name: str, better: Better, above: Sequence[float], below: Sequence[float]) -> Ratio:
    """``above / below``, repeat by repeat: those of one turn, so that a machine that slows down slows both."""
    repeats = tuple(first / second for first, second in zip(above, below, strict=True))
    median, low, high = _summary(repeats)
    return Ratio(name=name, better=better, repeats=repeats, median=median, low=low, high=high)


def save(result: Result, folder: Path) -> Path:
    """Write ``bench.json`` into a folder, which is made if need be."""
    write_json_atomic(folder / FILE, result.model_dump(mode="json"))
    return folder / FILE


def load(path: Path) -> Result:
    """Read a saved result.

    Raises:
        ConfigError: the file cannot be read or is no result of ``hardy bench``.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError([f"{path}: no such file{nearest(path.name, siblings)}"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except ValueError:
        raise ConfigError([f"{path}: is no JSON: expected a {FILE} that hardy bench has written"]) from None
    if not isinstance(document, dict) or "sections" not in document:
        raise ConfigError([f"{path}: is no result of hardy bench: expected a {FILE} that it has written"])
    try:
        return settings_from_dict(Result, document)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None


def count_threads(threads: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{threads} thread{'' if threads == 1 else 's'}"


def _summary(repeats: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(repeats), min(repeats), max(repeats)
