"""The minibatches of an update: who still trains, the means of what was measured, and one of them as a captured function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hardy.graphs import CapturedCalls
from hardy.population import MemberGenerators

Tensors = Mapping[str, Tensor]
HYPER, KEYS = "hyper.", "keys"
"""In front of the hyperparameters' names, and the name of the noise's keys, among the arguments of the captured function."""


class Progress:
    """Which members still train in this update, and the mean of each metric over the minibatches that each trained on.

    Its tensors keep their addresses, through `begin_` too.

    Args:
        like: a tensor on the device and of the precision that the sums shall have.
    """

    def __init__(self, members: int, like: Tensor) -> None:
        self.running = like.new_ones(members, dtype=torch.bool)
        self.sums: dict[str, Tensor] = {}
        self.count = like.new_zeros(members)
        self.skipped = like.new_zeros(members)

    def begin_(self) -> Progress:
        """Back to the begin of an update."""
        self.running.fill_(True)
        for total in (*self.sums.values(), self.count, self.skipped):
            total.zero_()
        return self

    def add_(self, metrics: Mapping[str, Tensor], running: Bool[Tensor, "P"], finite: Bool[Tensor, "P"]) -> None:
        """One minibatch, on which the members trained that were ``running`` and whose gradients were ``finite``."""
        trained = running & finite
        self.running.copy_(running)
        self.skipped += (running & ~finite).to(self.skipped.dtype)
        self.count += trained.to(self.count.dtype)
        for name, value in metrics.items():
            seen = torch.where(trained, value, torch.zeros_like(value))
            if name in self.sums:
                self.sums[name] += seen
            else:
                self.sums[name] = seen

    def mean(self) -> dict[str, Float[Tensor, "P"]]:
        """Of each metric; NaN where a member trained on nothing."""
        return {
            name: torch.where(self.count > 0, total / self.count.clamp(min=1), torch.full_like(total, torch.nan))
            for name, total in self.sums.items()
        }


class CapturedMinibatch:
    """All of a minibatch, from the loss to the step, as one captured function.

    The keys of the optimizer's noise are drawn for a whole update and every member: which of them train in a minibatch is known
    on the device only.

    Args:
        train_on: trains on a minibatch with hyperparameters and the members' keys, and enters that into the progress.
        like: observations, member after member.
    """

    def __init__(
        self, train_on: Callable[[Tensors, Tensors, Int[Tensor, "P"], Progress], None], like: Float[Tensor, "P ..."]
    ) -> None:
        self.progress = Progress(like.shape[0], like)
        self._keys: Iterator[Tensor] = iter(())

        def unpacked(given: Tensors) -> None:
            hyper = {name.removeprefix(HYPER): value for name, value in given.items() if name.startswith(HYPER)}
            batch = {name: value for name, value in given.items() if name != KEYS and not name.startswith(HYPER)}
            train_on(batch, hyper, given[KEYS], self.progress)

        self._calls = CapturedCalls(unpacked, like.device)

    def begin_(self, noise: MemberGenerators, minibatches: int) -> Progress:
        """Prepare for the minibatches of an update."""
        keys = torch.stack([noise.keys() for _ in range(minibatches)])
        self._keys = iter(keys.to(self.progress.running.device))
        return self.progress.begin_()

    def __call__(self, batch: Tensors, hyper: Tensors) -> None:
        """Train on one minibatch, given by name."""
        self._calls({**batch, **{HYPER + name: value for name, value in hyper.items()}, KEYS: next(self._keys)})
