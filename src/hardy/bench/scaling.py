"""How training speed changes with the hidden size, the length of the unroll and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

from hardy.bench.options import Options
from hardy.bench.results import Part, count_threads, measurement, ratio
from hardy.bench.timing import Say
from hardy.bench.work import Work, train_in_fresh_process
from hardy.parallel import available_cores

HIDDEN = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Times the common work's width."""
STEPS = (16, 32, 64, 128, 256, 512)
ENVS = (64,)
FEW_ENVS = 8
"""For the threads once more: where there is little to do, a second one is most likely to cost more than it gives."""


def series(envs: int, options: Options) -> dict[str, dict[int, Work]]:
    """What is trained, by what changes and its value."""
    threads = options.threads or available_cores()
    common = Work(num_envs=envs, threads=threads, hidden=options.hidden, seconds=options.seconds or 3.0)
    widths = [max(1, round(share * options.hidden)) for share in HIDDEN]
    doubled = [2**power for power in range(available_cores().bit_length()) if 2**power < available_cores()]
    return {
        "hidden size": {width: common.model_copy(update={"hidden": width}) for width in widths},
        "unroll": {steps: common.model_copy(update={"num_steps": steps}) for steps in STEPS},
        "threads": {count: common.model_copy(update={"threads": count}) for count in [*doubled, available_cores()]},
    }


def measure(options: Options, say: Say) -> Iterator[Part]:
    """One part for each number of environments and series; every training runs in a fresh process, the values taking turns."""
    repeats = options.repeats or 3
    chosen = [(envs, what) for envs in options.envs or ENVS for what in series(envs, options)]
    if options.envs is None:
        chosen.append((FEW_ENVS, "threads"))
    for envs, what in chosen:
        works = series(envs, options)[what]
        speeds: dict[int, list[float]] = {value: [] for value in works}
        for repeat in range(repeats):
            for value, work in works.items():
                say(f"N = {envs}, {what} {value}: repeat {repeat + 1} of {repeats}")
                speeds[value].append(train_in_fresh_process(work).steps_per_second)
        threads = next(iter(works.values())).threads
        group = f"{what}, N = {envs}" + ("" if what == "threads" else f", {count_threads(threads)}")
        # The common work itself is the measure; of the threads, one.
        base = {"hidden size": options.hidden, "unroll": 128, "threads": 1}[what]
        yield Part(
            measurements=tuple(measurement(group, str(value), "steps/s", speed, x=value) for value, speed in speeds.items()),
            ratios=tuple(
                ratio(f"{value} over {base}; {group}", "higher", speed, speeds[base])
                for value, speed in speeds.items()
                if value != base
            ),
        )
