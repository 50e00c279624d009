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

SHORTEST_SHARE = 0.7
"""Rows join the group of a longer row while they are at least this share of its length: padding against extra calls."""
FEW_STEPS = 8
"""Rows shorter than this join any group: their padding costs less than another kernel call."""


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
    at = 0
    while at < order.size:
        longest = int(length[order[at]])
        shortest = 0 if longest < FEW_STEPS else longest * SHORTEST_SHARE
        # Lengths fall along `order`, so the group is the run of rows that are long enough.
        end = at + int(np.searchsorted(-length[order[at:]], -shortest, side="right"))
        if order.size - end <= 1:
            end = order.size
        rows = order[at:end]
        groups.append(_group(longest, length[rows], begin[rows], env[rows] + first_env, use_stored[rows], envs, device))
        at = end
    return groups


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
