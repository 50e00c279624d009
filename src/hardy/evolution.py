"""Population-based training of a population that trains as one program: scores, exploits, exploration, between iterations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hardy.lineage import MemberRecord, ancestry, best_member, schedule
from hardy.pbt import Gain, PBTSettings, Scores, Selection, draw_initial, explore, select
from hardy.pbt.pb2 import MAX_POINTS
from hardy.population import stream_seed
from hardy.settings import PopulationSettings, RunSettings, ScheduledChange
from hardy.trainer import Metrics, Trainer


class PopulationLostError(Exception):
    """No member has finite weights, statistics and hyperparameters any more: there is nothing to copy from."""


class Evolution:
    """The exchanges of one population.

    What happens follows from the scores, the run's seed and the number of the exchange, so a resumed run repeats it exactly.

    Args:
        trainer: the population; its hyperparameters are written in place, its members copied by `Trainer.exploit_`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.settings = trainer.settings.pbt
        members = len(trainer.seeds)
        self.exchanges = 0
        """Exchanges so far."""
        self.exploits = 0
        """Members that took another's weights so far."""
        self._last_step = 0
        self._age = np.zeros(members, dtype=np.int64)
        self._depth = np.zeros(members, dtype=np.int64)
        self._scores = np.full(members, math.nan)
        self._errors = np.full(members, math.nan)
        self._inherited = np.full(members, math.nan)
        """The score with which each member's weights began the time since the last exchange."""
        self._history: list[Gain] = []
        self._value_loss: Float[np.ndarray, "P"] = np.full(members, math.nan)
        self._parents_loss: Float[np.ndarray, "P"] = np.full(members, math.nan)
        """Value loss of the parent before the exploit, for members whose next iteration is their first with its weights."""

    @property
    def best_member(self) -> int:
        """The member with the highest score of the last exchange, of equal ones the surest; the first one before that."""
        return int(np.lexsort((np.nan_to_num(self._errors, nan=np.inf), -np.nan_to_num(self._scores, nan=-np.inf)))[0])

    def start(self) -> list[MemberRecord]:
        """Give each member its first hyperparameters, where they are drawn."""
        members = len(self.trainer.seeds)
        before = self._hyperparams()
        if self.settings.initial == "draw":
            self._write(draw_initial(self.settings, members, self.trainer.settings.seed))
        unscored = np.full(members, math.nan)
        return self._records(["start"] * members, np.arange(members), unscored, unscored, before)

    def due(self, total_timesteps: int) -> bool:
        """Whether an exchange belongs before the next iteration; none at the end, where nobody would train on."""
        interval, now = self.settings.interval, self.trainer.timesteps
        return now // interval > self._last_step // interval and now < total_timesteps

    def exchange(self) -> list[MemberRecord]:
        """Score all members, replace those that are clearly behind, and let the copies explore.

        Returns:
            What happened to each member.

        Raises:
            PopulationLostError: no member is left that could be copied.
        """
        self.exchanges += 1
        self._last_step = self.trainer.timesteps
        scores, sound = self._measure()
        if not sound.any():
            raise PopulationLostError(
                f"after {self._last_step:,} steps no member has finite weights, statistics and hyperparameters any more; "
                "narrow pbt.hyperparams (a lower optimizer.lr first) and start again"
            )
        selection = self._select(scores)
        before = self._hyperparams()
        self._note_gains(scores.mean, before)
        self.trainer.exploit_(selection.source, selection.keeps_hyperparams)
        explores = selection.replaced & ~selection.keeps_hyperparams
        self._write(
            explore(
                self._hyperparams(), explores, self.settings,
                seed=self.trainer.settings.seed, round=self.exchanges, history=self._history,
            )
        )  # fmt: skip
        self._inherit(selection)
        events = [
            "kept" if not replaced else "healed" if not whole else "migrated" if keeps else "exploited"
            for replaced, whole, keeps in zip(selection.replaced, sound, selection.keeps_hyperparams, strict=True)
        ]
        return self._records(events, selection.source, scores.mean, scores.standard_error, before)

    def finish(self) -> list[MemberRecord]:
        """Score all members at the end of the run; nobody is replaced."""
        members = len(self.trainer.seeds)
        scores, _ = self._measure(self.exchanges + 1)
        hyperparams = self._hyperparams()
        records = self._records(["final"] * members, np.arange(members), scores.mean, scores.standard_error, hyperparams)
        return [dataclasses.replace(record, exchange=self.exchanges + 1) for record in records]

    def watch(self, metrics: Metrics) -> Metrics:
        """What an iteration tells about the last exchange: metrics to add to its own."""
        loss = metrics["train/value_loss"]
        assert isinstance(loss, Tensor)
        self._value_loss = loss.double().cpu().numpy()
        found: Metrics = {}
        if np.isfinite(self._parents_loss).any():
            with np.errstate(divide="ignore", invalid="ignore"):
                found["pbt/post_exploit_value_loss_ratio"] = torch.from_numpy(self._value_loss / self._parents_loss)
            self._parents_loss = np.full_like(self._parents_loss, math.nan)
        return found

    def metrics(self) -> Metrics:
        """The state of the population after an exchange."""
        finite = self._scores[np.isfinite(self._scores)]
        hyperparams = self._hyperparams()
        return {
            "pbt/score": torch.from_numpy(self._scores.copy()),
            "pbt/score_best": float(finite.max()) if finite.size else math.nan,
            "pbt/score_mean": float(finite.mean()) if finite.size else math.nan,
            "pbt/score_std": float(finite.std()) if finite.size else math.nan,
            "pbt/exploitation_count": float(self.exploits),
            "pbt/lineage_depth": torch.from_numpy(self._depth.astype(np.float64)),
            "pbt/age": torch.from_numpy(self._age.astype(np.float64)),
            **{f"pbt/hyperparam/{name}": torch.from_numpy(values) for name, values in hyperparams.items()},
        }

    def document(self) -> dict[str, Any]:
        """Everything that a checkpoint must hold beside the training state, as JSON values."""
        return {
            "exchanges": self.exchanges,
            "exploits": self.exploits,
            "last_step": self._last_step,
            "history": [dataclasses.asdict(gain) for gain in self._history],
            **{name: _plain(values) for name, values in self._arrays().items()},
        }

    def restore(self, document: Mapping[str, Any]) -> None:
        """Take over what `document` returned."""
        self.exchanges, self.exploits = document["exchanges"], document["exploits"]
        self._last_step = document["last_step"]
        self._history = [Gain(**gain) for gain in document["history"]]
        for name, values in self._arrays().items():
            values[:] = [math.nan if value is None else value for value in document[name]]

    def _arrays(self) -> dict[str, np.ndarray]:
        names = ("age", "depth", "scores", "errors", "inherited", "value_loss", "parents_loss")
        return {name: getattr(self, f"_{name}") for name in names}

    def _measure(self, exchange: int | None = None) -> tuple[Scores, np.ndarray]:
        """Scores from new episodes at every exchange, the same for all members; a member that is not sound has none."""
        seed = stream_seed(self.trainer.settings.seed, "score", self.exchanges if exchange is None else exchange)
        deterministic = self.trainer.settings.evaluation.deterministic
        returns = self.trainer.evaluate(self.settings.episodes, deterministic=deterministic, seed=seed)
        sound = self.trainer.sound()
        mean = np.where(sound, returns.mean(1), math.nan)
        error = np.where(sound, returns.std(1, ddof=1) / math.sqrt(returns.shape[1]), math.nan)
        self._scores, self._errors = mean.copy(), error.copy()
        return Scores(mean, error, returns.shape[1]), sound

    def _select(self, scores: Scores) -> Selection:
        members = len(self.trainer.seeds)
        if not self.settings.exchange:
            return Selection(np.arange(members), np.zeros(members, dtype=bool))
        return select(scores, self.settings, seed=self.trainer.settings.seed, round=self.exchanges)

    def _note_gains(self, scores: Float[np.ndarray, "P"], hyperparams: Mapping[str, np.ndarray]) -> None:
        for member, gain in enumerate(scores - self._inherited):
            if math.isfinite(gain):
                values = {name: float(column[member]) for name, column in hyperparams.items()}
                self._history.append(Gain(self.exchanges, member, values, float(gain)))
        del self._history[:-MAX_POINTS]

    def _inherit(self, selection: Selection) -> None:
        source, replaced = selection.source, selection.replaced
        self.exploits += int(replaced.sum())
        self._age = np.where(replaced, 0, self._age + 1)
        self._depth = np.where(replaced, self._depth[source] + 1, self._depth)
        self._inherited = self._scores[source]
        self._parents_loss = np.where(replaced, self._value_loss[source], math.nan)

    def _hyperparams(self) -> dict[str, Float[np.ndarray, "P"]]:
        hyper = self.trainer.state.hyper
        return {name: hyper[name].double().cpu().numpy() for name in self.settings.hyperparams}

    def _write(self, values: Mapping[str, Float[np.ndarray, "P"]]) -> None:
        for name, column in values.items():
            self.trainer.state.hyper[name].copy_(torch.from_numpy(column))

    def _records(
        self, events: list[str], parents: np.ndarray, scores: np.ndarray, errors: np.ndarray, before: Mapping[str, np.ndarray]
    ) -> list[MemberRecord]:
        after = self._hyperparams()
        return [
            MemberRecord(
                exchange=self.exchanges,
                step=self.trainer.timesteps,
                member=member,
                score=float(scores[member]),
                standard_error=float(errors[member]),
                parent=int(parents[member]),
                event=event,
                age=int(self._age[member]),
                depth=int(self._depth[member]),
                before={name: float(values[member]) for name, values in before.items()},
                after={name: float(values[member]) for name, values in after.items()},
            )
            for member, event in enumerate(events)
        ]


def replay(settings: RunSettings, records: Sequence[MemberRecord]) -> RunSettings:
    """The single run that follows the hyperparameters of the best member's lineage, from the weights that it began with."""
    best = best_member(records)
    changes = tuple(ScheduledChange(step=step, values=values) for step, values in schedule(records, best))
    env = settings.env
    if env.drift is not None and env.drift.seed is None:  # the world changes as it did for the population
        env = env.model_copy(update={"drift": env.drift.model_copy(update={"seed": settings.seed})})
    single = {"population": PopulationSettings(), "pbt": PBTSettings(), "schedule": changes, "env": env}
    return settings.model_copy(update={**single, "seed": settings.seed + ancestry(records, best)[0].member})


def _plain(values: np.ndarray) -> list[float | int | None]:
    """An array as JSON can hold it: NaN becomes null."""
    return [None if isinstance(value, float) and math.isnan(value) else value for value in values.tolist()]
