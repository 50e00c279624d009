"""Collecting: what belongs to which step, which memory reaches which value, and what an evaluation may not touch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from small_runs import TERMINATED, TRUNCATED, Recorder, scripted, shake_, snapshot

from hardy.policy import ActorCritic, CriticSettings, PolicySettings
from hardy.population import MemberGenerators
from hardy.rollout import RECENT_EPISODES, collect, enter_scores_, evaluate, reset_memory_, restart_, running_scores, start

SCRIPTS = [[(3, TRUNCATED), (4, TERMINATED), (6, TRUNCATED)], [(5, TERMINATED), (2, TRUNCATED)], [(4, TRUNCATED)]]
MODES = list(AutoresetMode)


def normalize(obs):
    """A fixed normaliser that is far from the identity."""
    return (obs - 0.3) * 1.7


def policy_for(env, members=1, **settings):
    given = {"memory_size": 5, "encoder": (7,), **settings}
    seeds = list(range(members))
    policy = ActorCritic(
        env.observation_space, env.action_space, PolicySettings(**given), CriticSettings(quantiles=3), seeds
    ).double()
    shake_(policy)
    return policy


def noise(members=1):
    return MemberGenerators(list(range(members)), "action")


def value_of(policy, obs, state, *, reset=False):
    """Mean of the quantiles after one observation ``[O]`` of the one member, and the state after it."""
    one = torch.as_tensor(obs, dtype=torch.float64).view(1, 1, -1)
    with torch.no_grad():
        _, quantiles, after = policy.step(normalize(one), state, torch.full((1, 1), reset))
    return quantiles.mean(), after


@pytest.mark.parametrize("memory", ["lstm", "gru"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_two_episode_rollout_equals_two_one_episode_rollouts(memory, shared):
    scripts = [[(3, TERMINATED), (4, TRUNCATED)], [(3, TRUNCATED), (4, TERMINATED)]]
    env = scripted(scripts)
    policy = policy_for(env, memory=memory, shared_memory=shared)
    generators = noise()
    whole = collect(env, policy, start(env, policy, 1), normalize, generators, 7)

    env, generators = scripted(scripts), noise()
    first_noise = policy.draw_noise(noise(), 7, 2)
    state = start(env, policy, 1)
    parts = []
    for begin, end in ((0, 3), (3, 7)):
        policy.draw_noise = lambda generators, *batch, begin=begin, end=end: first_noise[:, begin:end]
        state.recurrent.normal_()  # whatever the memory holds, an episode begins without it
        assert state.is_first.all()
        parts.append(collect(env, policy, state, normalize, generators, end - begin))
    for name in ("obs", "is_first", "action", "log_prob", "value", "reward", "terminated", "truncated"):
        pieces = torch.cat([getattr(part, name) for part in parts], dim=1)
        torch.testing.assert_close(pieces, getattr(whole, name), atol=1e-12, rtol=1e-12)
    ends = whole.truncated
    torch.testing.assert_close(
        torch.cat([part.next_value for part in parts], 1)[ends], whole.next_value[ends], atol=1e-12, rtol=1e-12
    )


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("shared", [True, False])
def test_values_follow_from_replaying_each_episode_with_its_own_memory(mode, shared):
    """``value[t]`` is V(obs[t]) with the memory of its episode; at a truncation ``next_value[t]`` is V(final observation)
    with the memory that the old episode left, across the border of two rollouts too."""
    env = Recorder(scripted(SCRIPTS, mode))
    policy = policy_for(env, shared_memory=shared)
    state, generators = start(env, policy, 1), noise()
    first_obs = state.obs.clone()
    rollouts = [collect(env, policy, state, normalize, generators, 11) for _ in range(2)]
    value, next_value = (torch.cat([getattr(r, name) for r in rollouts], 1)[0] for name in ("value", "next_value"))
    last_value = rollouts[1].next_value[0, -1]
    truncations = 0
    for e in range(len(SCRIPTS)):
        obs, reset, memory = first_obs[0, e], True, policy.initial_state(1, 1)
        for t, step in enumerate(env.steps):
            here, memory = value_of(policy, obs, memory, reset=reset)
            torch.testing.assert_close(value[t, e], here, atol=1e-12, rtol=1e-12)
            obs, reset = step.obs[e], bool(step.is_first[e])
            following, _ = value_of(policy, obs, memory, reset=reset)
            if step.truncated[e]:
                truncations += 1
                expected, _ = value_of(policy, step.final_obs[e], memory)
                torch.testing.assert_close(next_value[t, e], expected, atol=1e-12, rtol=1e-12)
                fresh, _ = value_of(policy, step.final_obs[e], memory, reset=True)
                wrong = [fresh, here] if mode is AutoresetMode.NEXT_STEP else [fresh, here, following]
                assert all(abs(expected - other) > 1e-6 for other in wrong)
            elif not step.terminated[e]:
                torch.testing.assert_close(next_value[t, e], following, atol=1e-12, rtol=1e-12)
    assert truncations >= 6
    assert last_value.isfinite().all()


def test_the_memory_of_an_episode_of_one_step_reaches_its_final_value():
    env = Recorder(scripted([[(1, TRUNCATED)]]))
    policy = policy_for(env)
    rollout = collect(env, policy, start(env, policy, 1), normalize, noise(), 3)
    assert rollout.is_first.all()
    for t, step in enumerate(env.steps):
        _, memory = value_of(policy, rollout.raw_obs[0, t, 0], policy.initial_state(1, 1))
        expected, _ = value_of(policy, step.final_obs[0], memory)
        torch.testing.assert_close(rollout.next_value[0, t, 0], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_flags_and_rewards_belong_to_the_transition_out_of_t(mode):
    env = Recorder(scripted(SCRIPTS, mode))
    policy = policy_for(env)
    state = start(env, policy, 1)
    first_obs = state.obs.clone()
    rollout = collect(env, policy, state, normalize, noise(), 11)
    for name in ("reward", "terminated", "truncated", "valid"):
        expected = torch.from_numpy(np.stack([getattr(step, name) for step in env.steps]))
        assert torch.equal(getattr(rollout, name)[0].to(expected.dtype), expected)
    seen = torch.cat([first_obs, torch.from_numpy(np.stack([step.obs for step in env.steps])).double()])
    assert torch.equal(rollout.raw_obs[0], seen[:-1])
    assert torch.equal(rollout.obs, normalize(rollout.raw_obs))
    assert torch.equal(state.obs[0], seen[-1])
    is_first = np.stack([np.ones(3, dtype=bool), *(step.is_first for step in env.steps)])
    assert torch.equal(rollout.is_first[0], torch.from_numpy(is_first[:-1]))
    assert torch.equal(state.is_first[0], torch.from_numpy(is_first[-1]))
    assert bool(rollout.valid.all()) == (mode is not AutoresetMode.NEXT_STEP)


def test_the_next_rollout_starts_from_the_memory_of_the_last_step():
    env = scripted([[(50, TERMINATED)], [(50, TERMINATED)]])
    policy = policy_for(env)
    state, generators = start(env, policy, 1), noise()
    collect(env, policy, state, normalize, generators, 5)
    memory = state.recurrent.clone()
    following = collect(env, policy, state, normalize, generators, 5)
    assert torch.equal(following.initial_state, memory)
    assert memory.abs().min() > 0
    assert not following.is_first.any()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_episode_scores_count_whole_episodes_and_valid_steps_only(mode):
    env = Recorder(scripted(SCRIPTS, mode))
    policy = policy_for(env)
    state, generators = start(env, policy, 1), noise()
    assert running_scores(state)["rollout/ep_rew_mean"].isnan().all()
    returns, lengths = [], []
    total, count = np.zeros(3), np.zeros(3)
    for _ in range(3):
        collect(env, policy, state, normalize, generators, 7)
    for step in env.steps:
        total, count = total + step.reward, count + step.valid
        for e in (step.terminated | step.truncated).nonzero()[0]:
            returns.append(total[e])
            lengths.append(count[e])
            total[e] = count[e] = 0
    scores = running_scores(state)
    assert len(lengths) > 8
    assert set(lengths) == {2, 3, 4, 5, 6}
    assert scores["rollout/episodes"].tolist() == [len(lengths)]
    torch.testing.assert_close(scores["rollout/ep_rew_mean"], torch.tensor([np.mean(returns)]).float(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scores["rollout/ep_len_mean"], torch.tensor([np.mean(lengths)]).float(), atol=1e-6, rtol=1e-6)
    assert torch.equal(state.episode_length[0], torch.from_numpy(count).long())


def test_scores_are_those_of_the_most_recent_episodes_of_each_member():
    env = scripted([[(1, TERMINATED)] * 100 + [(2, TERMINATED)] * 100, [(2, TERMINATED)]], members=2)
    policy = policy_for(env, 2, memory="none")
    state = start(env, policy, 2)
    collect(env, policy, state, normalize, noise(2), 60)
    assert state.episodes.tolist() == [90, 90]
    collect(env, policy, state, normalize, noise(2), 60)
    scores = running_scores(state)
    assert state.episodes.tolist() == [170, 170]
    assert state.recent_lengths.isfinite().sum() == 2 * RECENT_EPISODES
    expected = []
    lengths = [(t + 1, 1) for t in range(100)] + [(100 + 2 * (k + 1), 2) for k in range(10)]
    lengths += [(2 * (k + 1), 2) for k in range(60)]
    expected = [length for _, length in sorted(lengths, key=lambda pair: pair[0])][-RECENT_EPISODES:]
    torch.testing.assert_close(scores["rollout/ep_len_mean"], torch.full((2,), float(np.mean(expected))), atol=0.02, rtol=0)


@pytest.mark.parametrize(("members", "envs", "chance"), [(1, 1, 0.5), (3, 5, 0.1), (2, 4, 0.9), (2, 3, 0.0)])
def test_scores_are_entered_as_one_by_one(members, envs, chance):
    env = scripted([[(1, TERMINATED)]] * envs, members=members)
    state = start(env, policy_for(env, members), members)
    window = state.recent_returns.shape[1]
    running = [[(0.0, 0)] * envs for _ in range(members)]
    recent = [[] for _ in range(members)]
    rng = np.random.default_rng(7)
    for _ in range(3):
        shape = (80, members * envs)
        reward, ended = rng.integers(-3, 4, shape).astype(np.float32), rng.random(shape) < chance
        valid = ended | (rng.random(shape) < 0.8)
        enter_scores_(state, np.where(valid, reward, np.nan), ended, valid)
        for t, row in itertools.product(range(80), range(members * envs)):
            member, index = divmod(row, envs)
            total, length = running[member][index]
            after = total + float(reward[t, row]) * bool(valid[t, row]), length + int(valid[t, row])
            if ended[t, row]:
                recent[member].append(after)
            running[member][index] = (0.0, 0) if ended[t, row] else after
        assert state.episodes.tolist() == [len(episodes) for episodes in recent]
        assert torch.stack([state.episode_return, state.episode_length.float()], -1).tolist() == [
            [list(map(float, pair)) for pair in own] for own in running
        ]
        for member, episodes in enumerate(recent):
            for place in range(max(0, len(episodes) - window), len(episodes)):
                slot = place % window
                found = state.recent_returns[member, slot].item(), state.recent_lengths[member, slot].item()
                assert found == episodes[place]


def test_restart_begins_new_episodes_and_keeps_the_scores():
    env = scripted(SCRIPTS)
    policy = policy_for(env)
    state = start(env, policy, 1)
    collect(env, policy, state, normalize, noise(), 7)
    before = snapshot(state)
    restart_(state, env, policy)
    assert state.is_first.all()
    for name in ("recurrent", "episode_return", "episode_length"):
        assert before[name].abs().sum() > 0
        assert getattr(state, name).eq(0).all()
    assert not torch.equal(state.obs, before["obs"])
    assert torch.equal(state.recent_returns.nan_to_num(), before["recent_returns"].nan_to_num())
    assert torch.equal(state.episodes, before["episodes"])


def test_reset_memory_acts_on_the_chosen_environments_and_twice_is_once():
    env = scripted([[(50, TERMINATED)]] * 3)
    policy = policy_for(env)
    state = start(env, policy, 1)
    collect(env, policy, state, normalize, noise(), 5)
    before = state.recurrent.clone()
    chosen = torch.tensor([[True, False, True]])
    for _ in range(2):
        reset_memory_(state, chosen)
        assert torch.equal(state.is_first, chosen)
        assert state.recurrent[chosen].eq(0).all()
        assert torch.equal(state.recurrent[~chosen], before[~chosen])
    reset_memory_(state)
    assert state.is_first.all()
    assert state.recurrent.eq(0).all()


def test_an_observation_that_is_not_finite_does_not_stay_in_the_memory():
    env = Recorder(scripted([[(50, TERMINATED)]] * 3))
    policy = policy_for(env)
    state, generators = start(env, policy, 1), noise()
    state.obs[0, 1] = float("nan")
    spoiled = collect(env, policy, state, normalize, generators, 3)
    assert spoiled.value[0, :, 1].isnan().all()
    assert spoiled.value[0, :, [0, 2]].isfinite().all()
    assert state.is_first.tolist() == [[False, True, False]]
    sound = collect(env, policy, state, normalize, generators, 3)
    assert sound.value.isfinite().all()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("deterministic", [True, False])
def test_an_evaluation_counts_the_first_episode_of_every_environment(mode, deterministic):
    """Also where short episodes end many times before the longest one does."""
    rewards = [sum(np.cos(row + t) for t in range(1, script[0][0] + 1)) for row, script in enumerate(SCRIPTS)]
    env = scripted(SCRIPTS, mode)
    policy = policy_for(env)
    found = evaluate(env, policy, normalize, 1, deterministic, noise(), max_steps=100)
    np.testing.assert_allclose(found, [rewards], atol=1e-6)


def test_a_deterministic_evaluation_draws_nothing_and_takes_the_mode():
    env = Recorder(scripted(SCRIPTS))
    policy = policy_for(env)
    taken = []
    env.step, step = lambda actions: (taken.append(actions), step(actions))[1], env.step
    generators = noise()
    before = generators.get_state()
    first = env.env.reset
    obs = torch.from_numpy(first()).double().unsqueeze(0)
    env.reset = lambda: obs[0].float().numpy()
    evaluate(env, policy, normalize, 1, True, generators, max_steps=100)
    assert torch.equal(generators.get_state(), before)
    with torch.no_grad():
        mode = policy.step(normalize(obs), policy.initial_state(1, 3), torch.ones(1, 3, dtype=torch.bool))[0].mode()
    assert taken[0].tolist() == mode[0].tolist()
    evaluate(env, policy, normalize, 1, False, generators, max_steps=100)
    assert not torch.equal(generators.get_state(), before)


def test_an_evaluation_ends_though_an_episode_does_not():
    env = Recorder(scripted([[(10**9, TERMINATED)], [(3, TERMINATED)]]))
    found = evaluate(env, policy_for(env), normalize, 1, True, noise(), max_steps=7)
    assert len(env.steps) == 7
    expected = [sum(np.cos(row + t) for t in range(1, length + 1)) for row, length in enumerate((7, 3))]
    np.testing.assert_allclose(found, [expected], atol=1e-6)


def test_an_evaluation_stops_when_asked():
    env = Recorder(scripted([[(10**9, TERMINATED)]]))
    with pytest.raises(KeyboardInterrupt):
        evaluate(env, policy_for(env), normalize, 1, True, noise(), max_steps=100, stop=lambda: len(env.steps) == 5)
    assert len(env.steps) == 5
