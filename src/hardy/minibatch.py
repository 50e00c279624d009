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

    Its tensors keep their addresses, through `begin_` too, once every metric has been seen.

    Args:
        like: a tensor on the device and of the precision that the sums shall have.
    """

    def __init__(self, members: int, like: Tensor) -> None:
        self.running = like.new_ones(members, dtype=torch.bool)
        self.names: tuple[str, ...] = ()
        self.sums = like.new_zeros(0, members)
        """``[names, P]``"""
        self.count = like.new_zeros(members)
        self.skipped = like.new_zeros(members)

    def begin_(self) -> Progress:
        """Back to the begin of an update."""
        self.running.fill_(True)
        for total in (self.sums, self.count, self.skipped):
            total.zero_()
        return self

    def add_(self, metrics: Mapping[str, Tensor], running: Bool[Tensor, "P"], finite: Bool[Tensor, "P"]) -> None:
        """One minibatch, on which the members trained that were ``running`` and whose gradients were ``finite``.

        Args:
            metrics: ``[P]`` each; one that is not there counts as 0.
        """
        trained = running & finite
        self.running.copy_(running)
        self.skipped += (running & ~finite).to(self.skipped.dtype)
        self.count += trained.to(self.count.dtype)
        if new := tuple(name for name in metrics if name not in self.names):
            self.names += new
            self.sums = torch.cat([self.sums, self.sums.new_zeros(len(new), len(trained))])
        # All of them at once: each by itself would be three small operations a metric.
        nothing = torch.zeros_like(self.count)
        self.sums += torch.stack([metrics.get(name, nothing) for name in self.names]).where(trained, 0.0)

    def mean(self) -> dict[str, Float[Tensor, "P"]]:
        """Of each metric; NaN where a member trained on nothing."""
        means = (self.sums / self.count.clamp(min=1)).where(self.count > 0, torch.nan)
        return dict(zip(self.names, means.unbind(), strict=True))


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
