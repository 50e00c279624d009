"""What ``hardy bench`` does: measure, show, save, compare."""

from __future__ import annotations

import datetime
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from hardy.bench import compare, report
from hardy.bench.machine import OthersLoad, describe
from hardy.bench.options import ALL, MINIBATCHES, Options, choose
from hardy.bench.results import Measurement, Part, Ratio, Result, SectionResult, count_threads, load, save
from hardy.bench.timing import Say, under
from hardy.bench.work import BenchError, Work, command, failure, train
from hardy.bench.worker import SectionTask
from hardy.config import ConfigError
from hardy.console import print_error
from hardy.interrupts import INTERRUPTED
from hardy.parallel import available_cores

FAILED = 1
PLAIN_SECONDS = 10.0
PATIENCE = 20.0
"""Seconds that an interrupted section has to end by itself."""
Show = Callable[[str], None]


def run(
    section: str,
    given: Mapping[str, Any],
    *,
    is_plain: bool = False,
    out: Path | None = None,
    old: Path | None = None,
    new: Path | None = None,
    show: Show,
) -> int:
    """The whole command; its exit status.

    Args:
        section: one of `hardy.bench.options.SECTIONS`, or ``all``.
        given: options by name, ``None`` where not given.
        is_plain: train once and print the speed alone.
        out: folder of the result; by default a new one in ``artifacts/``.
        old: a saved result to compare with.
        new: a saved result to compare instead of measuring.
        show: prints lines of the result.

    Raises:
        ConfigError: an argument is refused.
    """
    if new is not None:
        _refuse_beside_new(section, given, old, out, is_plain)
        assert old is not None
        return _compare(load(old), load(new), show)
    before = None if old is None else load(old)
    if before is not None and not is_plain:
        _require_shared(before, section, given)
    try:
        with Progress() as progress:
            aside = progress.aside(show)
            if is_plain:
                plain(section, {**given, "out": out, "compare": old}, aside, progress.say)
                return 0
            result, folder, interrupted = measure(section, given, out, aside, progress.say)
    except BenchError as error:
        print_error(str(error))
        return FAILED
    except KeyboardInterrupt:  # before anything was measured
        return INTERRUPTED
    show(f"\nresults: {folder}" if result.sections else "\nnothing was measured")
    if interrupted:
        show("interrupted; what was measured before is saved" if result.sections else "interrupted")
        return INTERRUPTED
    return 0 if before is None else _compare(before, result, show)


def plain(section: str, given: Mapping[str, Any], show: Show, say: Say) -> None:
    """One training of the common work; the last line is its speed in steps per second, all members together.

    Raises:
        ConfigError: another section, or several sizes, or an option without effect on a single training.
    """
    if section != "throughput":
        raise ConfigError([f"--plain: has no effect on {section}; it belongs to throughput"])
    single = {"repeats": "measures once", "out": "saves nothing", "compare": "measures no ratio"}
    problems = [
        f"--{name}: has no effect with --plain, which {why}" for name, why in single.items() if given.get(name) is not None
    ]
    _, options = choose(section, {name: value for name, value in given.items() if name not in single})
    for name, values in (("envs", options.envs), ("population", options.population)):
        if values and len(values) > 1:
            problems.append(f"--{name} {', '.join(map(str, values))}: only one with --plain, which measures once")
    if problems:
        raise ConfigError(problems)
    work = Work(
        num_envs=(options.envs or (64,))[0],
        population=(options.population or (1,))[0],
        threads=options.threads or available_cores(),
        seconds=options.seconds or PLAIN_SECONDS,
    )
    say(
        f"training: N = {work.num_envs}, P = {work.population}, {count_threads(work.threads)}, {work.seconds:g} seconds or more"
    )
    found = train(work)
    show(f"{found.weights} weights a member, {MINIBATCHES} minibatches; steps per second, all members together:")
    show(f"{found.steps_per_second:.0f}")


def measure(section: str, given: Mapping[str, Any], out: Path | None, show: Show, say: Say) -> tuple[Result, Path, bool]:
    """Measure sections and save what is found, part by part.

    Args:
        section: one of them, or ``all``.
        given: options by name, ``None`` where not given.
        out: folder of the result; by default a new one in ``artifacts/``.
        show: prints lines of the result.
        say: tells how far it is.

    Returns:
        The result, its folder, and whether an interrupt (Ctrl-C) ended it early.

    Raises:
        ConfigError: an option is refused or the folder cannot be written to.
        BenchError: a section failed; what was found before is saved.
    """
    chosen, options = choose(section, given)
    began = datetime.datetime.now(datetime.UTC)
    folder = out or Path("artifacts") / f"bench-{began:%Y%m%d-%H%M%S}"
    _make(folder)
    result = Result(date=began.isoformat(timespec="seconds"), machine=describe())
    for line in report.machine_lines(result.machine):
        show(line)
    done: list[SectionResult] = []
    try:
        for name in chosen:
            for found in _grow(name, options, under(name, say)):
                result = result.model_copy(update={"sections": (*done, found)})
                save(result, folder)
            done.append(found)
            show("\n" + "\n".join(report.section_lines(found)).rstrip())
    except KeyboardInterrupt:
        return result, folder, True
    finally:
        if result.sections:
            report.write(result, folder)
    return result, folder, False


def _compare(old: Result, new: Result, show: Show) -> int:
    comparison = compare.compare(old, new)
    for line in report.comparison_lines(comparison):
        show(line)
    return FAILED if comparison.regressions else 0


def _require_shared(old: Result, section: str, given: Mapping[str, Any]) -> None:
    """Refuse to measure for minutes what could not be compared in the end."""
    chosen, known = choose(section, given)[0], [found.name for found in old.sections]
    if not set(chosen) & set(known):
        raise ConfigError([f"--compare: the result of {old.date} holds {', '.join(known) or 'no section'}, and not {section}"])


def _refuse_beside_new(section: str, given: Mapping[str, Any], old: Path | None, out: Path | None, is_plain: bool) -> None:
    """Nothing is measured, so nothing about measuring has an effect."""
    wanted = [f"--{name}" for name, value in {**given, "out": out, "plain": is_plain or None}.items() if value is not None]
    wanted = [f"SECTION {section}", *wanted] if section != ALL else wanted
    problems = [f"{name}: has no effect with --new, which compares saved results without measuring" for name in wanted]
    if old is None:
        problems.append("--new: needs --compare, the older result")
    if problems:
        raise ConfigError(problems)


class Progress:
    """Tells how far a measurement is, on the standard error: in place in a terminal, line by line elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._spinner = Spinner("dots", "starting")
        self._live: Live | None = None
        if self._console.is_terminal:
            # Not redirected: the results belong on the standard output, wherever that leads.
            self._live = Live(
                self._spinner, console=self._console, transient=True, redirect_stdout=False, redirect_stderr=False
            )

    def __enter__(self) -> Progress:
        """Start the view."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Tell what is being measured."""
        if self._live is None:
            self._console.print(text, soft_wrap=True, markup=False)
        else:
            self._spinner.update(text=Text(text))

    def aside(self, show: Show) -> Show:
        """``show``, but with the view out of the way meanwhile."""

        def shown(text: str) -> None:
            if self._live is None:
                show(text)
            else:
                self._live.stop()
                show(text)
                self._live.start()

        return shown


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError([f"--out {folder}: cannot be written to: {error.strerror}"]) from None


def _grow(name: str, options: Options, say: Say) -> Iterator[SectionResult]:
    """A section as far as it is known, after each of its parts and at its end."""
    say("starting")
    load_of_others = OthersLoad()
    measurements: list[Measurement] = []
    ratios: list[Ratio] = []
    for part in _parts(name, options, say):
        measurements += part.measurements
        ratios += part.ratios
        yield SectionResult(name=name, complete=False, measurements=tuple(measurements), ratios=tuple(ratios))
    yield SectionResult(
        name=name,
        complete=True,
        others=load_of_others.share(),
        measurements=tuple(measurements),
        ratios=tuple(ratios),
    )


def _parts(name: str, options: Options, say: Say) -> Iterator[Part]:
    """What a section's own process finds."""
    with tempfile.TemporaryFile("w+") as errors:
        task = command("section", SectionTask(name=name, options=options))
        with subprocess.Popen(task, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    told = json.loads(line)
                    if "say" in told:
                        say(told["say"])
                    else:
                        yield Part.model_validate_json(json.dumps(told["part"]))
            except BaseException:
                _stop(process)
                raise
        if process.returncode != 0:
            errors.seek(0)
            raise BenchError(failure(name, process.returncode, errors.read()))


def _stop(process: subprocess.Popen[str]) -> None:
    """End a section so that it ends its own processes, or by force."""
    process.terminate()  # a shell's background job ignores Ctrl-C, and so do its children
    try:
        process.wait(PATIENCE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # the user asks again
        process.kill()
