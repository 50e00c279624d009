"""The actor-critic: one step and whole sequences agree, members and branches keep to themselves."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from small_runs import shake_

from hardy.policy import ActorCritic, CriticSettings, PolicySettings, describe_space, space_from
from hardy.population import MemberGenerators

OBSERVATION = Box(-np.inf, np.inf, (13,), np.float32)
SPACES = {"discrete": Discrete(17), "continuous": Box(-1, 1, (17,), np.float32)}


def make(space="discrete", seeds=(0, 1, 2), **settings):
    given = {"memory_size": 7, "encoder": (11,), **settings}
    return ActorCritic(OBSERVATION, SPACES[space], PolicySettings(**given), CriticSettings(quantiles=23), seeds).double()


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("memory", ["none", "lstm", "gru"])
def test_a_sequence_equals_a_loop_of_steps(memory, shared, space):
    policy = make(space, memory=memory, shared_memory=shared, memory_layers=2, head=(5,), layer_norm=True)
    shake_(policy)
    members, steps, envs = 3, 19, 2
    obs = torch.randn(members, steps, envs, 13, dtype=torch.float64)
    state = torch.randn(members, envs, policy.state_size, dtype=torch.float64)
    is_first = torch.rand(members, steps, envs) < 0.2
    distribution, quantiles = policy(obs, state, is_first)
    action = distribution.sample(policy.draw_noise(MemberGenerators([0, 1, 2], "action"), steps, envs))
    log_prob = distribution.log_prob(action)
    assert quantiles.shape == (members, steps, envs, 23)
    assert action.shape == ((members, steps, envs) if space == "discrete" else (members, steps, envs, 17))
    for t in range(steps):
        single, step_quantiles, state = policy.step(obs[:, t], state, is_first[:, t])
        torch.testing.assert_close(step_quantiles, quantiles[:, t], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(single.log_prob(action[:, t]), log_prob[:, t], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("memory", "numbers"), [("none", 0), ("gru", 2 * 7), ("lstm", 2 * 2 * 7)])
@pytest.mark.parametrize("shared", [True, False])
def test_the_state_holds_every_memory_and_starts_at_zero(memory, numbers, shared):
    policy = make(memory=memory, memory_layers=2, shared_memory=shared)
    state = policy.initial_state(3, 5)
    assert state.shape == (3, 5, numbers if shared else 2 * numbers)
    assert state.dtype is torch.float64
    assert state.eq(0).all()


@pytest.mark.parametrize("shared", [True, False])
def test_is_first_resets_before_the_observation(shared):
    policy = make(shared_memory=shared)
    shake_(policy)
    obs = torch.randn(3, 2, 13, dtype=torch.float64)
    stale = torch.randn(3, 2, policy.state_size, dtype=torch.float64)
    is_first = torch.tensor([[True, False]]).repeat(3, 1)
    _, value, after = policy.step(obs, stale, is_first)
    _, fresh_value, fresh = policy.step(obs, policy.initial_state(3, 2), torch.zeros_like(is_first))
    assert torch.equal(value[:, 0], fresh_value[:, 0])
    assert torch.equal(after[:, 0], fresh[:, 0])
    assert not value[:, 1].isclose(fresh_value[:, 1]).any()
    assert not after[:, 0].eq(0).any()


def test_parameters_are_named_by_branch():
    groups = {name.split(".")[0] for name, _ in make().named_parameters()}
    assert groups == {"core", "actor", "critic"}
    own = make("continuous", shared_memory=False)
    assert {name.split(".")[0] for name, _ in own.named_parameters()} == {"actor", "critic"}
    assert own.actor.log_std.shape == (3, 17)
    assert all(parameter.shape[0] == 3 for parameter in own.parameters())


def test_separate_branches_share_no_gradient_and_shared_ones_do():
    for shared in (True, False):
        policy = make(shared_memory=shared)
        quantiles = policy(
            torch.randn(3, 5, 2, 13, dtype=torch.float64), policy.initial_state(3, 2), torch.zeros(3, 5, 2, dtype=torch.bool)
        )[1]
        quantiles.sum().backward()
        moved = {name.split(".")[0] for name, parameter in policy.named_parameters() if parameter.grad is not None}
        assert moved == ({"core", "critic"} if shared else {"critic"})


def test_a_members_weights_follow_from_its_own_seed_whatever_the_population():
    together, alone = make(seeds=(0, 1, 2)), make(seeds=(1,))
    for stacked, single in zip(together.parameters(), alone.parameters(), strict=True):
        assert torch.equal(stacked[1:2], single)
    assert not torch.equal(together.actor.output.weight[0], together.actor.output.weight[1])


def test_actor_and_critic_with_memories_of_their_own_start_differently():
    policy = make(shared_memory=False)
    assert not torch.equal(policy.actor.trunk.memory.weight_hh_l0, policy.critic.trunk.memory.weight_hh_l0)


def test_the_first_policy_is_nearly_uniform():
    policy = make()
    obs = torch.randn(3, 5, 13, dtype=torch.float64)
    distribution = policy.step(obs, policy.initial_state(3, 5), torch.ones(3, 5, dtype=torch.bool))[0]
    assert (distribution.log_probs.exp() - 1 / 17).abs().max() < 0.01


def test_standard_deviation_starts_where_the_settings_say():
    assert make("continuous", log_std_init=-0.75).actor.log_std.eq(-0.75).all()


def test_members_do_not_see_one_another():
    policy = make(layer_norm=True)
    obs, state = torch.randn(3, 5, 2, 13, dtype=torch.float64), policy.initial_state(3, 2)
    is_first = torch.zeros(3, 5, 2, dtype=torch.bool)
    clean = policy(obs, state, is_first)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter[1] = float("nan")
    spoiled = policy(obs, state, is_first)
    for found, expected in ((spoiled[0].log_probs, clean[0].log_probs), (spoiled[1], clean[1])):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[2], expected[2])
        assert found[1].isnan().all()


@pytest.mark.parametrize("space", SPACES)
def test_action_noise_is_each_members_own(space):
    together = make(space).draw_noise(MemberGenerators([5, 6, 7], "action"), 19, 2)
    alone = make(space, seeds=(0,)).draw_noise(MemberGenerators([6], "action"), 19, 2)
    assert together.shape == ((3, 19, 2) if space == "discrete" else (3, 19, 2, 17))
    assert torch.equal(together[1:2], alone)
    assert together.dtype is torch.float64
    inside = together.ge(0).all() and together.lt(1).all()
    assert bool(inside) == (space == "discrete")


def test_flatten_puts_rows_member_by_member_and_flattens_each_observation():
    image = ActorCritic(Box(0, 255, (2, 3), np.uint8), Discrete(2), PolicySettings(memory="none"), CriticSettings(), [0, 1])
    obs = np.arange(2 * 5 * 2 * 3, dtype=np.uint8).reshape(10, 2, 3)
    flat = image.flatten(obs, 2)
    assert flat.shape == (2, 5, 6)
    assert flat.dtype is torch.float32
    assert torch.equal(flat.flatten(), torch.arange(60.0))


@pytest.mark.parametrize(
    "space",
    [Discrete(5), Discrete(3, start=-1), OBSERVATION, Box(np.array([-1.5, 0.0]), np.array([0.1, np.inf]), dtype=np.float64),
     Box(0, 255, (2, 3), np.uint8)],
    ids=str,
)  # fmt: skip
def test_a_space_survives_its_description_in_json(space: gymnasium.Space):
    assert space_from(json.loads(json.dumps(describe_space(space)))) == space
