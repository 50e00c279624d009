"""Population-based training of a population that trains as one program: scores, exploits, exploration, between iterations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hardy.lineage import MemberRecord, ancestry, best_member, rank, schedule
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
        self._learned = np.zeros(members, dtype=bool)
        """Members that made an update since the last exchange."""
        self._history: list[Gain] = []
        self._value_loss: Float[np.ndarray, "P"] = np.full(members, math.nan)
        self._parents_loss: Float[np.ndarray, "P"] = np.full(members, math.nan)
        """Value loss of the parent before the exploit, for members whose next iteration is their first with its weights."""

    @property
    def best_member(self) -> int:
        """The member with the highest score of the last exchange, of equal ones the surest; the first one before that."""
        scored = zip(self._scores.tolist(), self._errors.tolist(), strict=True)
        return min((rank(score, error), member) for member, (score, error) in enumerate(scored))[1]

    def start(self) -> list[MemberRecord]:
        """Give each member its first hyperparameters, where they are drawn."""
        members = len(self.trainer.seeds)
        before = self._hyperparams()
        if self.settings.initial == "draw":
            self._write(draw_initial(self.settings, members, self.trainer.settings.seed))
        return self._records(0, ["start"] * members, np.arange(members), before)

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
        scores = self._measure(self.exchanges)
        lost = ~np.isfinite(scores.mean)
        selection = self._select(scores)
        before = self._hyperparams()
        self._note_gains(scores.mean, before)
        self.trainer.exploit_(selection.source, selection.keeps_hyperparams, restarts=lost)
        explores = selection.replaced & ~selection.keeps_hyperparams
        self._write(
            explore(
                self._hyperparams(), explores, self.settings,
                seed=self.trainer.settings.seed, round=self.exchanges, history=self._history,
            )
        )  # fmt: skip
        self._inherit(selection)
        events = [
            "kept" if not replaced else "healed" if ill else "migrated" if keeps else "exploited"
            for replaced, ill, keeps in zip(selection.replaced, lost, selection.keeps_hyperparams, strict=True)
        ]
        return self._records(self.exchanges, events, selection.source, before)

    def finish(self, stop: Callable[[], bool] = lambda: False) -> list[MemberRecord]:
        """Score all members at the end of the run; nobody is replaced.

        Raises:
            PopulationLostError: no member is left that could be scored.
            KeyboardInterrupt: ``stop``, asked before every step, said so.
        """
        members = len(self.trainer.seeds)
        self._measure(self.exchanges + 1, stop)
        return self._records(self.exchanges + 1, ["final"] * members, np.arange(members), self._hyperparams())

    def watch(self, metrics: Metrics) -> Metrics:
        """What an iteration tells about the last exchange: metrics to add to its own."""
        loss = metrics["train/value_loss"]
        assert isinstance(loss, Tensor)
        self._value_loss = loss.double().cpu().numpy()
        self._learned |= np.isfinite(self._value_loss)  # NaN where every update of the iteration was left out
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
        names = ("age", "depth", "learned", "scores", "errors", "inherited", "value_loss", "parents_loss")
        return {name: getattr(self, f"_{name}") for name in names}

    def _measure(self, exchange: int, stop: Callable[[], bool] = lambda: False) -> Scores:
        """Scores from new episodes at every exchange, the same ones for all members.

        A member has none whose state or returns are not finite, or which could not make a single update.
        """
        seed = stream_seed(self.trainer.settings.seed, "score", exchange)
        deterministic = self.trainer.settings.evaluation.deterministic
        returns = self.trainer.evaluate(self.settings.episodes, deterministic=deterministic, seed=seed, stop=stop)
        sound = self.trainer.sound() & self._learned & np.isfinite(returns).all(1)
        if not sound.any():
            raise PopulationLostError(
                f"after {self.trainer.timesteps:,} steps no member has finite weights, statistics, hyperparameters and returns "
                "any more; narrow pbt.hyperparams (a lower optimizer.lr first) and start again"
            )
        episodes = np.where(sound[:, None], returns, 0.0)
        self._scores = np.where(sound, episodes.mean(1), math.nan)
        self._errors = np.where(sound, episodes.std(1, ddof=1) / math.sqrt(returns.shape[1]), math.nan)
        return Scores(self._scores.copy(), self._errors.copy(), returns.shape[1])

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
        self._learned[:] = False
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
        self, exchange: int, events: list[str], parents: np.ndarray, before: Mapping[str, np.ndarray]
    ) -> list[MemberRecord]:
        after = self._hyperparams()
        return [
            MemberRecord(
                exchange=exchange,
                step=self.trainer.timesteps,
                member=member,
                score=float(self._scores[member]),
                standard_error=float(self._errors[member]),
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
    single = {"population": PopulationSettings(), "pbt": PBTSettings(), "schedule": changes, "env": env, "profile": False}
    return settings.model_copy(update={**single, "seed": settings.seed + ancestry(records, best)[0].member})


def _plain(values: np.ndarray) -> list[float | int | None]:
    """An array as JSON can hold it: NaN becomes null."""
    return [None if isinstance(value, float) and math.isnan(value) else value for value in values.tolist()]
