"""Hardy's LSTM with exact resets beside `torch.nn.LSTM` without any, forward and backward, and beside the matrix product.

All work on the same numbers. `torch.nn.LSTM` is measured as it comes, one call on so many threads, and, where there are
several, once more as it is fastest: its sequences shared out to Python threads with one call each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hardy.bench.machine import matrix_product, product_flop
from hardy.bench.options import Options
from hardy.bench.results import Part, count_threads, measurement, ratio
from hardy.bench.timing import Say, take_turns, under
from hardy.nn.recurrent import StackedRecurrent
from hardy.parallel import available_cores, pool, set_threads

STEPS = 128
EPISODES = (22, 400)
"""Lengths: those of a random policy on CartPole, and of one that has nearly learnt."""
CASES = ((1, 1), (1, 2), (1, 16), (1, 64), (1, 1024), (8, 8), (64, 8))
"""Members and environments: of one member a minibatch of the common work with 8 environments (2) and with 64 (16), a whole
rollout (64) and the extremes, then populations."""


def flop(steps: int, envs: int, members: int, inputs: int, hidden: int) -> float:
    """Operations of an LSTM's matrix products over sequences: forward, gradient of the inputs, gradient of the weights."""
    return 3 * 2 * 4.0 * hidden * (inputs + hidden) * steps * envs * members


def episode_starts(steps: int, envs: int, length: int) -> Bool[Tensor, "T E"]:
    """Episodes of one length that follow one another, environment by environment out of step with the others."""
    phase = torch.arange(envs) * length // envs
    return (torch.arange(steps)[:, None] + phase) % length == 0


def measure(options: Options, say: Say) -> Iterator[Part]:
    """One part for each number of threads, of members and of environments."""
    cases: tuple[tuple[int, int], ...] = CASES
    if options.population or options.envs:
        cases = tuple((members, envs) for members in options.population or (1,) for envs in options.envs or _envs_of_one())
    threads_wanted = (options.threads,) if options.threads else tuple(range(1, min(2, available_cores()) + 1))
    for threads in threads_wanted:
        set_threads(threads)
        for members, envs in cases:
            yield _compare(members, envs, threads, options, say)


def _envs_of_one() -> tuple[int, ...]:
    return tuple(envs for members, envs in CASES if members == 1)


def _compare(members: int, envs: int, threads: int, options: Options, say: Say) -> Part:
    group = f"P = {members}, N = {envs}, {count_threads(threads)}"
    width = options.hidden
    layer = StackedRecurrent("lstm", width, width, 1, [torch.Generator().manual_seed(member) for member in range(members)])
    generator = torch.Generator().manual_seed(0)
    inputs, grad = torch.randn(2, members, STEPS, envs, width, generator=generator)
    state = torch.randn(members, envs, 2 * width, generator=generator)
    hardy = {length: f"Hardy, episodes of {length}" for length in EPISODES}
    plain, shared = "torch.nn.LSTM, no resets", "torch.nn.LSTM, no resets, shared out"
    candidates: dict[str, Callable[[], object]] = {"matrix product": matrix_product(threads)}
    candidates[plain] = torch_lstm(layer, inputs, state, grad, parts=1, threads=threads)
    if threads > 1 and members * envs > 1:
        candidates[shared] = torch_lstm(layer, inputs, state, grad, parts=min(threads, envs), threads=1)
    for length, name in hardy.items():
        candidates[name] = hardy_lstm(layer, inputs, state, grad, episode_starts(STEPS, envs, length).expand(members, -1, -1))
    times = take_turns(candidates, options.repeats or 5, options.seconds or 0.3, under(group, say))
    work = flop(STEPS, envs, members, width, width)
    speeds = {
        name: [(product_flop() if name == "matrix product" else work) / (1e9 * second) for second in seconds]
        for name, seconds in times.items()
    }
    ratios = [
        ratio(f"{hardy[length]}, over {below}; {group}", "higher", speeds[hardy[length]], speeds[below])
        for length in EPISODES
        for below in ("matrix product", plain, shared)
        if below in speeds
    ]
    found = [measurement(group, name, "GFLOP/s", speed) for name, speed in speeds.items()]
    return Part(measurements=tuple(found), ratios=tuple(ratios))


def hardy_lstm(
    layer: StackedRecurrent,
    inputs: Float[Tensor, "P T E I"],
    state: Float[Tensor, "P E S"],
    grad: Float[Tensor, "P T E H"],
    is_first: Bool[Tensor, "P T E"],
) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs Hardy's LSTM forward and backward: the gradients of the inputs and of the weights."""
    rows, starts = inputs.clone().requires_grad_(), is_first.contiguous()
    weights = list(layer.layer_weights(0))

    def run() -> tuple[Tensor, ...]:
        torch.set_num_threads(1)
        return torch.autograd.grad(layer(rows, state, starts), [rows, *weights], grad)

    return run


def torch_lstm(
    layer: StackedRecurrent,
    inputs: Float[Tensor, "P T E I"],
    state: Float[Tensor, "P E S"],
    grad: Float[Tensor, "P T E H"],
    *,
    parts: int,
    threads: int,
) -> Callable[[], list[tuple[Tensor, ...]]]:
    """A function that runs `torch.nn.LSTM` with the same weights forward and backward over the same sequences.

    Args:
        parts: calls that each member's environments are shared out to; several run side by side in Hardy's threads.
        threads: of PyTorch, within one call.
    """
    tasks: list[Callable[[], tuple[Tensor, ...]]] = []
    for member in range(inputs.shape[0]):
        lstm = nn.LSTM(layer.input_size, layer.hidden_size)
        with torch.no_grad():
            for own, other in zip(lstm.parameters(), layer.layer_weights(0), strict=True):
                own.copy_(other[member])
        pieces = zip(*(tensor[member].chunk(parts, dim=-2) for tensor in (inputs, state, grad)), strict=True)
        tasks += [_one_call(lstm, *piece) for piece in pieces]

    def run() -> list[tuple[Tensor, ...]]:
        torch.set_num_threads(threads)
        return list(pool().map(lambda index: tasks[index](), len(tasks))) if parts > 1 else [task() for task in tasks]

    return run


def _one_call(
    lstm: nn.LSTM, inputs: Float[Tensor, "T E I"], state: Float[Tensor, "E S"], grad: Float[Tensor, "T E H"]
) -> Callable[[], tuple[Tensor, ...]]:
    rows, gradient = inputs.contiguous().clone().requires_grad_(), grad.contiguous()
    hidden, cell = (part.contiguous() for part in state[None].chunk(2, dim=-1))
    return lambda: torch.autograd.grad(lstm(rows, (hidden, cell))[0], [rows, *lstm.parameters()], gradient)
