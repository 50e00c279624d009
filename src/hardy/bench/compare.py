"""Two saved results side by side: ratios decide, since absolute speeds belong to a machine and its day."""

from __future__ import annotations

import dataclasses

from hardy.bench.results import Ratio, Result
from hardy.config import ConfigError

TOLERANCE = 0.10
"""Part of its old value by which a ratio may get worse."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One ratio, then and now."""

    section: str
    old: Ratio
    new: Ratio

    @property
    def factor(self) -> float:
        """The new median over the old one."""
        return self.new.median / self.old.median

    @property
    def worse_by(self) -> float:
        """Part of the old value by which the ratio got worse; negative where it got better."""
        return 1 - self.factor if self.old.better == "higher" else self.factor - 1

    @property
    def regression(self) -> bool:
        """Whether it got worse by more than the tolerance; a rounding error more does not count."""
        return self.worse_by > TOLERANCE + 1e-9


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two results have in common.

    Attributes:
        changes: of every ratio that both have, in the new result's order.
        missing: names of the ratios that one of them lacks.
        machines_differ: whether they were measured on different processors or numbers of cores.
        compiled_differs: whether only one of them was measured with Hardy's compiled library.
    """

    changes: tuple[Change, ...]
    missing: tuple[str, ...]
    machines_differ: bool
    compiled_differs: bool

    @property
    def regressions(self) -> list[Change]:
        """The changes that are too much for the worse."""
        return [change for change in self.changes if change.regression]


def compare(old: Result, new: Result) -> Comparison:
    """Compare every ratio of the same section and name.

    Raises:
        ConfigError: the results have no ratio in common.
    """
    before, after = _ratios(old), _ratios(new)
    shared = [key for key in after if key in before and after[key].better == before[key].better]
    if not shared:
        raise ConfigError([f"the results of {old.date} and {new.date} have no ratio in common: measure the same sections"])
    missing = [f"{section}: {name}" for section, name in sorted({*before, *after} - set(shared))]
    return Comparison(
        changes=tuple(Change(key[0], before[key], after[key]) for key in shared),
        missing=tuple(missing),
        machines_differ=(old.machine.processor, old.machine.cores) != (new.machine.processor, new.machine.cores),
        compiled_differs=old.machine.compiled != new.machine.compiled,
    )


def _ratios(result: Result) -> dict[tuple[str, str], Ratio]:
    return {(section.name, found.name): found for section in result.sections for found in section.ratios}
