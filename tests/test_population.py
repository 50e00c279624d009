"""The population axis: rules on every field, exploits leaf by leaf, reductions per member, streams per member."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardy.population import (
    ExploitRule,
    Leaf,
    MemberGenerators,
    copied,
    expand,
    exploit_,
    is_training_state,
    kept,
    leaves,
    member_mean,
    member_norm,
    member_sum,
    nested,
    per_member,
    reset_,
    reset_to,
    stream_seed,
    training_state,
)

P = 5


@training_state
class Inner:
    """A part with a state of its own."""

    moments: Tensor = copied()
    score: Tensor = reset_to(-1.0)
    clock: Tensor = kept()


@training_state
class Outer:
    """Every way a leaf can be held."""

    weight: Tensor = copied()
    buffers: dict[str, Tensor] = copied()
    layers: list[tuple[Tensor, Tensor]] = copied()
    is_first: Tensor = reset_to(True)
    hidden: tuple[Tensor, Tensor] = reset_to(0.0)
    member_id: Tensor = kept()
    part: Inner = nested()
    parts: dict[str, Inner] = nested()
    absent: Tensor | None = copied()


PATHS = {
    "weight": ExploitRule.COPY,
    "buffers.a": ExploitRule.COPY,
    "layers.0.0": ExploitRule.COPY,
    "layers.0.1": ExploitRule.COPY,
    "is_first": ExploitRule.RESET,
    "hidden.0": ExploitRule.RESET,
    "hidden.1": ExploitRule.RESET,
    "member_id": ExploitRule.KEEP,
    "part.moments": ExploitRule.COPY,
    "part.score": ExploitRule.RESET,
    "part.clock": ExploitRule.KEEP,
    "parts.x.moments": ExploitRule.COPY,
    "parts.x.score": ExploitRule.RESET,
    "parts.x.clock": ExploitRule.KEEP,
}


def inner() -> Inner:
    return Inner(moments=torch.randn(P, 3, dtype=torch.float64), score=torch.randn(P), clock=torch.randint(0, 99, (P, 2)))


def outer() -> Outer:
    return Outer(
        weight=torch.randn(P, 7, 3).requires_grad_(),
        buffers={"a": torch.randint(0, 99, (P,))},
        layers=[(torch.randn(P, 2), torch.randn(P, 11))],
        is_first=torch.zeros(P, 2, dtype=torch.bool),
        hidden=(torch.randn(P, 3), torch.randn(P, 3)),
        member_id=torch.arange(P),
        part=inner(),
        parts={"x": inner()},
        absent=None,
    )


def snapshot(state: object) -> dict[str, Tensor]:
    return {leaf.path: leaf.tensor.detach().clone() for leaf in leaves(state)}


def broken_rules(before: dict[str, Tensor], after: list[Leaf], source: list[int]) -> list[str]:
    """Paths of the leaves of which some row is not what its rule says."""
    broken = []
    for leaf in after:
        expected = before[leaf.path].clone()
        for member, origin in enumerate(source):
            if member != origin and leaf.rule is ExploitRule.COPY:
                expected[member] = before[leaf.path][origin]
            elif member != origin and leaf.rule is ExploitRule.RESET:
                expected[member] = leaf.initial
        if not torch.equal(leaf.tensor.detach(), expected):
            broken.append(leaf.path)
    return broken


def test_a_field_without_a_rule_fails_where_its_class_is_defined() -> None:
    with pytest.raises(TypeError, match=r"Forgotten\.buffer has no exploit rule"):

        @training_state
        class Forgotten:
            weight: Tensor = copied()
            buffer: Tensor


def test_an_inherited_field_without_a_rule_fails_too() -> None:
    @dataclasses.dataclass
    class Base:
        buffer: Tensor

    with pytest.raises(TypeError, match=r"Derived\.buffer has no exploit rule"):

        @training_state
        class Derived(Base):
            weight: Tensor = copied(kw_only=True)


def test_leaves_are_every_tensor_with_its_path_and_rule() -> None:
    found = {leaf.path: leaf.rule for leaf in leaves(outer())}
    assert found == PATHS
    initial = {leaf.path: leaf.initial for leaf in leaves(outer()) if leaf.rule is ExploitRule.RESET}
    assert initial == {"is_first": True, "hidden.0": 0.0, "hidden.1": 0.0, "part.score": -1.0, "parts.x.score": -1.0}


def test_leaves_of_a_held_state_follow_its_own_rules() -> None:
    """Declared copied() by its holder, a state still keeps what it declares kept()."""

    @training_state
    class Holder:
        part: Inner = copied()

    assert [leaf.rule for leaf in leaves(Holder(inner()))] == [ExploitRule.COPY, ExploitRule.RESET, ExploitRule.KEEP]


@pytest.mark.parametrize("value", [3, "text", object()])
def test_what_is_no_tensor_is_refused(value: Any) -> None:
    state = outer()
    state.buffers["bad"] = value
    with pytest.raises(TypeError, match=rf"buffers\.bad holds a {type(value).__name__}"):
        list(leaves(state))


def test_a_tensor_declared_nested_is_refused() -> None:
    state: Any = outer()
    state.part = torch.zeros(P)
    with pytest.raises(TypeError, match="part is declared nested"):
        list(leaves(state))


def test_generators_are_a_leaf_that_must_be_kept() -> None:
    """A clone that repeated its parent's draws would explore exactly what the parent explores."""

    @training_state
    class Kept:
        noise: MemberGenerators = kept()

    @training_state
    class Cloned:
        noise: MemberGenerators = copied()

    state = Kept(MemberGenerators([1, 2], "noise"))
    (leaf,) = leaves(state)
    assert (leaf.path, leaf.rule) == ("noise", ExploitRule.KEEP)
    exploit_(state, torch.tensor([0, 0]))
    assert torch.equal(state.noise.get_state(), leaf.tensor)
    expected = drawn(state.noise)
    leaf.restore_(leaf.tensor)
    assert all(torch.equal(left, right) for left, right in zip(drawn(state.noise), expected, strict=True))
    with pytest.raises(TypeError, match="noise holds random generators"):
        list(leaves(Cloned(state.noise)))


def test_restore_puts_every_leaf_back_in_its_own_storage() -> None:
    state = inner()
    before, addresses = snapshot(state), [leaf.tensor.data_ptr() for leaf in leaves(state)]
    exploit_(state, torch.tensor([4, 0, 1, 2, 3]))
    for leaf in leaves(state):
        leaf.restore_(before[leaf.path])
    assert all(torch.equal(leaf.tensor, before[leaf.path]) for leaf in leaves(state))
    assert [leaf.tensor.data_ptr() for leaf in leaves(state)] == addresses


def test_is_training_state() -> None:
    @dataclasses.dataclass
    class Plain:
        value: int = 0

    assert is_training_state(inner()) and is_training_state(outer())
    assert not is_training_state(Plain()) and not is_training_state(Inner) and not is_training_state({})


@settings(deadline=None, max_examples=25)
@given(source=st.lists(st.integers(0, P - 1), min_size=P, max_size=P))
def test_after_any_exploit_every_leaf_obeys_its_rule_at_its_old_address(source: list[int]) -> None:
    """Any map of members to members, so swaps and cycles too: every source is read before it is written."""
    state = outer()
    before, addresses = snapshot(state), [leaf.tensor.data_ptr() for leaf in leaves(state)]
    exploit_(state, torch.tensor(source))
    assert broken_rules(before, list(leaves(state)), source) == []
    assert [leaf.tensor.data_ptr() for leaf in leaves(state)] == addresses
    assert state.weight.requires_grad


def test_a_swap_swaps() -> None:
    state = inner()
    first, second = state.moments[0].clone(), state.moments[1].clone()
    exploit_(state, torch.tensor([1, 0, 2, 3, 4]))
    assert torch.equal(state.moments[0], second) and torch.equal(state.moments[1], first)


def test_a_tensor_that_two_fields_share_is_copied_once() -> None:
    """The learning rate is one tensor in the hyperparameters and in the optimizer."""

    @training_state
    class Shared:
        rate: Tensor = copied()
        optimizer: dict[str, Tensor] = copied()

    rate = torch.tensor([0.1, 0.2])
    exploit_(Shared(rate, {"lr": rate}), torch.tensor([1, 0]))
    torch.testing.assert_close(rate, torch.tensor([0.2, 0.1]))


@pytest.mark.parametrize("shape", [(), (P + 1,), (3, P)])
def test_a_leaf_without_the_population_axis_is_refused_before_anything_is_written(shape: tuple[int, ...]) -> None:
    state = outer()
    state.layers.append((torch.zeros(P), torch.zeros(shape)))
    before = snapshot(state)
    with pytest.raises(ValueError, match=r"layers\.1\.1 has shape"):
        exploit_(state, torch.tensor([4, 1, 2, 3, 0]))
    assert all(torch.equal(leaf.tensor, before[leaf.path]) for leaf in leaves(state))


def test_survivors_alone_change_nothing() -> None:
    state = outer()
    before = snapshot(state)
    exploit_(state, torch.arange(P))
    assert all(torch.equal(leaf.tensor, before[leaf.path]) for leaf in leaves(state))


@pytest.mark.parametrize("path", sorted(PATHS))
def test_a_forgotten_leaf_would_be_seen(path: str) -> None:
    """The check above is sharp: undo or spoil the exploit of one leaf, and that leaf and no other is reported."""
    state, source = outer(), [4, 1, 2, 3, 0]
    before = snapshot(state)
    exploit_(state, torch.tensor(source))
    leaf = next(leaf for leaf in leaves(state) if leaf.path == path)
    with torch.no_grad():
        leaf.tensor.copy_(before[path] if leaf.rule is not ExploitRule.KEEP else before[path][source])
    assert broken_rules(before, list(leaves(state)), source) == [path]


@pytest.mark.parametrize("source", [[0, 1, 2, 3, 5], [-1, 1, 2, 3, 4]])
def test_a_source_outside_the_population_is_refused_before_anything_is_written(source: list[int]) -> None:
    state = outer()
    before = snapshot(state)
    with pytest.raises(ValueError, match="every entry must be a member, 0 to 4"):
        exploit_(state, torch.tensor(source))
    assert all(torch.equal(leaf.tensor, before[leaf.path]) for leaf in leaves(state))


def test_reset_fills_only_the_reset_leaves_of_the_chosen() -> None:
    state = outer()
    before = snapshot(state)
    chosen = torch.tensor([False, True, False, True, False])
    reset_(state, chosen)
    for leaf in leaves(state):
        expected = before[leaf.path].clone()
        if leaf.rule is ExploitRule.RESET:
            expected[chosen] = leaf.initial
        assert torch.equal(leaf.tensor.detach(), expected), leaf.path


def test_expand() -> None:
    assert expand(0.5, 3).tolist() == [0.5, 0.5, 0.5]
    assert expand([1.0, 2.0, 3.0], 3).tolist() == [1.0, 2.0, 3.0]
    assert expand(2.0, 3, dtype=torch.int64).dtype == torch.int64
    given_tensor = torch.tensor([1.0, 2.0, 3.0])
    fresh = expand(given_tensor, 3)
    fresh[0] = 9.0
    one = expand(torch.tensor(1.0), 2)
    one[0] = 5.0
    assert given_tensor.tolist() == [1.0, 2.0, 3.0]
    assert one.tolist() == [5.0, 1.0]  # rows of their own, not one number seen twice
    with pytest.raises(ValueError, match=r"got shape \(2,\): a population of 3"):
        expand([1.0, 2.0], 3)
    with pytest.raises(ValueError, match=r"got shape \(3, 1\)"):
        expand(torch.zeros(3, 1), 3)


def test_per_member() -> None:
    value = torch.tensor([1.0, 2.0])
    assert per_member(value, 1).shape == (2,)
    assert per_member(value, 4).shape == (2, 1, 1, 1)
    assert (per_member(value, 3) * torch.ones(2, 3, 5))[1].eq(2).all()


@pytest.mark.parametrize("shape", [(P,), (P, 3), (P, 3, 7)])
def test_reductions_keep_members_apart(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, dtype=torch.float64)
    rows = value.reshape(P, -1)
    torch.testing.assert_close(member_sum(value), rows.sum(1))
    torch.testing.assert_close(member_mean(value), rows.mean(1))
    norms = member_norm([value, 2 * value])
    torch.testing.assert_close(norms, rows.square().sum(1).mul(5).sqrt())
    torch.testing.assert_close(member_norm([value[:1], 2 * value[:1]]), norms[:1])
    spoiled = value.clone()
    spoiled[2] = torch.nan
    others = torch.arange(P) != 2
    for reduce in (member_sum, member_mean, lambda x: member_norm([x])):
        assert torch.equal(reduce(spoiled)[others], reduce(value)[others])
        assert reduce(spoiled)[2].isnan()


def test_masked_reductions_ignore_what_is_outside_in_value_and_gradient() -> None:
    value = torch.tensor([[1.0, torch.nan, 3.0], [torch.inf, torch.nan, torch.nan], [2.0, 4.0, 9.0]], requires_grad=True)
    where = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    assert member_sum(value, where).tolist() == [4.0, 0.0, 6.0]
    mean = member_mean(value, where)
    assert mean.tolist() == [2.0, 0.0, 3.0]
    mean.sum().backward()
    torch.testing.assert_close(value.grad, torch.where(where, 0.5, 0.0))


def test_the_mask_may_have_axes_of_length_one() -> None:
    value, where = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[[True], [False], [True]], [[True], [True], [False]]])
    assert member_mean(value, where).tolist() == [2.5, 7.5]


def test_stream_seeds_are_the_same_on_every_machine() -> None:
    assert [stream_seed(0), stream_seed(0, "rollout"), stream_seed(3, "rollout", 2)] == [
        5621864261735219286,
        2943707576100979090,
        5308642721421294548,
    ]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**40), stream=st.sampled_from(["rollout", "update", "noise"]), member=st.integers(1, 1000))
def test_stream_seeds_differ_in_every_part_and_fit_63_bits(seed: int, stream: str, member: int) -> None:
    base = stream_seed(seed, stream, member)
    assert 0 <= base < 2**63
    assert len({base, stream_seed(seed + 1, stream, member), stream_seed(seed, stream + "2", member)}) == 3
    assert base not in (stream_seed(seed, stream, member + 1), stream_seed(seed, stream))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((0,), (0, 0)),
        ((0, "a"), (0, 97)),
        ((0, "a"), (0, "a\0")),
        ((0, "abcd", "efgh"), (0, "abcdefgh")),
        ((1 + (2 << 32),), (1, 2)),
    ],
)
def test_streams_of_different_names_are_different_streams(left: tuple[Any, ...], right: tuple[Any, ...]) -> None:
    assert stream_seed(*left) != stream_seed(*right)


def drawn(generators: MemberGenerators) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = len(generators)
    normal, uniform = torch.empty(size, 7, 3), torch.empty(size, 11)
    return generators.normal_(normal), generators.uniform_(uniform), generators.permutations(13), generators.keys()


def test_a_member_draws_the_same_in_any_population() -> None:
    together = drawn(MemberGenerators([11, 12, 13], "noise"))
    for member, seed in enumerate([11, 12, 13]):
        for all_members, alone in zip(together, drawn(MemberGenerators([seed], "noise")), strict=True):
            assert torch.equal(all_members[member], alone[0])


def test_a_member_draws_the_same_into_any_layout() -> None:
    """Time first in memory, the rows of three members have gaps and those of one have none."""
    for draw in (MemberGenerators.normal_, MemberGenerators.uniform_):
        three = draw(MemberGenerators([11, 12, 13], "noise"), torch.empty(17, 3, 5).transpose(0, 1))
        one = draw(MemberGenerators([11], "noise"), torch.empty(17, 1, 5).transpose(0, 1))
        assert torch.equal(three[0], one[0])


def test_members_and_streams_draw_differently() -> None:
    normal, uniform, permutation, keys = drawn(MemberGenerators([11, 12], "noise"))
    assert not torch.equal(normal[0], normal[1]) and not torch.equal(uniform[0], uniform[1])
    assert not torch.equal(permutation[0], permutation[1]) and keys[0] != keys[1]
    assert not torch.equal(normal, drawn(MemberGenerators([11, 12], "update"))[0])
    assert uniform.ge(0).all() and uniform.lt(1).all()
    assert permutation.sort(1).values.eq(torch.arange(13)).all()


def test_a_member_left_out_neither_draws_nor_changes() -> None:
    reference, partial = MemberGenerators([1, 2, 3], "noise"), MemberGenerators([1, 2, 3], "noise")
    out = partial.normal_(torch.full((3, 5), 9.0), torch.tensor([True, False, True]))
    first = reference.normal_(torch.empty(3, 5))
    assert out[1].eq(9.0).all() and torch.equal(out[[0, 2]], first[[0, 2]])
    order = partial.permutations(13, torch.tensor([True, False, True]))
    assert torch.equal(order[1], torch.arange(13)) and torch.equal(order[[0, 2]], reference.permutations(13)[[0, 2]])
    second = partial.uniform_(torch.full((3, 5), 9.0), torch.tensor([False, True, False]))
    assert second[[0, 2]].eq(9.0).all() and second[1].lt(1).all()
    keys = partial.keys(torch.tensor([False, True, False]))
    assert keys[[0, 2]].eq(0).all()
    # Member 1 drew nothing but these uniform numbers and its key, so it is where a fresh one is after the same draws.
    fresh = MemberGenerators([2], "noise")
    assert torch.equal(second[1], fresh.uniform_(torch.empty(1, 5))[0])
    assert keys[1] == fresh.keys()[0]


def test_keys_use_all_their_bits() -> None:
    generators = MemberGenerators([7], "noise")
    keys = torch.cat([generators.keys() for _ in range(200)])
    assert keys.ge(0).all() and len(keys.unique()) == 200
    assert all(40 < int((keys >> bit & 1).sum()) < 160 for bit in range(63))


def test_generator_states_round_trip() -> None:
    generators = MemberGenerators([5, 6], "noise")
    drawn(generators)
    state = generators.get_state()
    expected = drawn(generators)
    restored = MemberGenerators([0, 0], "other")
    restored.set_state(state)
    for left, right in zip(drawn(restored), expected, strict=True):
        assert torch.equal(left, right)
    with pytest.raises(ValueError, match="state of 2 generators for a population of 3"):
        MemberGenerators([1, 2, 3], "noise").set_state(state)
