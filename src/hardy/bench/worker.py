"""What runs in a process of its own: ``python -m hardy.bench.worker TASK SETTINGS``, the settings and the answers as JSON.

``section`` prints one line for each message (``{"say": …}``) and for each part that is found (``{"part": …}``);
``training`` and ``nothing`` print one line at their end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from hardy.allocator import keep_freed_memory
from hardy.bench import environments, memory, optimizer, population, recurrence, scaling, throughput
from hardy.bench.options import Options
from hardy.bench.results import Part
from hardy.bench.timing import Say
from hardy.bench.work import BenchError, Work, peak_memory, train
from hardy.config import Settings
from hardy.interrupts import INTERRUPTED, sigterm_as_ctrl_c

MEASURES: dict[str, Callable[[Options, Say], Iterator[Part]]] = {
    "throughput": throughput.measure,
    "population": population.measure,
    "optimizer": optimizer.measure,
    "recurrence": recurrence.measure,
    "environments": environments.measure,
    "scaling": scaling.measure,
    "memory": memory.measure,
}


class SectionTask(Settings):
    """A section to measure."""

    name: str
    options: Options


def section(task: SectionTask) -> None:
    """Measure a section and tell of every part as soon as it is found."""
    for part in MEASURES[task.name](task.options, lambda text: _tell({"say": text})):
        _tell({"part": part.model_dump(mode="json")})


def _tell(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


@sigterm_as_ctrl_c()
def main(task: str, given: str) -> None:
    """Do one task."""
    if task == "section":
        section(SectionTask.model_validate_json(given))
    elif task == "training":
        _tell(train(Work.model_validate_json(given)).model_dump(mode="json"))
    elif task == "nothing":
        _tell({"peak_mib": peak_memory()})
    else:
        raise ValueError(f"task = {task!r}: must be section, training or nothing")


if __name__ == "__main__":
    keep_freed_memory()
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BenchError as error:
        sys.exit(str(error))
