"""The history of a population, ``population.csv``: who scored what, and who went on with whose weights and which numbers."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from hardy.config import nearest

FILE_NAME = "population.csv"
EVENTS = ("start", "kept", "exploited", "healed", "migrated", "final")
"""What can happen to a member at an exchange: the run begins; it goes on; it copied another; it copied another because its own
state was not finite; it took the weights of another and kept its own hyperparameters; it was scored at the end of the run."""
_FIXED = ("exchange", "step", "member", "score", "standard_error", "parent", "event", "age", "depth")
_BEFORE, _AFTER = "/before", "/after"


@dataclass(frozen=True)
class MemberRecord:
    """One member at one exchange.

    Args:
        exchange: 0 is the start of the run; the scores at its end count as one more.
        step: environment steps of one member.
        member: the slot of the population.
        score: mean return of a clean evaluation, before anybody was replaced; NaN where nothing was measured.
        standard_error: of the score.
        parent: the member whose weights it goes on with; itself if it survived.
        event: one of `EVENTS`.
        age: exchanges since it was last replaced.
        depth: exploits among its ancestors, this exchange included.
        before: tuned hyperparameters by dotted path, as they were when it was scored.
        after: as they are when it goes on.
    """

    exchange: int
    step: int
    member: int
    score: float
    standard_error: float
    parent: int
    event: str
    age: int
    depth: int
    before: Mapping[str, float]
    after: Mapping[str, float]


class PopulationWriter:
    """One row per member and exchange, in ``population.csv``; a context manager.

    Numbers are written so that they are read back exactly.

    Args:
        folder: the run's folder; it is made.
        hyperparams: dotted paths of the tuned hyperparameters.
        resume_step: continue the file, after leaving out all rows of later steps, a row that a kill cut short, and the scores
            of the run's end, which a run that goes on has not reached. ``None`` starts a new file.

    Raises:
        ValueError: the file to continue has other hyperparameters.
    """

    def __init__(self, folder: Path, hyperparams: Sequence[str], resume_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        self.hyperparams = tuple(hyperparams)
        resumed = resume_step is not None and path.exists() and _cut(path, self.hyperparams, resume_step)
        self._file = path.open("a" if resumed else "w", encoding="utf-8", newline="")
        if not resumed:
            self._append([_columns(self.hyperparams)])

    def write(self, records: Sequence[MemberRecord]) -> None:
        """Write one exchange; its rows are on their way to the disk, together, before this returns.

        Raises:
            ValueError: an event is unknown, or a record has other hyperparameters than the file.
        """
        for record in records:
            if record.event not in EVENTS:
                raise ValueError(f"event = '{record.event}': allowed are {', '.join(EVENTS)}{nearest(record.event, EVENTS)}")
            for moment, values in (("before", record.before), ("after", record.after)):
                if set(values) != set(self.hyperparams):
                    raise ValueError(f"{moment} has {_names(values)}: must have {_names(self.hyperparams)}")
        self._append(_row(record, self.hyperparams) for record in records)

    def _append(self, rows: Iterable[Iterable[str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._file.write(text.getvalue())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> PopulationWriter:
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Close the file."""
        self.close()


def read_population(folder: Path) -> list[MemberRecord]:
    """The records of a run, in the order in which they were written; a row cut short is left out.

    Raises:
        FileNotFoundError: the folder holds no ``population.csv``, as that of a single agent.
        ValueError: the file is damaged elsewhere than at its end.
    """
    path = folder / FILE_NAME
    with path.open("rb") as file:
        lines = [line for line in file if line.endswith(b"\n")]
    try:
        rows = list(csv.reader(line.decode() for line in lines))
        columns = rows[0] if rows else []
        return [_record(dict(zip(columns, row, strict=True))) for row in rows[1:] if len(row) == len(columns)]
    except (KeyError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: is damaged: {error}") from error


def ancestry(records: Sequence[MemberRecord], member: int) -> list[MemberRecord]:
    """How the member that now is in a slot came about: one record per exchange, from the start of the run to its end.

    The record of an exchange is that of the slot in which the ancestor lived *after* it, so ``after`` is what it trained with
    next, and the ``parent`` of one record is the ``member`` of the record before it.

    Raises:
        ValueError: no record is of this member.
    """
    members = sorted({record.member for record in records})
    if member not in members:
        raise ValueError(f"member = {member}: allowed are {', '.join(map(str, members)) or 'none, for there is no record'}")
    table = {(record.exchange, record.member): record for record in records}
    line, slot = [], member
    for exchange in sorted({record.exchange for record in records}, reverse=True):
        record = table.get((exchange, slot))
        if record is not None:  # its row may be the one that a kill cut short
            line.append(record)
            slot = record.parent
    return line[::-1]


def schedule(records: Sequence[MemberRecord], member: int) -> list[tuple[int, dict[str, float]]]:
    """The hyperparameters that made a member: (environment step, values from that step on), one entry per change.

    They follow the member's weights back through everybody that it descends from.

    Raises:
        ValueError: no record is of this member.
    """
    entries: list[tuple[int, dict[str, float]]] = []
    for record in ancestry(records, member):
        values = dict(record.after)
        if not entries or entries[-1][1] != values:
            entries.append((record.step, values))
    return entries


def best_member(records: Sequence[MemberRecord]) -> int:
    """The member with the highest finite score of the last exchange.

    Of equal scores the lower standard error wins, then the lower number; where no score is finite, the lowest number.

    Raises:
        ValueError: there is no record.
    """
    if not records:
        raise ValueError("records is empty: a population writes its first ones at the start of the run")
    last = max(record.exchange for record in records)
    scored = [record for record in records if record.exchange == last]
    return min((rank(record.score, record.standard_error), record.member) for record in scored)[1]


def rank(score: float, standard_error: float) -> tuple[float, float]:
    """What sorts members from best to worst: a higher score first, of equal ones the surer; no finite score last."""
    return -score if math.isfinite(score) else math.inf, standard_error if math.isfinite(standard_error) else math.inf


def _columns(hyperparams: Sequence[str]) -> list[str]:
    return [*_FIXED, *(f"{path}{moment}" for path in hyperparams for moment in (_BEFORE, _AFTER))]


def _row(record: MemberRecord, hyperparams: Sequence[str]) -> list[str]:
    values = [moment[path] for path in hyperparams for moment in (record.before, record.after)]
    start = [str(int(number)) for number in (record.exchange, record.step, record.member)]
    score = [_exactly(record.score), _exactly(record.standard_error)]
    end = [str(int(record.parent)), record.event, str(int(record.age)), str(int(record.depth))]
    return [*start, *score, *end, *map(_exactly, values)]


def _exactly(number: float) -> str:
    return repr(float(number))  # the shortest text that gives the same number back; a NumPy scalar's own repr names its type


def _record(cells: Mapping[str, str]) -> MemberRecord:
    moments: dict[str, dict[str, float]] = {
        moment: {name.removesuffix(moment): float(cell) for name, cell in cells.items() if name.endswith(moment)}
        for moment in (_BEFORE, _AFTER)
    }
    return MemberRecord(
        exchange=int(cells["exchange"]),
        step=int(cells["step"]),
        member=int(cells["member"]),
        score=float(cells["score"]),
        standard_error=float(cells["standard_error"]),
        parent=int(cells["parent"]),
        event=cells["event"],
        age=int(cells["age"]),
        depth=int(cells["depth"]),
        before=moments[_BEFORE],
        after=moments[_AFTER],
    )


def _cut(path: Path, hyperparams: Sequence[str], step: int) -> bool:
    """Cut a file, in place, before the first row that a resumed run writes again; returns whether its header is whole."""
    with path.open("rb") as file:
        header = file.readline()
        if not header.endswith(b"\n"):
            return False
        columns = next(csv.reader([header.decode()]))
        if columns != _columns(hyperparams):
            found = [column.removesuffix(_BEFORE) for column in columns if column.endswith(_BEFORE)]
            raise ValueError(f"{path}: was written for the hyperparameters {_names(found)}, not {_names(hyperparams)}")
        end = len(header)
        for line in file:
            row = next(csv.reader([line.decode()]))
            if not line.endswith(b"\n") or len(row) != len(columns):
                break
            cells = dict(zip(columns, row, strict=True))
            if int(cells["step"]) > step or cells["event"] == "final":
                break
            end += len(line)
    os.truncate(path, end)
    return True


def _names(hyperparams: Iterable[str]) -> str:
    return ", ".join(sorted(hyperparams)) or "none"
