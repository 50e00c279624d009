"""The population axis P: how values get it, how they are reduced along everything else, and what an exploit does to them.

A single agent is a population of one, so every tensor of the training state starts with P. When member ``i`` exploits
member ``j``, each field of the state obeys the rule in its own declaration:

* ``COPY``: the row of ``j`` replaces the row of ``i`` (weights, optimizer state, statistics, hyperparameters);
* ``RESET``: the row of ``i`` returns to its initial value (recurrent state, running scores);
* ``KEEP``: the row of ``i`` stays (environments, random generators, identity, history).

A field without a rule raises ``TypeError`` where its class is defined, that is, at import.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast, dataclass_transform

import torch
from jaxtyping import Bool, Int, Shaped, UInt8
from torch import Tensor

_RULE = "exploit_rule"
_INITIAL = "initial_value"
StateClass = TypeVar("StateClass")


class ExploitRule(enum.Enum):
    """What happens to a member's row of a field when that member exploits another."""

    COPY = "copy"
    RESET = "reset"
    KEEP = "keep"
    NESTED = "nested"
    """The field holds another training state, whose own fields carry the rules."""


def copied(**kwargs: Any) -> Any:
    """Declare a field whose rows an exploit copies from the source member."""
    return dataclasses.field(metadata={_RULE: ExploitRule.COPY}, **kwargs)


def reset_to(initial: float | bool, **kwargs: Any) -> Any:
    """Declare a field whose rows an exploit fills with ``initial``."""
    return dataclasses.field(metadata={_RULE: ExploitRule.RESET, _INITIAL: initial}, **kwargs)


def kept(**kwargs: Any) -> Any:
    """Declare a field that an exploit leaves alone."""
    return dataclasses.field(metadata={_RULE: ExploitRule.KEEP}, **kwargs)


def nested(**kwargs: Any) -> Any:
    """Declare a field that holds another training state, or a mapping of them; their own fields carry the rules."""
    return dataclasses.field(metadata={_RULE: ExploitRule.NESTED}, **kwargs)


@dataclass_transform(field_specifiers=(copied, reset_to, kept, nested))
def training_state(cls: type[StateClass]) -> type[StateClass]:
    """Make ``cls`` a dataclass whose every field declares an exploit rule.

    Raises:
        TypeError: a field has no rule.
    """
    made = dataclasses.dataclass(cls)
    for field in dataclasses.fields(cast(Any, made)):
        if _RULE not in field.metadata:
            raise TypeError(
                f"{cls.__name__}.{field.name} has no exploit rule: declare it with copied(), reset_to(...), kept() or nested()"
            )
    return made


def is_training_state(value: object) -> bool:
    """Whether ``value`` is an instance of a class made by `training_state`."""
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and all(_RULE in field.metadata for field in dataclasses.fields(value))
    )


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of a training state: its dotted path, its rule, its initial value if the rule is RESET."""

    path: str
    rule: ExploitRule
    initial: float | bool | None
    tensor: Tensor
    generators: MemberGenerators | None = None
    """Whose state ``tensor`` is a copy of, where the leaf is a set of random generators."""

    def restore_(self, value: Tensor) -> None:
        """Give the leaf a saved value, in its own storage."""
        if self.generators is None:
            self.tensor.copy_(value)
        else:
            self.generators.set_state(value)


def leaves(state: object, prefix: str = "") -> Iterator[Leaf]:
    """Every tensor of a training state, in declaration order; mappings and sequences are walked, ``None`` is skipped."""
    for field in dataclasses.fields(cast(Any, state)):
        rule = field.metadata[_RULE]
        yield from _walk(getattr(state, field.name), f"{prefix}{field.name}", rule, field.metadata.get(_INITIAL))


def _walk(value: object, path: str, rule: ExploitRule, initial: float | bool | None) -> Iterator[Leaf]:
    if isinstance(value, Tensor):
        if rule is ExploitRule.NESTED:
            raise TypeError(f"{path} is declared nested() but holds a tensor: give it copied(), reset_to(...) or kept()")
        yield Leaf(path, rule, initial, value)
    elif isinstance(value, MemberGenerators):
        if rule is not ExploitRule.KEEP:
            raise TypeError(
                f"{path} holds random generators: declare it with kept(), a clone must not repeat its parent's draws"
            )
        yield Leaf(path, rule, None, value.get_state(), value)
    elif is_training_state(value):
        yield from leaves(value, f"{path}.")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, f"{path}.{key}", rule, initial)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}.{index}", rule, initial)
    elif value is not None:
        raise TypeError(
            f"{path} holds a {type(value).__name__}: a training state holds tensors, mappings and sequences of them"
        )


@torch.no_grad()
def exploit_(state: object, source: Int[Tensor, "P"]) -> None:
    """Let every member with ``source[p] != p`` become member ``source[p]``, leaf by leaf as each field declares.

    Storage is written in place: no leaf changes its address. Sources are read before any row is written.

    Raises:
        ValueError: ``source`` names a member outside the population, or a leaf to be copied or reset has not one row for
            each member.
    """
    size = source.shape[0]
    if bool(((source < 0) | (source >= size)).any()):
        raise ValueError(f"source = {source.tolist()}: every entry must be a member, 0 to {size - 1}")
    replaced = source != torch.arange(size, device=source.device)
    if not bool(replaced.any()):
        return
    rows = replaced.nonzero().squeeze(1)
    copies: dict[int, Tensor] = {}  # a tensor that two fields share is copied once: twice would undo a swap
    for leaf in leaves(state):
        shape = tuple(leaf.tensor.shape)
        if leaf.rule is not ExploitRule.KEEP and shape[:1] != (size,):
            raise ValueError(f"{leaf.path} has shape {shape}: a population of {size} needs {size} rows first")
        if leaf.rule is ExploitRule.COPY:
            copies[id(leaf.tensor)] = leaf.tensor
    for tensor in copies.values():
        here = rows.to(tensor.device)
        tensor[here] = tensor[source[rows].to(tensor.device)]
    reset_(state, replaced)


@torch.no_grad()
def reset_(state: object, members: Bool[Tensor, "P"]) -> None:
    """Fill the RESET leaves of the selected members with their declared initial values, in place."""
    for leaf in leaves(state):
        if leaf.rule is ExploitRule.RESET:
            leaf.tensor[members.to(leaf.tensor.device)] = cast(Any, leaf.initial)


def expand(
    value: float | Sequence[float] | Tensor,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Shaped[Tensor, "P"]:
    """Give a number the population axis, or check that a sequence already has it. Always a fresh ``[P]`` tensor.

    Raises:
        ValueError: a sequence's length is not ``size``.
    """
    tensor = torch.as_tensor(value, dtype=dtype, device=device)
    if tensor.ndim == 0:
        return tensor.repeat(size)
    if tensor.shape != (size,):
        raise ValueError(f"got shape {tuple(tensor.shape)}: a population of {size} takes one number or {size} of them")
    return tensor.clone()


def per_member(value: Shaped[Tensor, "P"], ndim: int) -> Tensor:
    """View a ``[P]`` tensor as ``[P, 1, ..., 1]`` with ``ndim`` axes, so that it broadcasts against a stacked tensor."""
    return value.reshape(-1, *([1] * (ndim - 1)))


def member_sum(value: Shaped[Tensor, "P ..."], where: Bool[Tensor, "P ..."] | None = None) -> Shaped[Tensor, "P"]:
    """Sum over everything but P. Entries outside ``where`` do not count, whatever they hold (0·NaN is NaN, so no product)."""
    if where is not None:
        value = torch.where(where, value, 0)
    return value.flatten(1).sum(1) if value.ndim > 1 else value


def member_mean(value: Shaped[Tensor, "P ..."], where: Bool[Tensor, "P ..."] | None = None) -> Shaped[Tensor, "P"]:
    """Mean over everything but P, over the entries of ``where``; 0 for a member that has none."""
    if where is None:
        return value.flatten(1).mean(1) if value.ndim > 1 else value
    count = member_sum(where.expand_as(value).to(value.dtype))
    return member_sum(value, where.expand_as(value)) / count.clamp(min=1)


def member_norm(tensors: Sequence[Shaped[Tensor, "P ..."]]) -> Shaped[Tensor, "P"]:
    """Euclidean norm of each member's rows of all ``tensors`` together."""
    if len(tensors[0]) == 1:  # a whole tensor at a time, in one call
        norms = torch.stack(torch._foreach_norm(list(tensors)))[:, None]
    else:
        norms = torch.stack([torch.linalg.vector_norm(tensor.reshape(len(tensor), -1), dim=1) for tensor in tensors])
    total: Tensor = torch.linalg.vector_norm(norms, dim=0)
    return total


def stream_seed(seed: int, *stream: int | str) -> int:
    """A 63-bit seed for one named random stream of one member; streams of one member are statistically independent.

    The same (seed, stream) gives the same number on every machine, whatever the size of the population.
    """
    # A hash of the written-out list: every part counts, whatever its type, length or trailing zeros.
    parts = [part if isinstance(part, str) else int(part) for part in (seed, *stream)]
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


class MemberGenerators:
    """One CPU random generator per member, so that a member draws the same numbers in any population.

    Numbers are drawn into fresh memory and then copied: torch draws other numbers into memory with gaps, and rows of a
    population have gaps where a single agent's have none. So a member's numbers depend on neither layout nor device.

    Args:
        seeds: one seed per member.
        stream: name of the stream; two streams of one member are independent.
    """

    def __init__(self, seeds: Sequence[int], stream: str) -> None:
        self.generators = [torch.Generator().manual_seed(stream_seed(seed, stream)) for seed in seeds]

    def __len__(self) -> int:
        return len(self.generators)

    def normal_(self, out: Tensor, members: Bool[Tensor, "P"] | None = None) -> Tensor:
        """Fill ``out [P, ...]`` with standard normal numbers; members outside ``members`` neither draw nor change."""
        for index, generator in self._selected(members):
            out[index] = torch.empty(out.shape[1:], dtype=out.dtype).normal_(generator=generator)
        return out

    def uniform_(self, out: Tensor, members: Bool[Tensor, "P"] | None = None) -> Tensor:
        """Fill ``out [P, ...]`` with numbers uniform in [0, 1); members outside ``members`` neither draw nor change."""
        for index, generator in self._selected(members):
            out[index] = torch.empty(out.shape[1:], dtype=out.dtype).uniform_(generator=generator)
        return out

    def keys(self, members: Bool[Tensor, "P"] | None = None) -> Int[Tensor, "P"]:
        """One number in [0, 2⁶³) per member, the key of a counter-based generator; 0, undrawn, outside ``members``."""
        drawn = torch.zeros(len(self), dtype=torch.int64)
        for index, generator in self._selected(members):
            drawn[index].random_(generator=generator)
        return drawn

    def permutations(self, length: int, members: Bool[Tensor, "P"] | None = None) -> Int[Tensor, "P length"]:
        """One independent permutation of ``0 .. length-1`` per member; those outside ``members`` get the identity, undrawn."""
        drawn = torch.arange(length).repeat(len(self), 1)
        for index, generator in self._selected(members):
            drawn[index] = torch.randperm(length, generator=generator)
        return drawn

    def get_state(self) -> UInt8[Tensor, "P bytes"]:
        """The generators' states as bytes, one row per member."""
        return torch.stack([generator.get_state() for generator in self.generators])

    def set_state(self, state: UInt8[Tensor, "P bytes"]) -> None:
        """Restore what `get_state` returned."""
        if state.shape[0] != len(self):
            raise ValueError(f"state of {state.shape[0]} generators for a population of {len(self)}")
        for generator, row in zip(self.generators, state, strict=True):
            generator.set_state(row.clone())

    def _selected(self, members: Bool[Tensor, "P"] | None) -> list[tuple[int, torch.Generator]]:
        chosen = [True] * len(self) if members is None else members.tolist()
        return [(index, self.generators[index]) for index, use in enumerate(chosen) if use]
