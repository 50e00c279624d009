"""Training speed of Hardy beside other libraries: same task, same network, same number of updates, same run.

The work: velocity-masked CartPole, linear 128 and LSTM 128, unroll 128, 4 epochs of 4 minibatches, float32. The libraries take
turns (A B C A B C …), each repeat in a fresh process, so that a machine that slows down slows all of them. What counts is
environment steps per second over whole iterations, rollout and update together; the first iteration warms up. Each worker
reports what it did, and a result of other work is refused.

    python -m benchmarks.throughput [--only hardy sb3-contrib] [--envs 8 64] [--population 1] [--threads 2] [--repeats 5]
        [--steps 40000] [--limit 300] [--reinstall] [--out NAME]

A peer is installed from PyPI into `.venv-bench/NAME` when it is first measured; else it is left out, with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import LIBRARIES, OURS, PEERS, ROOT, Library, SkippedError, interpreter
from benchmarks.processes import CommandError, call
from hardy.bench import results
from hardy.interrupts import INTERRUPTED, sigterm_as_ctrl_c

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Work:
    """What a worker is asked to do; it travels to the worker as JSON."""

    num_envs: int
    """Environments of each agent."""
    threads: int
    iterations: int
    seed: int
    num_steps: int = 128
    hidden: int = 128
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 3e-4
    quantiles: int = 1
    """Of Hardy's critic; one gives exactly the common network of 132,867 weights."""
    warmup: int = 1
    """Iterations that are not measured; at least one."""
    population: int = 1
    """Agents, for libraries that train several."""


def check(result: dict[str, Any], work: Work) -> None:
    """Refuse what is not the common work.

    Libraries that cut a rollout at episode ends come out a step or a minibatch off now and then: 1 % of the steps and 10 %
    of the updates are let pass.

    Raises:
        SkippedError: another number of steps or updates, velocities in the observation, or weights that never changed.
    """
    iterations = work.iterations * work.population
    expected = {
        "steps": (work.num_envs * work.num_steps * iterations, 0.01),
        "updates": (work.epochs * work.minibatches * iterations, 0.1),
        "observation_size": (2, 0.0),
    }
    for name, (value, tolerance) in expected.items():
        if abs(result[name] - value) > tolerance * value:
            raise SkippedError(f"not the common work: {name} {result[name]} instead of {value}")
    if not result["weight_change"] > 0:
        raise SkippedError(f"not the common work: weights changed by {result['weight_change']}")


def measure(library: Library, work: Work, python: Path, limit: float) -> dict[str, Any]:
    """One repeat in a fresh process.

    Raises:
        SkippedError: the worker failed, took longer than ``limit`` seconds, or did other work.
    """
    if not library.population:
        work = dataclasses.replace(work, population=1)
    threads = str(work.threads)
    command = [str(python), "-m", f"benchmarks.{library.module}", json.dumps(dataclasses.asdict(work))]
    try:
        written = call(command, limit, ROOT, {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **library.environment})
    except CommandError as error:
        raise SkippedError(str(error)) from None
    lines = [line for line in written.splitlines() if line.startswith("{")]
    if not lines:
        raise SkippedError("its worker reported nothing")
    result: dict[str, Any] = json.loads(lines[-1])
    check(result, work)
    return result


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Our speed over theirs in paired repeats (`hardy.bench.results.ratio`): the median and the range.

    A repeat that only one of them has finished belongs to no pair.

    Raises:
        ValueError: there is no pair.
    """
    pairs = min(len(ours), len(theirs))
    if not pairs:
        raise ValueError(f"no pair of repeats: {len(ours)} and {len(theirs)}")
    found = results.ratio("speed", "higher", ours[:pairs], theirs[:pairs])
    return {"median": found.median, "lowest": found.low, "highest": found.high}


def summary(library: Library, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of one library at one size."""
    speeds = [run["steps_per_second"] for run in runs]
    lengths = [run["steps"] / run["episodes"] for run in runs if run["episodes"]]
    return {
        "version": runs[0]["versions"][library.package],
        "versions": runs[0]["versions"],
        "weights": runs[0]["weights"],
        "remarks": library.remarks,
        "steps_per_second": speeds,
        "median": statistics.median(speeds),
        "lowest": min(speeds),
        "highest": max(speeds),
        "mean_episode_length": statistics.fmean(lengths) if lengths else None,
    }


def compare(
    num_envs: int,
    *,
    threads: int = 2,
    population: int = 1,
    repeats: int = 5,
    steps: int = 40_000,
    limit: float = 300.0,
    quantiles: int = 1,
    libraries: Sequence[str] = tuple(LIBRARIES),
    reinstall: bool = False,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Let the libraries take turns ``repeats`` times at one size.

    A library that fails is left out from there on. Ctrl-C ends the measurement, and what is done by then is returned.

    Args:
        num_envs: environments of each agent.
        threads: of each process.
        population: agents, for the libraries that train several (`Library.population`).
        repeats: of each library.
        steps: environment steps that one repeat measures, of all agents together; at least two iterations are measured.
        limit: seconds for one repeat.
        quantiles: of Hardy's critic.
        libraries: names of `LIBRARIES`.
        reinstall: whether to install the peers anew.
        progress: called with a line after every repeat.

    Returns:
        What JSON can hold: ``work``, ``libraries`` (name: version, weights, remarks, steps_per_second, median, …), ``ratios``
        of Hardy, with and without its compiled library, to each peer (name of `OURS`: name: median, lowest, highest),
        ``skipped`` (name: reason), ``interrupted``.
    """
    iterations = max(steps // (num_envs * Work.num_steps * population), 2)
    work = Work(num_envs, threads, iterations, seed=0, quantiles=quantiles, population=population)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in libraries}
    skipped: dict[str, str] = {}
    interrupted = False
    try:
        pythons = _interpreters(libraries, reinstall, skipped)
        for repeat in range(repeats):
            for name in [name for name in libraries if name not in skipped]:
                where = f"N = {num_envs:3d}, P = {population}, {threads} threads, repeat {repeat + 1}/{repeats}: {name:15s}"
                try:
                    result = measure(LIBRARIES[name], dataclasses.replace(work, seed=repeat), pythons[name], limit)
                except SkippedError as error:
                    skipped[name] = str(error)
                    progress(f"{where} skipped: {error}")
                else:
                    runs[name].append(result)
                    progress(f"{where}{result['steps_per_second']:9.0f} steps/s")
    except KeyboardInterrupt:
        interrupted = True
    done = {name: summary(LIBRARIES[name], results) for name, results in runs.items() if results}
    speeds = {name: row["steps_per_second"] for name, row in done.items()}
    return {
        "work": {key: value for key, value in dataclasses.asdict(work).items() if key != "seed"},
        "libraries": done,
        "ratios": {
            ours.name: {peer.name: ratio(speeds[ours.name], speeds[peer.name]) for peer in PEERS if peer.name in done}
            for ours in OURS
            if ours.name in done
        },
        "skipped": skipped,
        "interrupted": interrupted,
    }


def _interpreters(libraries: Sequence[str], reinstall: bool, skipped: dict[str, str]) -> dict[str, Path]:
    """The interpreter of each library; those without one go to ``skipped``."""
    found: dict[str, Path] = {}
    for name in libraries:
        try:
            found[name] = interpreter(LIBRARIES[name], reinstall)
        except SkippedError as error:
            skipped[name] = str(error)
    return found


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }


def report(result: dict[str, Any]) -> str:
    """A table of one size: a line for each library, one for each that was left out."""
    work = result["work"]
    lines = [f"N = {work['num_envs']}, P = {work['population']}, {work['threads']} threads: environment steps per second"]
    for name, row in sorted(result["libraries"].items(), key=lambda item: -item[1]["median"]):
        line = f"  {name:15s} {row['version']:8s} {row['weights']:8,d} weights {row['median']:9,.0f}"
        line += f" ({row['lowest']:,.0f} to {row['highest']:,.0f})"
        for ours, ratios in result["ratios"].items():
            if name in ratios:
                line += f"   {ours}: " + "{median:.2f} times ({lowest:.2f} to {highest:.2f})".format(**ratios[name])
        lines += [line, f"  {'':15s} {row['remarks']}"]
    lines += [f"  {name:15s} left out: {reason}" for name, reason in result["skipped"].items()]
    if result["interrupted"]:
        lines.append("  interrupted before all repeats were done")
    return "\n".join(lines)


def positive(text: str) -> int:
    """A whole number of at least 1 from the command line."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are whole numbers from 1")
    return value


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, help=f"libraries to measure (all: {', '.join(LIBRARIES)})")
    parser.add_argument("--envs", type=positive, nargs="+", default=[8, 64], help="environments N (8 64)")
    parser.add_argument("--population", type=positive, default=1, help="agents, where a library trains several (1)")
    parser.add_argument("--threads", type=positive, default=2, help="threads per process (2)")
    parser.add_argument("--repeats", type=positive, default=5, help="repeats of each library and size (5)")
    parser.add_argument("--steps", type=positive, default=40_000, help="environment steps measured per repeat (40000)")
    parser.add_argument("--limit", type=positive, default=300, help="seconds for one repeat (300)")
    parser.add_argument("--quantiles", type=positive, default=1, help="of Hardy's critic; 1 is the common network (1)")
    parser.add_argument("--reinstall", action="store_true", help="install the peers anew")
    parser.add_argument("--out", default="throughput", help="name of the JSON file under benchmarks/results/ (throughput)")
    return parser.parse_args(arguments)


@sigterm_as_ctrl_c()
def main() -> None:
    """Read the arguments, measure, print and save."""
    given = parse()
    host = machine()
    path = RESULTS / f"{Path(given.out).stem}.json"
    path.parent.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    reinstall = given.reinstall
    for num_envs in given.envs:
        row = compare(
            num_envs, threads=given.threads, population=given.population, repeats=given.repeats, steps=given.steps,
            limit=given.limit, quantiles=given.quantiles, libraries=given.only or tuple(LIBRARIES), reinstall=reinstall,
            progress=lambda line: print(line, flush=True),
        )  # fmt: skip
        rows.append(row)
        path.write_text(json.dumps({"machine": host, "rows": rows}, indent=2) + "\n")
        reinstall = False
        if row["interrupted"]:
            break
    print(f"\n{host['processor']}, {host['cores']} cores, {host['system']}")
    print("\n".join(report(row) for row in rows))
    print(f"saved {path.relative_to(ROOT)}")
    if rows[-1]["interrupted"]:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
