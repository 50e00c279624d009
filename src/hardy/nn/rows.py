"""Cutting sequences at their episode starts into independent rows for the fused recurrent kernels.

A fused kernel knows no resets. After a reset, though, the state is zero, so a batch of sequences cut at its episode
starts is a set of rows with known initial states: the stored state for a row that starts with the sequence, zero for the
others. Rows of similar length run side by side: exact resets, more rows and fewer sequential steps.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

CALL_COST = 150.0
"""What one kernel call costs beside its steps, in steps of one row (measured with 64 to 256 units; it is no sharp optimum)."""
STEP_COST = 1.2
"""What one time step of a call costs beside its rows, in the same unit."""


@dataclasses.dataclass(frozen=True)
class RowGroup:
    """``B`` rows run as one kernel call of ``L`` steps.

    Attributes:
        gather: ``[L * B]``, for each step of each row the flat index ``t * E + e`` of its input; padding points at a real step.
        kept: positions in ``0 .. L * B - 1`` that are not padding, or ``None`` if all are.
        target: flat index ``t * E + e`` of each kept position.
        continues: rows whose initial state is the stored one.
        env: the environment of each of those.
    """

    length: int
    rows: int
    gather: Int[Tensor, "steps"]
    kept: Int[Tensor, "kept"] | None
    target: Int[Tensor, "kept"]
    continues: Int[Tensor, "rows"]
    env: Int[Tensor, "rows"]


def plan_rows(is_first: Bool[np.ndarray, "T E"], first_env: int, last_env: int, device: torch.device) -> list[RowGroup]:
    """Plan the rows of environments ``first_env .. last_env - 1``; indices refer to the whole ``[T, E]`` block."""
    steps, envs = is_first.shape
    starts = is_first[:, first_env:last_env].T.copy()
    stored = ~starts[:, 0]
    starts[:, 0] = True
    position = np.flatnonzero(starts)
    length = np.diff(position, append=starts.size)
    env, begin = position // steps, position % steps
    use_stored = (begin == 0) & stored[env]
    order = np.argsort(-length, kind="stable")
    groups = []
    for first, last in _cheapest_cuts(length[order]):
        rows = order[first:last]
        longest = int(length[order[first]])
        groups.append(_group(longest, length[rows], begin[rows], env[rows] + first_env, use_stored[rows], envs, device))
    return groups


def _cheapest_cuts(length: Int[np.ndarray, "rows"]) -> list[tuple[int, int]]:
    """Cut rows, longest first, into runs whose calls and padding together cost least: dynamic programming over lengths."""
    longest, first = np.unique(-length, return_index=True)
    last = np.append(first[1:], len(length))
    longest = -longest
    cost = np.zeros(len(longest) + 1)
    begin = np.zeros(len(longest) + 1, dtype=np.int64)
    for end in range(1, len(longest) + 1):
        options = cost[:end] + CALL_COST + longest[:end] * (STEP_COST + last[end - 1] - first[:end])
        begin[end] = np.argmin(options)
        cost[end] = options[begin[end]]
    cuts = []
    end = len(longest)
    while end > 0:
        cuts.append((int(first[begin[end]]), int(last[end - 1])))
        end = int(begin[end])
    return cuts


def _group(
    longest: int,
    length: Int[np.ndarray, "B"],
    begin: Int[np.ndarray, "B"],
    env: Int[np.ndarray, "B"],
    use_stored: Bool[np.ndarray, "B"],
    envs: int,
    device: torch.device,
) -> RowGroup:
    step = np.arange(longest)[:, None]
    real = step < length
    index = np.where(real, (begin + step) * envs + env, begin * envs + env).ravel()
    gather = torch.from_numpy(index).to(device)
    continues = np.flatnonzero(use_stored)
    if real.all():
        kept, target = None, gather
    else:
        kept = torch.from_numpy(np.flatnonzero(real)).to(device)
        target = gather.index_select(0, kept)
    return RowGroup(
        length=longest,
        rows=len(length),
        gather=gather,
        kept=kept,
        target=target,
        continues=torch.from_numpy(continues).to(device),
        env=torch.from_numpy(env[continues]).to(device),
    )
