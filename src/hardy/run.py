"""A training run with a folder of its own: what the command line starts, stops and resumes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import gymnasium
import numpy as np
import torch
from scipy import stats

from hardy.adversary import Attack
from hardy.algorithm import export_policy
from hardy.checkpoint import (
    CheckpointError,
    checkpoint_path,
    checkpoint_step,
    checkpoints,
    latest_checkpoint,
    prune_checkpoints,
    read_document,
    write_text_atomic,
)
from hardy.config import ConfigError, dump_settings, load_settings, settings_from_dict, tunables
from hardy.console import LiveView
from hardy.envs import make
from hardy.evolution import Evolution, replay
from hardy.lineage import FILE_NAME as POPULATION
from hardy.lineage import MemberRecord, PopulationWriter, best_member, read_population
from hardy.metrics import MetricsWriter
from hardy.population_report import lineage_picture, schedule_picture
from hardy.profiling import Profile, phase
from hardy.report import SUMMARY, Status, attack_report, learning_curve, write_summary
from hardy.robustness import attacked_returns
from hardy.settings import RunSettings
from hardy.trainer import Metrics, Trainer

CONFIG, CHECKPOINTS, POLICY, SCHEDULE = "config.yaml", "checkpoints", "policy.safetensors", "schedule.yaml"
TRACE = "trace.json"
CONFIDENCE = 0.95
STOPPING = "finishing this iteration; press Ctrl-C again to stop at once"


class DivergedError(Exception):
    """The only agent of a run has weights that are not finite, and there is no earlier state to go back to."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean return of whole episodes with its 95 % interval (Student's t)."""

    mean: float
    low: float
    high: float
    episodes: int


def summarise(returns: np.ndarray) -> Evaluation:
    """The mean of episode returns and the 95 % interval of that mean."""
    mean, error = float(np.mean(returns)), float(stats.sem(returns))
    half = error * float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(returns) - 1))
    return Evaluation(mean=mean, low=mean - half, high=mean + half, episodes=len(returns))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended, and where its results are."""

    folder: Path
    status: Status
    evaluation: Evaluation | None

    @property
    def resumable(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        try:
            latest_checkpoint(self.folder / CHECKPOINTS)
        except CheckpointError:
            return False
        return True


def new_folder(settings: RunSettings, name: str) -> Path:
    """A fresh folder ``<artifacts_dir>/<name>-seed<seed>``, with a number behind it where that exists already.

    Raises:
        ConfigError: no folder can be made there.
    """
    base = Path(settings.artifacts_dir)
    stem = f"{name}-seed{settings.seed}"
    try:
        base.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            with suppress(FileExistsError):
                folder = base / (stem if number == 1 else f"{stem}-{number}")
                folder.mkdir()
                break
    except OSError as error:
        raise ConfigError([f"artifacts_dir = '{base}': no folder can be made there: {error}"]) from error
    return folder


def make_trainer(settings: RunSettings) -> Trainer:
    """A trainer whose environments and optimizer exist.

    Raises:
        ConfigError: a setting that only the parts themselves can judge is impossible, such as an unknown environment.
    """
    try:
        env = make(settings.env, settings.member_seeds, drift_seeds=settings.drift_seeds, device=settings.device)
    except (TypeError, ImportError, gymnasium.error.Error) as error:  # what env.kwargs or a missing extra make an id raise
        raise ConfigError([f"env.id = '{settings.env.id}', env.kwargs = {settings.env.kwargs}: {error}"]) from error
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    try:
        return Trainer(settings, env=env)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def train(settings: RunSettings, name: str, say: Callable[[str], None]) -> Outcome:
    """Start a run in a fresh folder and train it to its end, or until it is interrupted.

    Args:
        settings: the run.
        name: what the folder is called.
        say: receives each line that is for the user.
    """
    trainer = make_trainer(settings)
    folder = new_folder(settings, name)
    write_text_atomic(folder / CONFIG, dump_settings(settings))
    return _Run(trainer, folder, say).to_the_end(None)


def resume(folder: Path, overrides: list[str], say: Callable[[str], None]) -> Outcome:
    """Continue a run from its newest usable checkpoint; one that only lacks its evaluation is evaluated.

    Args:
        folder: of the run.
        overrides: ``section.key=value``, for instance a larger ``total_timesteps``.

    Raises:
        ConfigError: the folder holds no configuration, or it does not fit with ``overrides``.
        CheckpointError: there is no usable checkpoint, or it is of another structure.
    """
    path = latest_checkpoint(folder / CHECKPOINTS, on_skip=lambda error: say(f"skipped {error}"))
    # Not the configuration's: a resume may have been stopped between writing that and the first checkpoint that follows it.
    before, ran_on = _as_saved(path)
    settings = _with_environments(load_settings(RunSettings, folder / CONFIG, overrides), before, ran_on)
    if settings.seed != before.seed:
        raise ConfigError([f"seed = {settings.seed}: {folder} began with seed {before.seed}, which cannot change any more"])
    if settings.population != before.population:
        given, size = settings.population.size, before.population.size
        raise ConfigError([f"population.size = {given}: {folder} began with {size} members, which cannot change any more"])
    old = tunables(before)
    changed = {name: value for name, value in tunables(settings).items() if value != old.get(name)}
    owners = dict.fromkeys(settings.pbt.hyperparams if settings.population.size > 1 else (), "the population tunes it")
    owners |= {name: "the schedule sets it" for change in settings.schedule for name in change.values}
    owned = [f"{name} = {value:g}: {owners[name]}, so it cannot be given" for name, value in changed.items() if name in owners]
    if owned:
        raise ConfigError(owned)
    if settings.population.size > 1 and settings.pbt.hyperparams.keys() != before.pbt.hyperparams.keys():
        names = ", ".join(before.pbt.hyperparams)
        raise ConfigError([f"pbt.hyperparams: {folder} began with {names}; their spaces may change, their names no more"])
    trainer = make_trainer(settings)
    document = trainer.restore(path)
    for name, value in changed.items():  # the others are the checkpoint's
        trainer.state.hyper[name].fill_(value)
    if trainer.timesteps >= settings.total_timesteps and _is_finished(folder, trainer.timesteps):
        raise ConfigError(
            [f"total_timesteps = {settings.total_timesteps}: {folder} is at {trainer.timesteps} already; give a larger number"]
        )
    write_text_atomic(folder / CONFIG, dump_settings(settings))
    say(f"resuming {folder} at {trainer.timesteps:,} steps")
    run = _Run(trainer, folder, say, elapsed=document["elapsed"])
    if run.evolution is not None:
        if "evolution" not in document:
            raise CheckpointError(f"{path}: was written by a Hardy that did not train populations")
        run.evolution.restore(document["evolution"])
        (folder / SCHEDULE).unlink(missing_ok=True)  # of an end that this run has not reached
    return run.to_the_end(trainer.timesteps)


def _as_saved(checkpoint: Path) -> tuple[RunSettings, str]:
    """The settings of a checkpoint, and the device it was trained on, which need not be here."""
    described = read_document(checkpoint)["settings"]
    return settings_from_dict(RunSettings, {**described, "device": "cpu"}), described["device"]


def _with_environments(settings: RunSettings, before: RunSettings, ran_on: str) -> RunSettings:
    """The settings with the kind of environments whose state the checkpoint holds, whatever the device is now."""
    backend = before.env.backend_on(ran_on)
    same_task = settings.env.id == before.env.id
    if not same_task or settings.env.backend != "auto" or settings.env.backend_on(settings.device) == backend:
        return settings
    return settings.model_copy(update={"env": settings.env.model_copy(update={"backend": backend})})


def evaluate(folder: Path, episodes: int | None, seed: int | None, overrides: Sequence[str] = ()) -> Evaluation:
    """Evaluate the newest usable checkpoint of a run in fresh environments, in the physics that the run ended with.

    Of a population, the member that scored best last.

    Args:
        overrides: ``section.key=value``, for this evaluation alone.

    Raises:
        ConfigError: the folder holds no configuration, or it does not fit with ``overrides``.
        CheckpointError: there is no usable checkpoint.
    """
    trainer, member = _restored(folder, overrides)
    chosen = trainer.settings.evaluation
    return summarise(trainer.evaluate(episodes or chosen.episodes, deterministic=chosen.deterministic, seed=seed)[member])


def _restored(folder: Path, overrides: Sequence[str] = ()) -> tuple[Trainer, int]:
    """The newest usable checkpoint of a run, and of a population the member that scored best last."""
    # An agent acts on any machine, also where the device that it was trained on is missing.
    settings = load_settings(RunSettings, folder / CONFIG, [*([] if torch.cuda.is_available() else ["device=cpu"]), *overrides])
    path = latest_checkpoint(folder / CHECKPOINTS, on_skip=lambda error: warnings.warn(f"skipped {error}", stacklevel=3))
    settings = _with_environments(settings, *_as_saved(path))
    trainer = make_trainer(settings)
    trainer.restore(path)
    if settings.population.size == 1:
        return trainer, 0
    return trainer, best_member([record for record in _history(folder) if record.step <= trainer.timesteps])


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """What one attack left of an agent's return; ``name`` is ``natural`` without any."""

    name: str
    epsilon: float
    evaluation: Evaluation


def attack(
    folder: Path,
    attacks: list[Attack],
    epsilons: list[float],
    episodes: int | None,
    seed: int | None,
    overrides: Sequence[str] = (),
) -> list[AttackResult]:
    """Attack the newest usable checkpoint of a run, on the episodes of `evaluate`; leaves ``attack.json`` and ``attack.png``.

    Of a population, the member that scored best last.

    Args:
        attacks: each is tried at each of ``epsilons``, radii in deviations of the normalised observation.
        overrides: ``section.key=value``, for this command alone.

    Returns:
        The natural result, then one for each attack and radius.

    Raises:
        ConfigError: the folder holds no configuration, or it does not fit with ``overrides``.
        CheckpointError: there is no usable checkpoint.
    """
    trainer, member = _restored(folder, overrides)
    chosen = trainer.settings.evaluation
    count, deterministic = episodes or chosen.episodes, chosen.deterministic
    natural = trainer.evaluate(count, deterministic=deterministic, seed=seed)[member]
    results = [AttackResult("natural", 0.0, summarise(natural))]
    for method, epsilon in itertools.product(attacks, epsilons):
        returns = attacked_returns(trainer, method, epsilon, count, deterministic=deterministic, seed=seed)[member]
        results.append(AttackResult(method.name, epsilon, summarise(returns)))
    attack_report(folder, [{"attack": r.name, "epsilon": r.epsilon, **dataclasses.asdict(r.evaluation)} for r in results])
    return results


def _history(folder: Path) -> list[MemberRecord]:
    """A population's history from its start.

    Raises:
        CheckpointError: it is missing, damaged, or begins later.
    """
    try:
        records = read_population(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the history of the population cannot be read: {error}") from None
    if not records or records[0].event != "start":
        raise CheckpointError(f"{folder / POPULATION}: does not begin with the start of the run")
    return records


class _Run:
    def __init__(self, trainer: Trainer, folder: Path, say: Callable[[str], None], elapsed: float = 0.0) -> None:
        self.trainer, self.folder, self.say = trainer, folder, say
        self.settings = trainer.settings
        self._began = time.monotonic() - elapsed
        self._saved = trainer.timesteps
        self.evaluation: Evaluation | None = None
        self.evolution = Evolution(trainer) if len(trainer.seeds) > 1 else None
        self._population: PopulationWriter | None = None
        self._profile = Profile(folder / TRACE, self.settings.device) if self.settings.profile else None

    def to_the_end(self, resume_step: int | None) -> Outcome:
        total = self.settings.total_timesteps
        status: Status = "failed"
        error = None
        with ExitStack() as files:
            try:
                writer = files.enter_context(MetricsWriter(self.folder, len(self.trainer.seeds), resume_step))
                if self.evolution is not None:
                    names = list(self.settings.pbt.hyperparams)
                    self._population = files.enter_context(PopulationWriter(self.folder, names, resume_step))
            except ValueError as damage:  # files of an interrupted run that are damaged, or another run's
                raise CheckpointError(str(damage)) from damage
            try:
                with _interruptible(self.say) as interrupted:
                    with LiveView(total, self.folder.name, self.trainer.timesteps) as view, self._profile or nullcontext():
                        if self.evolution is not None and resume_step is None:
                            self._tell(self.evolution.start(), view)
                        while self.trainer.timesteps < total:
                            with nullcontext() if self._profile is None else self._profile.iteration():
                                self._iterate(total, writer, view)
                            if interrupted():  # not before the first iteration: what has no checkpoint cannot be resumed
                                break
                    self._save()
                    for line in [] if self._profile is None else self._profile.table():
                        self.say(line)
                    if self.trainer.timesteps >= total:
                        self._evaluate(writer, interrupted)
                status = "interrupted" if self.evaluation is None else "finished"
            except KeyboardInterrupt:  # the second Ctrl-C, or the first during the evaluation
                status = "interrupted"
            except BaseException as failure:
                error = f"{type(failure).__name__}: {failure}"
                raise
            finally:
                write_summary(
                    self.folder,
                    seed=self.settings.seed,
                    status=status,
                    evaluation=None if self.evaluation is None else dataclasses.asdict(self.evaluation),
                    error=error,
                    population=self._population_summary(),
                )
                learning_curve(self.folder)
                if self.evolution is not None:
                    lineage_picture(self.folder)
                    schedule_picture(self.folder)
        return Outcome(self.folder, status, self.evaluation)

    def _iterate(self, total: int, writer: MetricsWriter, view: LiveView) -> None:
        trainer = self.trainer
        metrics = trainer.iterate(total)
        # A number that is not finite makes the gradients so, and a checkpoint to fall back to must be sound.
        skipped = metrics["train/skipped_updates"]
        suspect = self._is_regular(trainer.timesteps) or bool(torch.as_tensor(skipped).any())
        if self.evolution is None and suspect and not trainer.sound().all():
            self._fall_back()
        if self.evolution is not None:
            with phase("PBT"):
                metrics |= self.evolution.watch(metrics)
                if self.evolution.due(total):
                    self._tell(self.evolution.exchange(), view)
                    metrics |= self.evolution.metrics()
        metrics["time/elapsed"] = self._elapsed
        with phase("logging"):
            view.update(trainer.timesteps, writer.write(trainer.timesteps, metrics))
        # After the row: a kill in between repeats the iteration, the other order would lose its row.
        if self._is_regular(trainer.timesteps):
            with phase("checkpoint"):
                self._save()

    def _fall_back(self) -> None:
        """A member of a population is healed by the next exchange; a single agent has only its own past."""
        broken = f"after {self.trainer.timesteps:,} steps a weight or statistic is not finite"
        folder = self.folder / CHECKPOINTS
        # Not the one that an interruption wrote: whether a run was interrupted must not decide how it goes on.
        regular = [path for path in reversed(checkpoints(folder)) if self._is_regular(checkpoint_step(path))]
        try:
            step = self.trainer.fall_back_(regular[0] if regular else latest_checkpoint(folder))
        except CheckpointError as error:
            raise DivergedError(f"{broken}, and there is nothing to go back to ({error}); try a lower optimizer.lr") from None
        self.say(f"{broken}: goes on with the weights of step {step:,}; if this repeats, try a lower optimizer.lr")

    def _is_regular(self, step: int) -> bool:
        """Whether this iteration ends with a checkpoint; so it does in any run, interrupted or not."""
        every, before = self.settings.checkpoint.every, step - self.trainer.steps_per_iteration
        return step // every > before // every

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _save(self) -> None:
        if self._saved == self.trainer.timesteps:
            return
        folder = self.folder / CHECKPOINTS
        folder.mkdir(exist_ok=True)
        document: dict[str, Any] = {"elapsed": self._elapsed}
        if self.evolution is not None:
            document["evolution"] = self.evolution.document()
        self.trainer.save(checkpoint_path(folder, self.trainer.timesteps), document)
        prune_checkpoints(folder, self.settings.checkpoint.keep)
        export_policy(self.trainer, self.folder / POLICY, self._best)
        self._saved = self.trainer.timesteps

    def _evaluate(self, writer: MetricsWriter, stop: Callable[[], bool]) -> None:
        # After the checkpoint, in a row of its own: whatever happens to the evaluation, the training is not lost.
        chosen = self.settings.evaluation
        row: Metrics = {}
        if self.evolution is not None:
            self._tell(self.evolution.finish(stop), None)
            row |= self.evolution.metrics()
            export_policy(self.trainer, self.folder / POLICY, self._best)
            try:
                write_text_atomic(self.folder / SCHEDULE, dump_settings(replay(self.settings, _history(self.folder))))
            except CheckpointError as error:
                self.say(f"no {SCHEDULE}: {error}")
        # The best member in other episodes than those in which it was found to be the best.
        returns = self.trainer.evaluate(chosen.episodes, deterministic=chosen.deterministic, stop=stop)
        self.evaluation = summarise(returns[self._best])
        row |= {f"eval/{name}": getattr(self.evaluation, name) for name in ("mean", "low", "high")}
        writer.write(self.trainer.timesteps, row)

    @property
    def _best(self) -> int:
        return 0 if self.evolution is None else self.evolution.best_member

    def _tell(self, records: Sequence[MemberRecord], view: LiveView | None) -> None:
        """Write what happened to the members, and show it."""
        assert self._population is not None
        self._population.write(records)
        if view is not None:
            view.members([_shown(record) for record in records])

    def _population_summary(self) -> dict[str, int] | None:
        if self.evolution is None:
            return None
        return {"size": len(self.trainer.seeds), "best_member": self._best, "exploits": self.evolution.exploits}


def _short(name: str, names: Iterable[str]) -> str:
    """The last part of a dotted path, the whole of it where another one ends alike."""
    last = name.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in names) == 1 else name


def _shown(record: MemberRecord) -> dict[str, str | float | int]:
    """A member's row of the live table."""
    happened = record.event if record.parent == record.member else f"{record.event} from {record.parent}"
    return {
        "member": record.member,
        "score": record.score,
        "±": record.standard_error,
        "age": record.age,
        **{_short(name, record.after): value for name, value in record.after.items()},
        "last exchange": happened,
    }


def _is_finished(folder: Path, step: int) -> bool:
    """Whether the run ended at this step with its evaluation: a run that was killed has a summary of earlier, or none."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        return bool(summary["status"] == "finished" and summary["total_timesteps"] == step)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _interruptible(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) ends the run after the iteration under way, its state whole; the second at once."""
    # A thread of its own speaks: the handler may have interrupted the main one in the middle of printing.
    speaker = threading.Thread(target=say, args=(STOPPING,))
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        speaker.start()

    # Only the main thread may set handlers; in another one, whoever owns the main thread decides.
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if speaker.ident is not None:
            speaker.join()
