"""Training speed on the common work, rollout and update together, and its share of what the machine could do at most."""

from __future__ import annotations

from collections.abc import Iterator

from hardy.bench.machine import limit, matrix_product, product_flop
from hardy.bench.options import Options
from hardy.bench.results import Part, count_threads, measurement, ratio
from hardy.bench.timing import Say, seconds_per_call
from hardy.bench.work import EPOCHS, Work, train_in_fresh_process
from hardy.parallel import available_cores

SIZES = ((8, 1), (64, 1), (8, 8))
"""Environments of each member and members, where the user names none."""
PRODUCT_SECONDS = 0.5


def works(options: Options) -> list[Work]:
    """What is trained: every combination of the sizes that the user names."""
    sizes: tuple[tuple[int, int], ...] = SIZES
    if options.envs or options.population:
        sizes = tuple((envs, members) for members in options.population or (1,) for envs in options.envs or (8, 64))
    threads, seconds = options.threads or available_cores(), options.seconds or 10.0
    return [
        Work(num_envs=envs, population=members, threads=threads, hidden=options.hidden, seconds=seconds)
        for envs, members in sizes
    ]


def measure(options: Options, say: Say) -> Iterator[Part]:
    """One part: the sizes and the matrix product take turns, each training in a fresh process."""
    chosen, repeats = works(options), options.repeats or 5
    names = [f"N = {work.num_envs}, P = {work.population}" for work in chosen]
    threads = chosen[0].threads
    group = count_threads(threads)
    multiply = matrix_product(threads)
    gflops: list[float] = []
    speeds: dict[str, list[float]] = {name: [] for name in names}
    limits: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name, work in zip(names, chosen, strict=True):
            say(f"{name}, {group}: repeat {repeat + 1} of {repeats}")
            multiply()
            gflops.append(product_flop() / (1e9 * seconds_per_call(multiply, PRODUCT_SECONDS)))
            found = train_in_fresh_process(work)
            speeds[name].append(found.steps_per_second)
            limits[name].append(limit(gflops[-1], found.weights, EPOCHS))
    measured = [measurement(group, name, "steps/s", speed) for name, speed in speeds.items()]
    measured.append(measurement(group, "matrix product", "GFLOP/s", gflops))
    shares = [ratio(f"share of the machine's limit; {name}, {group}", "higher", speeds[name], limits[name]) for name in names]
    yield Part(measurements=tuple(measured), ratios=tuple(shares))
