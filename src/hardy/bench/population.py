"""What a population costs: speed in all and the time of an iteration over that of one agent, the sizes taking turns."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from hardy.bench.options import Options
from hardy.bench.results import Part, count_threads, measurement, ratio
from hardy.bench.timing import Say, take_turns, under
from hardy.bench.work import LONG, Work, make
from hardy.parallel import available_cores

MEMBERS = (1, 2, 4, 8, 16, 32)
ENVS = (8, 64)


def measure(options: Options, say: Say) -> Iterator[Part]:
    """One part for each number of environments; a population of one is always among the sizes, since it is the measure."""
    threads = options.threads or available_cores()
    sizes = sorted({1, *(options.population or MEMBERS)})
    for envs in options.envs or ENVS:
        group = f"N = {envs}, {count_threads(threads)}"
        say(f"{group}: warming up")
        trainers = {size: make(Work(num_envs=envs, population=size, threads=threads, hidden=options.hidden)) for size in sizes}
        calls = {f"P = {size}": functools.partial(trainer.iterate, LONG) for size, trainer in trainers.items()}
        times = take_turns(calls, options.repeats or 5, options.seconds or 2.0, under(group, say))
        found, costs = [], []
        for size, trainer in trainers.items():
            seconds = times[f"P = {size}"]
            steps = size * trainer.steps_per_iteration
            found.append(measurement(group, f"P = {size}", "steps/s", [steps / second for second in seconds], x=size))
            if size > 1:
                costs.append(ratio(f"cost over one agent; P = {size}, {group}", "lower", seconds, times["P = 1"]))
        yield Part(measurements=tuple(found), ratios=tuple(costs))
