"""Everything that is measured of Hardy's speed, into ``benchmarks/results/``: what ``make bench`` runs.

All sections of ``hardy bench`` (speed, populations, optimizers, recurrence, environments, scaling, memory) and then training
beside other libraries (`benchmarks.throughput`) as one section more, ``peers``; ``bench.json`` holds all of it, with what the
libraries were and why some are missing, ``bench.md`` and the pictures show it.

    python -m benchmarks
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import throughput
from benchmarks.peers import OURS
from hardy.bench import report
from hardy.bench.command import FAILED, Progress, measure
from hardy.bench.machine import OthersLoad
from hardy.bench.options import ALL
from hardy.bench.results import SectionResult, count_threads, measurement, ratio, save
from hardy.bench.work import BenchError
from hardy.config import ConfigError
from hardy.console import print_error
from hardy.interrupts import INTERRUPTED, sigterm_as_ctrl_c

SIZES = ((8, 1), (64, 1), (8, 8))
"""Environments of each agent and agents, as in the section ``throughput``."""
REFERENCE = "sb3-contrib"
"""Without this library the measurement has failed; the others are measured where they install."""


def peers() -> Iterator[dict[str, Any]]:
    """Training beside other libraries, in turns, size by size; printed too. Ctrl-C ends it after what is done by then."""
    for num_envs, population in SIZES:
        row = throughput.compare(num_envs, population=population, progress=lambda line: print(line, flush=True))
        print(throughput.report(row), flush=True)
        yield row
        if row["interrupted"]:
            return


def section(rows: list[dict[str, Any]], others: float | None) -> SectionResult:
    """The comparison as a section: what `hardy bench --compare` and the pictures take.

    Args:
        others: share of the machine's processor time that other programs took meanwhile.
    """
    measurements, ratios = [], []
    for row in rows:
        work, speeds = row["work"], {name: found["steps_per_second"] for name, found in row["libraries"].items()}
        group = f"N = {work['num_envs']}, P = {work['population']}, {count_threads(work['threads'])}"
        measurements += [measurement(group, name, "steps/s", speed) for name, speed in speeds.items()]
        own = {library.name: speeds.pop(library.name) for library in OURS if library.name in speeds}
        for mine, ours in own.items():
            for peer, theirs in speeds.items():
                if pairs := min(len(ours), len(theirs)):  # a library may have failed after a few repeats
                    ratios.append(ratio(f"{mine} over {peer}; {group}", "higher", ours[:pairs], theirs[:pairs]))
    complete = not rows[-1]["interrupted"]
    return SectionResult(name="peers", complete=complete, others=others, measurements=tuple(measurements), ratios=tuple(ratios))


@sigterm_as_ctrl_c()
def main() -> None:
    """Measure the sections, then the peers; what is done is saved at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    try:
        with Progress() as progress:
            result, folder, interrupted = measure(ALL, {}, throughput.RESULTS, progress.aside(print), progress.say)
    except (BenchError, ConfigError) as error:
        print_error(str(error))
        sys.exit(FAILED)
    if interrupted:
        sys.exit(INTERRUPTED)
    rows: list[dict[str, Any]] = []
    load = OthersLoad()
    for row in peers():
        rows.append(row)
        known = {"machine": throughput.machine(), "rows": rows}
        found = section(rows, load.share())
        sections = (*result.sections, found) if found.measurements else result.sections
        grown = result.model_copy(update={"sections": sections, "peers": known})
        path = save(grown, folder)
        report.write(grown, folder)
    print(f"saved {path}")
    if rows[-1]["interrupted"]:
        sys.exit(INTERRUPTED)
    if missing := [row["skipped"][REFERENCE] for row in rows if REFERENCE in row["skipped"]]:
        print_error(f"{REFERENCE}, which Hardy is measured by, was not measured: {missing[0]}")
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
