"""Everything that is measured of Hardy's speed, into ``benchmarks/results/``: what ``make bench`` runs.

All sections of ``hardy bench`` (speed, populations, optimizers, recurrence, environments, scaling, memory) and then training
beside other libraries (`benchmarks.throughput`); ``bench.json`` holds both, ``bench.md`` and the pictures show the sections.

    python -m benchmarks
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks import throughput
from benchmarks.learning import RESULTS
from hardy.bench.command import Progress, measure
from hardy.bench.options import ALL
from hardy.bench.results import save
from hardy.bench.worker import INTERRUPTED

ENVS = (8, 64)
THREADS, REPEATS, STEPS = 2, 5, 40_000


def peers() -> dict[str, Any]:
    """Training beside other libraries, in turns; printed too."""
    rows = [
        throughput.compare(num_envs, THREADS, REPEATS, STEPS, quantiles=1, libraries=list(throughput.LIBRARIES))
        for num_envs in ENVS
    ]
    host = throughput.machine()
    throughput.report(rows, host)
    return {"machine": host, "rows": rows}


def main() -> None:
    """Measure the sections, then the peers; what is done is saved at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with Progress() as progress:
        result, folder, interrupted = measure(ALL, {}, RESULTS, progress.aside(print), progress.say)
    if interrupted:
        sys.exit(INTERRUPTED)
    path = save(result.model_copy(update={"peers": peers()}), folder)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
