"""A policy over whole sequences in the compiled library against its layers: values, gradients, buffers."""

from __future__ import annotations

import copy
import gc
import itertools
import re

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from instruction_sets import LEVELS
from small_runs import shake_
from torch import nn

from hardy.nn import compiled_sequence
from hardy.nn.compiled_sequence import ACTIVATION, SHAPES_KEPT, Buffers, CompiledSequence
from hardy.ops.critic import CriticSettings
from hardy.parallel import set_threads
from hardy.policy import ActorCritic, PolicySettings

pytestmark = pytest.mark.skipif(not compiled_sequence.available(), reason="Hardy was installed without its compiled library")
P, T, E, O = 3, 9, 7, 5  # noqa: E741
POLICIES = {
    "shared": {},
    "apart": {"shared_memory": False},
    "no encoder": {"encoder": ()},
    "apart, no encoder": {"shared_memory": False, "encoder": ()},
    "no memory": {"memory": "none", "encoder": (37,)},
    "outputs only": {"memory": "none", "encoder": ()},
    "apart, no memory": {"shared_memory": False, "memory": "none", "encoder": (70, 3), "head": (4,)},
    "two layers": {"memory_layers": 2},
    "heads": {"head": (6, 17)},
    "wide": {"encoder": (131,), "memory_size": 67, "head": (70,)},
    "everything": {"shared_memory": False, "memory_layers": 2, "encoder": (3, 17), "memory_size": 19, "head": (2, 23)},
}


ACTIVATIONS = ("tanh", "relu", "elu", "silu")


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setattr(CompiledSequence, "level", request.param)


@pytest.fixture(autouse=True)
def on_and_in_parts(monkeypatch):
    monkeypatch.delenv("HARDY_COMPILED", raising=False)
    monkeypatch.setattr(compiled_sequence, "SMALLEST_PART", 1)
    yield
    set_threads(1)


def policy_of(members=P, twin=False, space=Discrete(2), **settings):  # noqa: B008
    given = {"memory_size": 11, "encoder": (13,), **settings}
    critic = CriticSettings(quantiles=3, twin=twin)
    policy = ActorCritic(Box(-1, 1, (O,)), space, PolicySettings(**given), critic, range(members))
    shake_(policy)
    return policy


def draw(policy, members=P, steps=T, envs=E):
    """Observations, state and episode starts."""
    obs = torch.randn(members, steps, envs, O)
    return obs, torch.randn(members, envs, policy.state_size), torch.rand(members, steps, envs) < 0.3


def gradients(policy, outputs, obs, **options):
    """Of a sum in which every output of every step counts differently: those of the observations, then those of the weights."""
    total = sum((torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view_as(o) * o.sin()).sum() for o in outputs)
    leaves = [obs, *(p for p in policy.parameters() if p.requires_grad and p is not policy.actor.log_std)]
    return torch.autograd.grad(total, leaves, **options)


def results(policy, obs, state, is_first):
    obs = obs.clone().requires_grad_()
    outputs = policy.outputs(obs, state, is_first)
    return [*(output.detach() for output in outputs), *gradients(policy, outputs, obs)]


def by_layers(policy, obs, state, is_first):
    """The same in double precision, by PyTorch's operations."""
    return results(copy.deepcopy(policy).double(), obs.double(), state.double(), is_first)


def assert_near(found, wanted, tolerance=1e-5):
    for mine, theirs in zip(found, wanted, strict=True):
        scale = theirs.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(mine.double() / scale, theirs / scale, rtol=0, atol=tolerance)


@pytest.fixture
def calls(monkeypatch):
    """How often the library was asked."""
    seen, real = [], CompiledSequence.__call__
    monkeypatch.setattr(CompiledSequence, "__call__", lambda self, *given: (seen.append(1), real(self, *given))[1])
    return seen


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("twin", [False, True], ids=["one", "twins"])
@pytest.mark.parametrize("name", POLICIES)
def test_values_and_gradients_are_those_of_the_layers(name, twin, calls):
    set_threads(3)
    policy = policy_of(twin=twin, **POLICIES[name])
    given = draw(policy)
    found = results(policy, *given)
    assert len(calls) == 1
    assert_near(found, by_layers(policy, *given))
    assert len(calls) == 1, "double precision is not the library's"


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_has_its_derivative(activation):
    policy = policy_of(activation=activation, encoder=(13, 70), head=(5,), space=Box(-1, 1, (2,)))
    given = draw(policy)
    assert_near(results(policy, *given), by_layers(policy, *given))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("members", "steps", "envs"), [(1, 1, 1), (1, 40, 1), (7, 1, 3), (1, 5, 64), (2, 130, 2)])
def test_any_number_of_members_steps_and_environments(members, steps, envs, threads):
    set_threads(threads)
    policy = policy_of(members, head=(70,))
    given = draw(policy, members, steps, envs)
    assert_near(results(policy, *given), by_layers(policy, *given))


def test_it_is_the_path_without_the_library_to_rounding(monkeypatch):
    policy = policy_of(shared_memory=False, twin=True)
    given = draw(policy)
    found = results(policy, *given)
    monkeypatch.setenv("HARDY_COMPILED", "0")
    assert_near(found, [value.double() for value in results(policy, *given)])


@pytest.mark.parametrize("space", [Discrete(4), Box(-1, 1, (3,))], ids=["discrete", "continuous"])
def test_a_loss_of_distributions_has_the_gradients_of_the_layers(space, calls):
    policy = policy_of(space=space)
    obs, state, is_first = draw(policy)
    actions = policy.distribution(policy.outputs(obs, state, is_first)[0]).sample(torch.rand(P, T, E, *space.shape))
    calls.clear()

    def found(policy, dtype):
        distribution, critic = policy(obs.to(dtype), state.to(dtype), is_first)
        taken = actions if actions.dtype is torch.int64 else actions.to(dtype)
        loss = distribution.log_prob(taken).mean() + 0.1 * distribution.entropy().mean() + critic.square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(policy.parameters()))]

    mine = found(policy, torch.float32)
    assert len(calls) == 1
    assert_near(mine, found(copy.deepcopy(policy).double(), torch.float64))


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_no_reset_and_nothing_but_resets(chance):
    policy = policy_of(memory_layers=2, shared_memory=False)
    obs, state, _ = draw(policy)
    given = obs, state, torch.full((P, T, E), bool(chance))
    assert_near(results(policy, *given), by_layers(policy, *given))


@pytest.mark.parametrize("index", [0, 1], ids=["actor", "critic"])
def test_a_loss_of_one_of_the_results(index):
    policy = policy_of(twin=True, shared_memory=False, head=(4,))
    obs, state, is_first = draw(policy)
    double = copy.deepcopy(policy).double()
    found, wanted = (
        torch.autograd.grad(one.outputs(obs.to(dtype), state.to(dtype), is_first)[index].square().sum(), list(one.parameters()),
                            allow_unused=True, materialize_grads=True)
        for one, dtype in ((policy, torch.float32), (double, torch.float64))
    )  # fmt: skip
    assert_near(found, wanted)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_threads_and_other_members_change_no_bit(activation):
    policy = policy_of(encoder=(20, 70), head=(9,), twin=True, activation=activation)
    obs, state, is_first = draw(policy)
    together = results(policy, obs, state, is_first)
    for threads in (2, 3, 17):
        set_threads(threads)
        for mine, theirs in zip(results(policy, obs, state, is_first), together, strict=True):
            assert torch.equal(mine, theirs)
    single = policy_of(1, encoder=(20, 70), head=(9,), twin=True, activation=activation)
    for member in range(P):
        own = slice(member, member + 1)
        single.load_state_dict({name: value[own] for name, value in policy.state_dict().items()})
        outputs = single.outputs(leaf := obs[own].clone().requires_grad_(), state[own], is_first[own])
        # The loss's factors are those of this member's place.
        factors = [torch.linspace(0.5, 1.5, P * o.numel()).view(P, *o.shape[1:])[own] for o in outputs]
        total = sum((factor * o.sin()).sum() for factor, o in zip(factors, outputs, strict=True))
        gradient = torch.autograd.grad(total, [leaf, *single.parameters()])
        for mine, theirs in zip((*outputs, *gradient), together, strict=True):
            assert torch.equal(mine, theirs[own])


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("settings", [*({"activation": name} for name in ACTIVATIONS), {"shared_memory": False}], ids=str)
def test_nan_stays_with_its_member_and_ends_with_a_reset(settings):
    set_threads(3)
    policy = policy_of(encoder=(20, 30), head=(9,), **settings)
    obs, state, is_first = draw(policy)
    is_first[1, :4, 3], is_first[1, 4, 3] = False, True
    clean = results(policy, obs, state, is_first)
    obs[1, 2, 3, 0] = torch.nan
    hurt = results(policy, obs, state, is_first)
    for mine, theirs in zip(hurt, clean, strict=True):
        assert torch.equal(mine[[0, 2]], theirs[[0, 2]])
    for mine, theirs in zip(hurt[:2], clean[:2], strict=True):
        assert mine[1, 2:4, 3].isnan().all()
        mine[1, 2:4, 3] = theirs[1, 2:4, 3]
        assert torch.equal(mine, theirs), "neither earlier steps, nor other environments, nor what follows the reset"
    assert not any(gradient[1].isfinite().all() for gradient in hurt[3:])
    state[2, 5] = torch.nan
    is_first[2, 0, 5] = True
    assert results(policy, obs, state, is_first)[0][2].isfinite().all(), "a state that is reset is not looked at"


@pytest.mark.usefixtures("level")
def test_tensors_in_any_memory_order():
    policy = policy_of(twin=True)
    obs, state, is_first = draw(policy)
    found = results(policy, obs, state, is_first)
    strided = [tensor.mT.contiguous().mT for tensor in (obs, state, is_first)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    for mine, theirs in zip(results(policy, *strided), found, strict=True):
        assert torch.equal(mine, theirs)
    # So may be the gradients that arrive.
    factor = torch.randn(P, T, 2, E)
    plain, turned = (
        torch.autograd.grad(policy.outputs(obs, state, is_first)[0], list(policy.parameters()), gradient,
                            allow_unused=True, materialize_grads=True)
        for gradient in (factor.mT.contiguous(), factor.mT)
    )  # fmt: skip
    for mine, theirs in zip(turned, plain, strict=True):
        assert torch.equal(mine, theirs)


def test_without_gradients_the_values_are_the_same_and_no_graph_is_kept():
    policy = policy_of()
    given = draw(policy)
    wanted = policy.outputs(*given)
    with torch.no_grad():
        found = policy.outputs(*given)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)
        assert theirs.requires_grad
        assert not mine.requires_grad


@pytest.mark.parametrize("frozen", ["core.encoder", "core.memory", "bias", "critic", "core.memory.weight_hh", ""])
def test_frozen_weights_get_no_gradient_and_the_others_theirs(frozen):
    policy = policy_of(head=(6,))
    given = draw(policy)
    names = ["observations", *(name for name, _ in policy.named_parameters())]
    every = dict(zip(names, results(policy, *given)[2:], strict=True))
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(frozen not in name)
    left = [name for name in names if name == "observations" or frozen not in name]
    assert (len(left) == 1) == (frozen == "")
    for name, gradient in zip(left, results(policy, *given)[2:], strict=True):
        assert torch.equal(gradient, every[name])
    assert policy.outputs(*given)[0].requires_grad == (frozen != "")


def test_gradients_stop_at_the_state():
    policy = policy_of()
    obs, state, is_first = draw(policy)
    total = policy.outputs(obs, state.requires_grad_(), is_first)[0].sum()
    assert torch.autograd.grad(total, state, allow_unused=True) == (None,)


def test_a_gradient_has_no_gradient():
    policy = policy_of()
    obs, state, is_first = draw(policy)
    obs.requires_grad_()
    (gradient,) = torch.autograd.grad(policy.outputs(obs, state, is_first)[0].square().sum(), obs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_both_biases_of_a_memory_have_gradients_of_their_own():
    policy = policy_of()
    memory, total = policy.core.memory, sum(output.sum() for output in policy.outputs(*draw(policy)))
    one, other = torch.autograd.grad(total, [memory.bias_ih_l0, memory.bias_hh_l0])  # backward() would copy what is shared
    assert torch.equal(one, other)
    assert one.data_ptr() != other.data_ptr()


# -------------------------------------------------------------------------------------------------------------- buffers


def test_graphs_alive_at_once_share_no_memory_and_a_graph_can_be_followed_twice():
    policy = policy_of(activation="silu")
    one, other = draw(policy), draw(policy)
    wanted = results(policy, *one)[2:]
    obs = one[0].clone().requires_grad_()
    outputs = policy.outputs(obs, *one[1:])
    results(policy, *other)
    for _ in range(2):
        for mine, theirs in zip(gradients(policy, outputs, obs, retain_graph=True), wanted, strict=True):
            assert torch.equal(mine, theirs)
        results(policy, *other)


@pytest.mark.parametrize("failing", range(1, 4))
def test_a_graph_whose_gradients_failed_half_way_gives_them_when_asked_again(failing, monkeypatch):
    policy = policy_of(memory="lstm")
    given = draw(policy)
    wanted = results(policy, *given)[2:]
    obs = given[0].clone().requires_grad_()
    outputs = policy.outputs(obs, *given[1:])
    calls = itertools.count(1)
    original = compiled_sequence._linear

    def short_of_memory(problem, what):
        if next(calls) == failing:
            raise MemoryError(what())
        original(problem, what)

    with monkeypatch.context() as patch:
        patch.setattr(compiled_sequence, "_linear", short_of_memory)
        with pytest.raises(MemoryError):
            gradients(policy, outputs, obs, retain_graph=True)
    for mine, theirs in zip(gradients(policy, outputs, obs), wanted, strict=True):
        assert torch.equal(mine, theirs)


def addresses(buffers):
    return sorted(tensor.data_ptr() for kept in buffers._free.values() for tensor in kept)


def test_memory_comes_back_with_the_graph_and_is_used_again():
    policy = policy_of(head=(8,))
    given, buffers = draw(policy), policy._sequence.buffers
    results(policy, *given)
    gc.disable()
    try:
        outputs = policy.outputs(*given)
        borrowed = len(addresses(buffers))
        del outputs  # at once: a cycle would keep it until the collector comes
        kept = addresses(buffers)
        assert borrowed < len(kept)
        for _ in range(20):
            results(policy, *given)
    finally:
        gc.enable()
    assert addresses(buffers) == kept


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no graph"])
def test_results_and_gradients_belong_to_the_caller(graph):
    policy = policy_of()
    given = draw(policy)
    with torch.set_grad_enabled(graph):
        # Keeps no graph alive, and so no buffers.
        held = results(policy, *given) if graph else list(policy.outputs(*given))
        before = [tensor.clone() for tensor in held]
        for _ in range(3):
            policy.outputs(*draw(policy))
    results(policy, *draw(policy))
    for mine, theirs in zip(held, before, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_read_that_has_not_been_written(name):
    policy = policy_of(activation="silu", twin=True, **POLICIES[name])
    given = draw(policy)
    wanted = results(policy, *given)
    torch.use_deterministic_algorithms(True)  # fills what `torch.empty` makes with NaN
    try:
        policy._sequence.buffers._free.clear()
        for _ in range(2):
            for mine, theirs in zip(results(policy, *given), wanted, strict=True):
                assert torch.equal(mine, theirs)
            for kept in policy._sequence.buffers._free.values():
                for tensor in kept:
                    tensor.fill_(torch.nan)
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_a_graph_memory_comes_back_at_once():
    policy = policy_of()
    given, buffers = draw(policy), policy._sequence.buffers
    with torch.no_grad():
        held = [policy.outputs(*given)]
        kept = addresses(buffers)
        held += [policy.outputs(*given) for _ in range(5)]
    assert len(kept) > 0
    assert addresses(buffers) == kept


def test_a_copy_has_its_own_weights_and_memory():
    policy = policy_of()
    given = draw(policy)
    wanted = results(policy, *given)
    twin = copy.deepcopy(policy)
    shake_(twin)
    outputs = twin.outputs(*given)
    assert_near(results(twin, *given), by_layers(twin, *given))
    assert not set(addresses(twin._sequence.buffers)) & set(addresses(policy._sequence.buffers))
    for mine, theirs in zip(results(policy, *given), wanted, strict=True):
        assert torch.equal(mine, theirs)
    del outputs


def test_many_shapes_do_not_pile_up():
    policy = policy_of()
    shapes = policy._sequence.buffers._free
    for steps in range(1, 3 * SHAPES_KEPT):
        results(policy, *draw(policy, steps=steps))
        assert 0 < len(shapes) <= SHAPES_KEPT
    given = draw(policy)
    results(policy, *given)
    count = len(addresses(policy._sequence.buffers))
    results(policy, *given)
    assert len(addresses(policy._sequence.buffers)) == count, "the shapes of the moment are kept"


def test_a_full_store_is_emptied_by_a_new_shape_only():
    buffers = Buffers()
    for width in (*range(SHAPES_KEPT), 0):
        buffers.lend().empty(width)  # back at once
    assert sorted(buffers._free) == [(width,) for width in range(SHAPES_KEPT)]
    buffers.lend().empty(SHAPES_KEPT)
    assert list(buffers._free) == [(SHAPES_KEPT,)]


# --------------------------------------------------------------------------------------------------- what PyTorch promises


def test_a_graph_followed_twice_is_an_error():
    policy = policy_of()
    obs, state, is_first = draw(policy)
    obs.requires_grad_()
    outputs = policy.outputs(obs, state, is_first)
    gradients(policy, outputs, obs)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(policy, outputs, obs)


@pytest.mark.parametrize(
    "changed",
    ["core.encoder.linears.0.weight", "core.memory.weight_ih_l0", "core.memory.weight_hh_l0", "actor.output.weight",
     "critic.output.weight", "obs", "state",
     "is_first"],
)  # fmt: skip
def test_what_is_changed_between_forward_and_backward_is_an_error(changed):
    policy = policy_of()
    given = dict(zip(("obs", "state", "is_first"), draw(policy), strict=True))
    outputs = policy.outputs(**given)
    with torch.no_grad():
        {**given, **dict(policy.named_parameters())}[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(output.sum() for output in outputs).backward()


def test_parameters_put_in_place_of_others_are_used():
    policy = policy_of()
    given = draw(policy)
    results(policy, *given)  # by then none may be kept
    policy.actor.output.weight = nn.Parameter(torch.zeros_like(policy.actor.output.weight))
    policy.core.memory.weight_hh_l0 = nn.Parameter(policy.core.memory.weight_hh_l0 * 2)
    assert_near(results(policy, *given), by_layers(policy, *given))


def replace(policy, name, parameter):
    module, _, own = name.rpartition(".")
    setattr(policy.get_submodule(module), own, nn.Parameter(parameter))


EVERY_KIND = ["core.encoder.linears.0.weight", "core.memory.weight_ih_l0", "core.memory.weight_hh_l0", "actor.output.weight"]


@pytest.mark.parametrize("name", EVERY_KIND)
def test_parameters_in_another_memory_order_have_the_same_numbers(name):
    policy = policy_of()
    given = draw(policy)
    replace(policy, name, policy.get_parameter(name).detach().mT.contiguous().mT)
    assert not policy.get_parameter(name).is_contiguous()
    assert_near(results(policy, *given), by_layers(policy, *given))


@pytest.mark.parametrize("name", [*EVERY_KIND[1:], "core.memory.bias_hh_l0", "actor.output.bias"])
def test_parameters_of_another_shape_are_refused(name):
    policy = policy_of()
    larger = policy.get_parameter(name).detach().repeat_interleave(2, dim=-1)  # smaller would be somebody else's memory
    replace(policy, name, larger)
    with pytest.raises((RuntimeError, ValueError)):
        policy.outputs(*draw(policy))


@pytest.mark.parametrize("shape", [(0, E), (T, 0)], ids=["no step", "no environment"])
def test_gradients_of_nothing_are_zero(shape):
    policy = policy_of(memory="none")
    given = draw(policy, P, *shape)
    torch.use_deterministic_algorithms(True)  # fills what `torch.empty` makes with NaN
    try:
        found = results(policy, *given)
    finally:
        torch.use_deterministic_algorithms(False)
    for mine, theirs in zip(found, by_layers(policy, *given), strict=True):
        assert torch.equal(mine.double(), theirs)


def test_it_is_for_float32_and_can_be_switched_off(monkeypatch, calls):
    policy = policy_of()
    obs, state, is_first = draw(policy)
    supports = policy._sequence.supports
    assert supports(obs, state)
    assert not supports(obs.double(), state)
    assert not supports(obs, state.double())
    assert not supports(obs.to("meta"), state)
    policy.critic.output.double()
    assert not supports(obs, state)
    policy.critic.output.float()
    monkeypatch.setenv("HARDY_COMPILED", "0")
    policy.outputs(obs, state, is_first)
    assert not calls


@pytest.mark.parametrize(("threads", "units", "useful"), [(1, 9.0, 1), (8, 0.5, 1), (8, 1.9, 1), (8, 2.0, 2), (3, 9.0, 3)])
def test_small_layers_are_not_shared_out(threads, units, useful, monkeypatch):
    seen = []

    monkeypatch.setattr(compiled_sequence, "_linear", lambda problem, what: seen.append(problem.threads))
    policy = policy_of(memory="none", encoder=(64,))
    monkeypatch.setattr(compiled_sequence, "SMALLEST_PART", int(P * T * E * 64 * (O + ACTIVATION) / units))
    set_threads(threads)
    policy.outputs(*draw(policy))
    assert seen[0] == useful


def test_a_head_of_few_outputs_is_shared_out_like_one_that_fills_a_vector(monkeypatch):
    seen = {}
    monkeypatch.setattr(compiled_sequence, "_linear", lambda problem, what: seen.update({problem.outputs: problem.threads}))
    policy = policy_of(memory="none", encoder=(64,))
    few = policy.actor.output.bias.shape[1]
    assert few < 16
    monkeypatch.setattr(compiled_sequence, "SMALLEST_PART", P * T * E * 16 * 64 // 2)
    set_threads(2)
    policy.outputs(*draw(policy))
    assert seen[few] == 2


def test_memory_that_is_not_there_is_an_error_of_its_own(monkeypatch):
    monkeypatch.setattr(compiled_sequence._linear, "_found", lambda structure: 1)
    policy = policy_of()
    with pytest.raises(MemoryError, match=rf"\({P}, {T}, {E}, {O}\)"):
        policy.outputs(*draw(policy))


@pytest.mark.parametrize("settings", [{"memory": "gru"}, {"layer_norm": True}])
def test_what_it_cannot_do_is_left_to_pytorch(settings, calls):
    policy = policy_of(**settings)
    results(policy, *draw(policy))
    assert not calls


@pytest.mark.parametrize("encoder", [(13,), ()], ids=["linear", "LSTM"])
def test_shapes_that_do_not_belong_together_are_refused(encoder):
    policy = policy_of(encoder=encoder)
    obs, state, is_first = draw(policy)
    wrong = {
        "width": (obs[..., 1:], state, is_first),
        "state": (obs, state[..., 1:], is_first),
        "environments": (obs, state[:, 1:], is_first),
        "steps": (obs, state, is_first[:, 1:]),
        "members": (obs[1:], state[1:], is_first[1:]),
        "members of the state": (obs, state[1:], is_first),
        "environments of is_first": (obs, state, is_first[:, :, 1:]),
    }
    for given in wrong.values():
        shapes = ".* ".join(re.escape(str(tuple(tensor.shape))) for tensor in given)
        with pytest.raises(
            ValueError, match=rf"of shapes {shapes}: 3 members with observations of {O} numbers and a state of 22"
        ):
            CompiledSequence.__call__.__wrapped__(policy._sequence, *given)
