"""A policy over whole sequences in the compiled library against its layers: values, gradients, buffers."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from instruction_sets import LEVELS
from small_runs import shake_
from torch import nn

from hardy.nn import compiled_sequence
from hardy.nn.compiled_sequence import SHAPES_KEPT, CompiledSequence
from hardy.ops.critic import CriticSettings
from hardy.parallel import set_threads
from hardy.policy import ActorCritic, PolicySettings

pytestmark = pytest.mark.skipif(not compiled_sequence.available(), reason="Hardy was installed without its compiled libraries")
P, T, E, O = 3, 9, 7, 5  # noqa: E741
POLICIES = {
    "shared": {},
    "apart": {"shared_memory": False},
    "no encoder": {"encoder": ()},
    "apart, no encoder": {"shared_memory": False, "encoder": ()},
    "no memory": {"memory": "none", "encoder": (37,)},
    "two layers": {"memory_layers": 2},
    "heads": {"head": (6, 17)},
    "wide": {"encoder": (131,), "memory_size": 67, "head": (70,)},
}


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


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("twin", [False, True], ids=["one", "twins"])
@pytest.mark.parametrize("name", POLICIES)
def test_values_and_gradients_are_those_of_the_layers(name, twin, level, monkeypatch, calls):
    monkeypatch.setattr(CompiledSequence, "level", level)
    set_threads(3)
    policy = policy_of(twin=twin, **POLICIES[name])
    given = draw(policy)
    found = results(policy, *given)
    assert len(calls) == 1
    assert_near(found, by_layers(policy, *given))
    assert len(calls) == 1, "double precision is not the library's"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "silu"])
def test_every_activation_has_its_derivative(activation, level, monkeypatch):
    monkeypatch.setattr(CompiledSequence, "level", level)
    policy = policy_of(activation=activation, encoder=(13, 70), head=(5,), space=Box(-1, 1, (2,)))
    given = draw(policy)
    assert_near(results(policy, *given), by_layers(policy, *given))


@pytest.mark.parametrize(("members", "steps", "envs"), [(1, 1, 1), (1, 40, 1), (7, 1, 3), (1, 5, 64), (2, 130, 2)])
def test_any_number_of_members_steps_and_environments(members, steps, envs):
    policy = policy_of(members)
    given = draw(policy, members, steps, envs)
    assert_near(results(policy, *given), by_layers(policy, *given))


def test_it_is_the_path_without_the_library_to_rounding(monkeypatch):
    policy = policy_of(shared_memory=False, twin=True)
    given = draw(policy)
    found = results(policy, *given)
    monkeypatch.setenv("HARDY_COMPILED", "0")
    assert_near(found, [value.double() for value in results(policy, *given)])


def test_threads_and_other_members_change_no_bit():
    policy = policy_of(encoder=(20, 30), head=(9,))
    obs, state, is_first = draw(policy)
    alone = results(policy, obs, state, is_first)
    set_threads(3)
    for mine, theirs in zip(results(policy, obs, state, is_first), alone, strict=True):
        assert torch.equal(mine, theirs)
    obs[1, 2, 3], is_first[1, :4, 3] = torch.nan, False
    is_first[1, 4, 3] = True
    hurt = results(policy, obs, state, is_first)
    for mine, theirs in zip(hurt, alone, strict=True):
        assert torch.equal(mine[[0, 2]], theirs[[0, 2]])
    assert hurt[0][1, 2:4, 3].isnan().all()
    assert hurt[0][1, 4:, 3].isfinite().all(), "a reset ends what was not a number"
    assert not any(gradient[1].isfinite().all() for gradient in hurt[3:])


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


def test_gradients_stop_at_the_state_and_frozen_weights_get_none():
    policy = policy_of()
    obs, state, is_first = draw(policy)
    every = results(policy, obs, state, is_first)
    policy.core.encoder.requires_grad_(False)
    state.requires_grad_()
    fewer = results(policy, obs, state, is_first)
    assert len(fewer) == len(every) - 2
    assert torch.equal(fewer[-1], every[-1])
    assert torch.autograd.grad(policy.outputs(obs, state, is_first)[0].sum(), state, allow_unused=True) == (None,)


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


def test_results_belong_to_the_caller():
    policy = policy_of()
    given = draw(policy)
    first = policy.outputs(*given)
    before = [output.detach().clone() for output in first]
    results(policy, *draw(policy))
    for mine, theirs in zip(first, before, strict=True):
        assert torch.equal(mine, theirs)


def test_many_shapes_do_not_pile_up():
    policy = policy_of()
    for steps in range(1, 3 * SHAPES_KEPT):
        results(policy, *draw(policy, steps=steps))
    assert len(policy._sequence.buffers._free) <= SHAPES_KEPT


# --------------------------------------------------------------------------------------------------- what PyTorch promises


def test_a_weight_changed_in_between_and_a_graph_followed_twice_are_errors():
    policy = policy_of()
    obs, state, is_first = draw(policy)
    obs.requires_grad_()
    outputs = policy.outputs(obs, state, is_first)
    gradients(policy, outputs, obs)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(policy, outputs, obs)
    outputs = policy.outputs(obs, state, is_first)
    with torch.no_grad():
        policy.critic.output.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(policy, outputs, obs)


def test_parameters_put_in_place_of_others_are_used():
    policy = policy_of()
    given = draw(policy)
    policy.actor.output.weight = nn.Parameter(torch.zeros_like(policy.actor.output.weight))
    policy.core.memory.weight_hh_l0 = nn.Parameter(policy.core.memory.weight_hh_l0 * 2)
    assert_near(results(policy, *given), by_layers(policy, *given))


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
    }
    for given in wrong.values():
        with pytest.raises(ValueError, match=rf"of shapes .*: 3 members with observations of {O} numbers and a state of 22"):
            CompiledSequence.__call__.__wrapped__(policy._sequence, *given)
