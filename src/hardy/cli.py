"""The command line: ``hardy train | pbt | resume | eval | attack | config | envs | bench``."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from hardy import run
from hardy.adversary import ATTACKS, NORMS, Attack, Norm
from hardy.allocator import keep_freed_memory
from hardy.checkpoint import CheckpointError, package_version
from hardy.config import ConfigError, dump_settings, load_settings, nearest
from hardy.console import print_error
from hardy.envs import list_envs
from hardy.evolution import PopulationLostError
from hardy.interrupts import INTERRUPTED, sigterm_as_ctrl_c
from hardy.parallel import MOST_THREADS
from hardy.settings import RunSettings

FAILED, USER_ERROR = 1, 2
EPSILONS = (0.05, 0.1, 0.2)
"""Radii of `hardy attack` where none is given."""
app = typer.Typer(
    name="hardy",
    help="Train agents that remember, keep learning and stay safe while the world changes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; configs/ has examples.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace those of the file.", show_default=False),
]
Threads = Annotated[int | None, typer.Option(help="Processor threads, in place of the setting threads.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, as printed by train.", show_default=False)]


def _say(message: str) -> None:
    Console(highlight=False).print(message, soft_wrap=True, markup=False)


def _version(wanted: bool) -> bool:
    if wanted:
        _say(f"hardy {package_version()}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def train(config: Config, overrides: Overrides = None, threads: Threads = None) -> None:
    """Train the agent, or the population, that CONFIG describes; results go to artifacts/<run>/."""
    settings = load_settings(RunSettings, config, _with_threads(overrides, threads))
    _finish(run.train(settings, config.stem, _say))


@app.command()
def pbt(config: Config, overrides: Overrides = None, threads: Threads = None) -> None:
    """Train the population that CONFIG describes (population.size, pbt.*), its members learning from one another."""
    settings = load_settings(RunSettings, config, _with_threads(overrides, threads))
    size = settings.population.size
    if size < 2:
        raise ConfigError([f"population.size = {size}: must be at least 2; add for instance population.size=8"])
    _finish(run.train(settings, config.stem, _say))


@app.command()
def resume(folder: RunFolder, overrides: Overrides = None, threads: Threads = None) -> None:
    """Continue an interrupted run, or a finished one with a larger total_timesteps."""
    _finish(run.resume(_existing(folder), _with_threads(overrides, threads), _say))


@app.command("eval")
def evaluate(
    folder: RunFolder,
    episodes: Annotated[int | None, typer.Option(min=2, help="Episodes; by default those of the configuration.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the environments; by default the run's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print mean, low, high and episodes as JSON.")] = False,
    threads: Threads = None,
) -> None:
    """Mean return of a run's newest checkpoint with its 95 % interval; weights and statistics stay frozen."""
    result = run.evaluate(_existing(folder), episodes, seed, _with_threads(None, threads))
    if as_json:  # which has neither NaN nor infinity
        numbers = dataclasses.asdict(result).items()
        _say(json.dumps({name: value if math.isfinite(value) else None for name, value in numbers}))
    else:
        _say(_sentence(result))


@app.command()
def attack(
    folder: RunFolder,
    epsilon: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            help="Radius in deviations of the normalised observation; repeat for several.",
            show_default="0.05, 0.1, 0.2",
        ),
    ] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Repeat for several.", show_default=", ".join(ATTACKS))] = None,
    norm: Annotated[str, typer.Option(help="linf: every entry by the radius at most; l2: the whole observation.")] = "linf",
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps of sgld, pgd and critic.")] = 10,
    episodes: Annotated[int | None, typer.Option(min=2, help="Episodes; by default those of the configuration.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the environments; by default the run's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    threads: Threads = None,
) -> None:
    """Return of a run's newest checkpoint under attacks on its observations, beside the natural one; draws attack.png."""
    chosen: list[Any] = [*dict.fromkeys(attack or ATTACKS)]
    problems = [
        f"--attack {name}: must be one of {', '.join(ATTACKS)}{nearest(name, ATTACKS)}"
        for name in chosen
        if name not in ATTACKS
    ]
    if norm not in NORMS:
        problems.append(f"--norm {norm}: must be one of {', '.join(NORMS)}{nearest(norm, NORMS)}")
    radii = [*dict.fromkeys(epsilon or EPSILONS)]
    problems += [f"--epsilon {radius}: must be a finite number >= 0" for radius in radii if not math.isfinite(radius)]
    if problems:
        raise ConfigError(problems)
    methods = [Attack(name, cast(Norm, norm), steps) for name in chosen]
    results = run.attack(_existing(folder), methods, radii, episodes, seed, _with_threads(None, threads))
    if as_json:
        _say((folder / "attack.json").read_text(encoding="utf-8").rstrip())
        return
    for result in results:
        at = "" if result.name == "natural" else f" at {result.epsilon:g}"
        _say(f"{result.name}{at}: {_sentence(result.evaluation)}")
    worst = min(results[1:], key=lambda result: result.evaluation.mean)
    _say(f"strongest: {worst.name} at {worst.epsilon:g}; picture: {folder / 'attack.png'}")


@app.command()
def config(config: Config, overrides: Overrides = None) -> None:
    """Check CONFIG and print it with every setting resolved."""
    settings = load_settings(RunSettings, config, overrides or [])
    run.make_trainer(settings).env.close()
    sys.stdout.write(dump_settings(settings))


@app.command()
def envs() -> None:
    """List the built-in environments; every other Gymnasium id works too."""
    for info in list_envs():
        _say(f"{info.id}: {info.description}")
        _say(f"    observation: {info.observation}; action: {info.action}; {info.max_episode_steps} steps at most")
        _say(f"    may drift: {', '.join(info.physics)}")


@app.command()
def bench(
    section: Annotated[
        str,
        typer.Argument(
            metavar="[SECTION]",
            help="throughput, population, optimizer, recurrence, environments, scaling, memory, or all.",
        ),
    ] = "all",
    envs: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="Environments of each member; repeat for several. Not for optimizer.", show_default=False
        ),
    ] = None,
    population: Annotated[
        list[int] | None,
        typer.Option(
            metavar="P", help="Members; repeat for several. For throughput, population, recurrence, memory.", show_default=False
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="T",
            help="Processor threads; by default all cores, for optimizer 1, for recurrence 1 and 2. Not for environments.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="Length of one repeat of a measurement. Not for memory.", show_default=False),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(metavar="R", help="Repeats of every measurement, in turns.", show_default="5; slow ones 3")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="For throughput: train once; the last line is the steps per second.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where results go.", show_default="artifacts/bench-<date>")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="OLD.json",
            help="Compare with a saved result; a ratio worse by over 10 % ends with status 1.",
            show_default=False,
        ),
    ] = None,
    new: Annotated[
        Path | None,
        typer.Option(
            metavar="NEW.json", help="With --compare: compare this saved result, measure nothing.", show_default=False
        ),
    ] = None,
) -> None:
    """Measure Hardy's speed and memory on this machine: a table, pictures and bench.json; or compare two results."""
    from hardy.bench import command  # nothing else needs it

    given = {"envs": envs, "population": population, "threads": threads, "seconds": seconds, "repeats": repeats}
    status = command.run(section, given, is_plain=plain, out=out, old=compare, new=new, show=_say)
    if status:
        raise typer.Exit(status)


def _with_threads(overrides: list[str] | None, threads: int | None) -> list[str]:
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ConfigError([f"--threads {threads}: must be a whole number from 1 to {MOST_THREADS}"])
    return [*(overrides or []), *([] if threads is None else [f"threads={threads}"])]


def _existing(folder: Path) -> Path:
    if folder.is_file():
        around = next((parent for parent in folder.parents if (parent / run.CONFIG).is_file()), None)
        near = "" if around is None else f" (did you mean '{around}'?)"
        raise ConfigError([f"{folder}: is a file; the folder of a run is needed{near}"])
    if not folder.is_dir():
        parent = folder.parent
        runs = sorted(path.name for path in parent.iterdir() if (path / run.CONFIG).exists()) if parent.is_dir() else []
        known = f"; runs in {parent} are {', '.join(runs)}" if runs else ""
        raise ConfigError([f"{folder}: no such folder{known}"])
    return folder


def _sentence(result: run.Evaluation) -> str:
    return f"return {result.mean:.1f}, 95 % interval {result.low:.1f} to {result.high:.1f}, {result.episodes} episodes"


def _finish(outcome: run.Outcome) -> None:
    if outcome.evaluation is not None:
        _say(f"evaluation: {_sentence(outcome.evaluation)}")
    _say(f"results: {outcome.folder}")
    if outcome.status == "interrupted":
        going_on = f"continue with: hardy resume {outcome.folder}"
        _say(f"interrupted; {going_on if outcome.resumable else 'there is no checkpoint yet to continue from'}")
        raise typer.Exit(INTERRUPTED)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    Console(stderr=True, highlight=False).print(f"warning: {message}", soft_wrap=True, markup=False)


@sigterm_as_ctrl_c()
def main() -> None:
    """Entry point: a mistake of the user ends with one message and exit status 2, without a traceback."""
    warnings.showwarning = _show_warning
    keep_freed_memory()
    try:
        app()
    except (ConfigError, CheckpointError) as error:
        print_error(str(error))
        sys.exit(USER_ERROR)
    except (PopulationLostError, run.DivergedError) as error:
        print_error(str(error))
        sys.exit(FAILED)
