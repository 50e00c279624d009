"""Metrics: the registry that says what each one means, and the writer of ``metrics.csv`` and TensorBoard files."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from hardy.config import nearest

FILE_NAME = "metrics.csv"
STEP = "time/total_timesteps"


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric, as docs/metrics.md explains it at length.

    Args:
        name: ``section/name``, the tag in TensorBoard and the column in ``metrics.csv``.
        unit: what one unit of it is.
        meaning: one line.
        healthy: the range or the course to expect.
        per_member: whether every member of the population has its own value.
        population: whether it exists only where the population has more than one member.
        only_parts: whether it has no value itself, so no column, but only parts ``name/<part>``.
    """

    name: str
    unit: str
    meaning: str
    healthy: str
    per_member: bool = True
    population: bool = False
    only_parts: bool = False


_ALL = (
    Metric("time/total_timesteps", "steps", "environment steps taken so far", "grows evenly", per_member=False),
    Metric("time/elapsed", "s", "wall time of training so far", "grows evenly", per_member=False),
    Metric("time/steps_per_second", "steps/s", "environment steps per second of wall time", "steady", per_member=False),
    Metric("rollout/ep_rew_mean", "reward", "mean return of the last 100 training episodes", "rises"),
    Metric("rollout/ep_len_mean", "steps", "mean length of the last 100 training episodes", "as the task asks"),
    Metric("rollout/episodes", "episodes", "training episodes finished so far", "grows"),
    Metric("train/learning_rate", "1", "learning rate in use: the base times the schedule's factor", "follows the schedule"),
    Metric("train/policy_loss", "1", "clipped surrogate loss", "small, around or below 0"),
    Metric("train/value_loss", "1", "loss of the critic", "falls, then stays level"),
    Metric("train/entropy", "nat", "mean entropy of the action distribution", "falls slowly"),
    Metric("train/approx_kl", "nat", "estimated KL divergence from the policy that collected the data", "0.001 to 0.03"),
    Metric("train/clip_fraction", "1", "share of the samples whose probability ratio was clipped", "0.02 to 0.3"),
    Metric("train/explained_variance", "1", "share of the variance of the returns that the critic explains", "above 0.5"),
    Metric("train/grad_norm", "1", "norm of the raw gradient, before clipping", "steady"),
    Metric("train/skipped_updates", "updates", "updates of the iteration left out because a number was not finite", "0"),
    Metric("risk/cvar", "reward", "CVaR of the discounted return from the start of an episode, as predicted", "rises"),
    Metric("risk/lambda", "1", "Lagrange multiplier of the CVaR limit", "settles, or 0"),
    Metric("risk/violation", "reward", "how far CVaR is below its limit", "falls to 0"),
    Metric("adversary/epsilon", "deviations", "radius of the attack on observations in use", "rises to its full size"),
    Metric("adversary/robust_kl", "nat", "divergence of the policy between true and attacked observations", "falls"),
    Metric("adversary/clean_grad_norm", "1", "norm of the gradient without the adversary's part", "the larger part"),
    Metric("adversary/robust_grad_norm", "1", "norm of what the adversary adds to the gradient", "the smaller part"),
    Metric("vgs/scaling_factor", "1", "mean factor by which VGS scales the update", "0.1 to 1"),
    Metric("vgs/normalized_variance", "1", "noise-to-signal ratio of the gradient", "level; far above 1 with PPO"),
    Metric("upgd/noise_to_signal", "1", "RMS of UPGD's perturbation over the RMS of the update", "sigma"),
    Metric("upgd/utility_max", "1", "largest utility of any weight, the scale of the gate", "above 0"),
    Metric("plasticity/dormant_fraction", "1", "share of the units that hardly ever respond", "below 0.1"),
    Metric("plasticity/effective_rank", "directions", "number of directions that the features really use", "does not fall"),
    Metric("plasticity/weight_norm", "1", "Euclidean norm of all weights", "grows slower and slower"),
    Metric("env/drift_changes", "changes", "changes of the task so far", "follows the configuration", per_member=False),
    Metric("eval/mean", "reward", "mean return of a clean evaluation", "rises"),
    Metric("eval/low", "reward", "lower end of the 95 % interval of that mean", "close to the mean"),
    Metric("eval/high", "reward", "upper end of the 95 % interval of that mean", "close to the mean"),
    *(
        dataclasses.replace(metric, population=True)
        for metric in (
            Metric("pbt/score", "reward", "clean evaluation by which the members are compared", "rises"),
            Metric("pbt/score_best", "reward", "highest score of any member", "rises", per_member=False),
            Metric("pbt/score_mean", "reward", "mean score of the members", "follows the best", per_member=False),
            Metric("pbt/score_std", "reward", "standard deviation of the members' scores", "falls, not to 0", per_member=False),
            Metric("pbt/exploitation_count", "exploits", "members replaced so far", "grows, slower later", per_member=False),
            Metric("pbt/post_exploit_value_loss_ratio", "1", "value loss after an exploit over that before it", "about 1"),
            Metric("pbt/lineage_depth", "exploits", "exploits among the ancestors of the member", "grows"),
            Metric("pbt/age", "exchanges", "exchanges since the member was last replaced", "spread over the members"),
            Metric("pbt/hyperparam", "its own", "value of a tuned hyperparameter, as a part", "moves", only_parts=True),
        )
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""Every metric by name, in the order of the columns."""


class MetricsWriter:
    """One row per iteration, in ``metrics.csv`` and as TensorBoard events.

    A single agent has one column per metric, but none for those of a population. A population has a further column
    ``name/member_<i>`` for each member, and the plain name holds the mean over the members whose value is finite. The columns
    are fixed when the file is made; what is missing stays empty. Every row is on its way to the disk before `write` returns.

    Args:
        folder: the run's folder; it is made.
        members: size of the population.
        resume_step: continue the file, after leaving out all rows of later steps and a row that a kill cut short. ``None``
            starts a new file.

    Raises:
        ValueError: the file to continue is another population's.
    """

    def __init__(self, folder: Path, members: int, resume_step: int | None = None) -> None:
        from torch.utils import tensorboard  # slow to import, and only training needs it

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        self.members = members
        self.columns = _columns(members)
        resumed = resume_step is not None and path.exists()
        if resume_step is not None and resumed:
            self.columns = _cut(path, members, resume_step)
        self._file = path.open("a" if resumed else "w", encoding="utf-8", newline="")
        self._csv = csv.DictWriter(self._file, self.columns, extrasaction="ignore", lineterminator="\n")
        if not resumed:
            self._csv.writeheader()
            self._file.flush()
        # Events of the steps that are about to be repeated are hidden by TensorBoard itself.
        purge = None if resume_step is None else resume_step + 1
        self._events: Any = tensorboard.SummaryWriter(str(folder), purge_step=purge)

    def write(self, step: int, values: Mapping[str, Tensor | float | int]) -> dict[str, float]:
        """Write one row.

        Args:
            step: environment steps so far, ``time/total_timesteps``.
            values: by registered name, a number or one number per member ``[P]``. A part of a metric, ``<registered>/<part>``
                such as ``vgs/scaling_factor/actor``, goes to TensorBoard only: how many there are depends on the settings.

        Returns:
            The row: plain names, and with a population the members' as well.

        Raises:
            ValueError: a name is not registered, has parts only, or is a population's while there is a single agent; or a
                tensor's shape is not ``[P]``.
        """
        row: dict[str, float] = {STEP: float(step)}
        for name, value in values.items():
            row |= self._entries(name, value)
        self._csv.writerow({column: _text(row[column]) for column in self.columns if column in row})
        self._file.flush()
        for name, number in row.items():
            if name != STEP:
                self._events.add_scalar(name, number, step)
        return row

    def _entries(self, name: str, value: Tensor | float | int) -> dict[str, float]:
        metric = METRICS.get(name) or METRICS.get(name.rpartition("/")[0])
        if metric is None:
            raise ValueError(f"metric '{name}' is not registered{nearest(name, METRICS)}")
        if metric.population and self.members == 1:
            raise ValueError(f"metric '{name}' is that of a population: a single agent has none")
        if metric.only_parts and metric.name == name:
            raise ValueError(f"metric '{name}' has no value itself: give it parts, '{name}/<part>'")
        if not isinstance(value, Tensor) or value.ndim == 0:
            return {name: float(value)}
        if value.shape != (self.members,):
            raise ValueError(
                f"metric '{name}' has shape {list(value.shape)}: must be a number or one per member [{self.members}]"
            )
        numbers = [float(number) for number in value.tolist()]
        if self.members == 1:
            return {name: numbers[0]}
        finite = [number for number in numbers if math.isfinite(number)]
        mean = sum(finite) / len(finite) if finite else math.nan
        return {name: mean} | {_member(name, index): number for index, number in enumerate(numbers)}

    def close(self) -> None:
        """Write what is still buffered and close both files."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> MetricsWriter:
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Close the files."""
        self.close()


def read_metrics(folder: Path) -> dict[str, np.ndarray]:
    """The columns of a run's ``metrics.csv``, float64, NaN where nothing was written; a row cut short is left out.

    Raises:
        FileNotFoundError: the folder holds no ``metrics.csv``.
    """
    with (folder / FILE_NAME).open("rb") as file:
        lines = [line.decode() for line in file if line.endswith(b"\n")]
    rows = list(csv.reader(lines))
    columns = rows[0] if rows else []
    cells = [[float(cell) if cell else math.nan for cell in row] for row in rows[1:] if len(row) == len(columns)]
    table = np.array(cells, dtype=np.float64).reshape(len(cells), len(columns))
    return {column: table[:, index].copy() for index, column in enumerate(columns)}


def _member(name: str, index: int) -> str:
    return f"{name}/member_{index}"


def _columns(members: int) -> list[str]:
    columns: list[str] = []
    for metric in METRICS.values():
        if metric.only_parts or (metric.population and members == 1):
            continue
        columns.append(metric.name)
        if members > 1 and metric.per_member:
            columns += [_member(metric.name, index) for index in range(members)]
    return columns


def _text(value: float) -> str:
    # Nine digits are all that a float32 has; counts stay whole.
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:.9g}"


def _cut(path: Path, members: int, step: int) -> list[str]:
    """Cut a file, in place, after the last whole row up to ``step``; returns its columns."""
    with path.open("rb") as file:
        header = file.readline()
        columns = header.decode().strip().split(",")
        found = sum(column.startswith("rollout/ep_rew_mean/member_") for column in columns) or 1
        if STEP not in columns or found != members:
            raise ValueError(f"{path}: was written by a population of {found}, not {members}")
        end = len(header)
        for line in file:
            cells = line.decode().rstrip("\n").split(",")
            if not line.endswith(b"\n") or len(cells) != len(columns) or float(cells[columns.index(STEP)]) > step:
                break
            end += len(line)
    os.truncate(path, end)
    return columns
