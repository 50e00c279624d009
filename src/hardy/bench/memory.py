"""The most memory that a training process holds, each size in a fresh process."""

from __future__ import annotations

from collections.abc import Iterator

from hardy.bench.options import Options
from hardy.bench.results import Part, count_threads, measurement, ratio
from hardy.bench.timing import Say
from hardy.bench.work import Work, peak_of_imports, train_in_fresh_process
from hardy.parallel import available_cores

MEMBERS = (1, 8)
ENVS = (64,)


def measure(options: Options, say: Say) -> Iterator[Part]:
    """One part for each number of environments: two iterations of every size, beside a process that only imports."""
    threads, repeats = options.threads or available_cores(), options.repeats or 3
    sizes = options.population or MEMBERS
    for envs in options.envs or ENVS:
        group = f"N = {envs}, {count_threads(threads)}"
        imports: list[float] = []
        peaks: dict[int, list[float]] = {size: [] for size in sizes}
        for repeat in range(repeats):
            say(f"{group}: repeat {repeat + 1} of {repeats}")
            imports.append(peak_of_imports())
            for size in sizes:
                work = Work(num_envs=envs, population=size, threads=threads, hidden=options.hidden)
                peaks[size].append(train_in_fresh_process(work).peak_mib)
        found = [measurement(group, f"P = {size}", "MiB", peak) for size, peak in peaks.items()]
        yield Part(
            measurements=(measurement(group, "imports alone", "MiB", imports), *found),
            ratios=tuple(
                ratio(f"memory over imports alone; P = {size}, {group}", "lower", peak, imports) for size, peak in peaks.items()
            ),
        )
