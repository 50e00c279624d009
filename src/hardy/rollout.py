"""Collecting experience for the whole population, and evaluating it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hardy.envs import BatchedEnv, EnvStep, TensorEnv
from hardy.policy import ActorCritic
from hardy.population import MemberGenerators, kept, reset_to, training_state
from hardy.profiling import timed

RECENT_EPISODES = 100
"""Window of the running scores, as in Gymnasium's and Stable-Baselines3's episode statistics."""

Normalize = Callable[[Tensor], Tensor]
Alter = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Normalised observations ``[P, E, O]``, memory ``[P, E, S]`` and ``is_first [P, E]`` to what the policy is shown instead."""


@training_state
class CollectorState:
    """Where every environment of every member stands between two rollouts.

    Attributes:
        obs: ``[P, E, O]`` the next observation, as the environment gave it.
        is_first: ``[P, E]`` the memory is reset before ``obs``.
        recurrent: ``[P, E, S]`` the memory after the last step.
        episode_return, episode_length: ``[P, E]`` of the running episodes.
        recent_returns, recent_lengths: ``[P, 100]`` of the last episodes that ended, NaN where there was none yet.
        episodes: ``[P]`` episodes ended so far.
    """

    obs: Float[Tensor, "P E O"] = kept()
    is_first: Bool[Tensor, "P E"] = reset_to(True)
    recurrent: Float[Tensor, "P E S"] = reset_to(0.0)
    episode_return: Float[Tensor, "P E"] = kept()
    episode_length: Int[Tensor, "P E"] = kept()
    recent_returns: Float[Tensor, "P window"] = reset_to(float("nan"))
    recent_lengths: Float[Tensor, "P window"] = reset_to(float("nan"))
    episodes: Int[Tensor, "P"] = kept()


@dataclasses.dataclass(frozen=True)
class Rollout:
    """``T`` steps of ``E`` environments of ``P`` members.

    ``obs``, ``is_first``, ``action``, ``log_prob`` and ``value`` belong to the observation at ``t``; ``reward``,
    ``terminated``, ``truncated``, ``valid`` and ``next_value`` to the transition out of ``t``. ``next_value`` is the value of
    the state that the action led to: at a truncation, of the episode's final observation, with the memory of that episode.
    ``critic`` and ``next_critic`` are the critics' outputs behind the two values.
    """

    raw_obs: Float[Tensor, "P T E O"]
    obs: Float[Tensor, "P T E O"]
    is_first: Bool[Tensor, "P T E"]
    action: Tensor
    log_prob: Float[Tensor, "P T E"]
    value: Float[Tensor, "P T E"]
    next_value: Float[Tensor, "P T E"]
    reward: Float[Tensor, "P T E"]
    terminated: Bool[Tensor, "P T E"]
    truncated: Bool[Tensor, "P T E"]
    valid: Bool[Tensor, "P T E"]
    initial_state: Float[Tensor, "P E S"]
    critic: Float[Tensor, "P T E K"]
    next_critic: Float[Tensor, "P T E K"]


def start(env: BatchedEnv, policy: ActorCritic, members: int) -> CollectorState:
    """Reset every environment."""
    obs = policy.flatten(env.reset(), members)
    envs = obs.shape[1]
    counted = env.device if isinstance(env, TensorEnv) else torch.device("cpu")  # where the rewards come from
    return CollectorState(
        obs=obs,
        is_first=torch.ones(members, envs, dtype=torch.bool, device=obs.device),
        recurrent=policy.initial_state(members, envs).detach(),
        episode_return=torch.zeros(members, envs, device=counted),
        episode_length=torch.zeros(members, envs, dtype=torch.int64, device=counted),
        recent_returns=torch.full((members, RECENT_EPISODES), float("nan"), device=counted),
        recent_lengths=torch.full((members, RECENT_EPISODES), float("nan"), device=counted),
        episodes=torch.zeros(members, dtype=torch.int64, device=counted),
    )


def restart_(state: CollectorState, env: BatchedEnv, policy: ActorCritic) -> None:
    """Reset every environment of a running state, in place; the scores stay."""
    fresh = start(env, policy, state.obs.shape[0])
    for name in ("obs", "is_first", "recurrent", "episode_return", "episode_length"):
        getattr(state, name).copy_(getattr(fresh, name))


def reset_memory_(state: CollectorState, where: Bool[Tensor, "P E"] | None = None) -> None:
    """Put the memory back to the start of an episode, in place; the next step, and training on it, begin from there."""
    chosen = torch.ones_like(state.is_first) if where is None else where
    state.recurrent.masked_fill_(chosen.unsqueeze(-1), 0.0)
    state.is_first.logical_or_(chosen)


@torch.no_grad()
def burn_in_(
    state: CollectorState, policy: ActorCritic, recent: Rollout, normalize: Normalize, where: Bool[Tensor, "P E"]
) -> None:
    """Rebuild the memory of running episodes by replaying their observations through the policy as it is now, in place.

    The replay starts from a memory of zeros at the begin of ``recent``; what an episode saw before that is lost. Where the
    result is not finite, the memory stays as it is.

    Args:
        recent: the last rollout of the same environments.
        normalize: the observation normaliser as it is now.
        where: environments to rebuild; the next step continues their episodes.
    """
    memory = torch.zeros_like(state.recurrent)
    step = policy.stepper(*state.is_first.shape)
    for obs, is_first in zip(normalize(recent.raw_obs).unbind(1), recent.is_first.unbind(1), strict=True):
        memory = step(obs, memory, is_first)[2]
    rebuilt = where & memory.isfinite().all(-1)
    state.recurrent.copy_(torch.where(rebuilt.unsqueeze(-1), memory, state.recurrent))
    state.is_first.masked_fill_(rebuilt, False)


@torch.no_grad()
def collect(
    env: BatchedEnv, policy: ActorCritic, state: CollectorState, normalize: Normalize, noise: MemberGenerators, steps: int
) -> Rollout:
    """Run ``steps`` steps with the policy as it is, updating ``state`` in place.

    Args:
        normalize: the observation normaliser, frozen for the whole rollout.
        noise: the members' generators for their actions.
    """
    members, envs, _ = state.obs.shape
    step = policy.stepper(members, envs)
    act, step = timed("policy step", policy.acting(step, normalize)), timed("policy step", step)
    step_env, normalize = timed("environment step", env.step), timed("normalising", normalize)
    action_noise = policy.draw_noise(noise, steps, envs).transpose(0, 1).contiguous()
    initial_state, recurrent = state.recurrent.clone(), state.recurrent
    obs, is_first = state.obs.clone(), state.is_first.clone()
    final_critic: dict[int, Tensor] = {}
    acted: list[tuple[Tensor, ...]] = []
    outcomes: list[EnvStep] = []
    for t in range(steps):
        action, outputs, critic, recurrent = act(obs, recurrent, is_first, action_noise[t])
        acted.append((obs, is_first, action, outputs, critic))
        outcome = step_env(action.flatten(0, 1).cpu().numpy())
        outcomes.append(outcome)
        if outcome.final_obs is not None and outcome.truncated.any():
            final_obs = normalize(torch.from_numpy(outcome.final_obs).reshape(obs.shape).to(obs))
            final_critic[t] = step(final_obs, recurrent, torch.zeros_like(is_first))[1]
        obs = torch.from_numpy(outcome.obs).reshape(obs.shape).to(obs)
        is_first = torch.from_numpy(outcome.is_first).view(members, envs).to(obs.device)
    state.obs.copy_(obs)
    state.is_first.copy_(is_first)
    state.recurrent.copy_(recurrent)
    # An observation that was not finite would otherwise stay in the memory until its episode ends.
    reset_memory_(state, ~recurrent.isfinite().all(-1))
    # Together at the end: writing each step into prepared buffers takes twice the time.
    raw_obs, is_first, actions, outputs, critic = (torch.stack(column, dim=1) for column in zip(*acted, strict=True))
    by_step = [
        np.stack([getattr(outcome, name) for outcome in outcomes]) for name in ("reward", "terminated", "truncated", "valid")
    ]
    enter_scores_(state, by_step[0], by_step[1] | by_step[2], by_step[3])
    reward, terminated, truncated, valid = (
        torch.from_numpy(array).view(steps, members, envs).transpose(0, 1) for array in by_step
    )
    last = step(normalize(state.obs), state.recurrent, state.is_first)[1]
    next_critic = torch.cat([critic[:, 1:], last.unsqueeze(1)], dim=1)
    truncated = truncated.to(policy.device)
    for t, final in final_critic.items():
        next_critic[:, t] = torch.where(truncated[:, t].unsqueeze(-1), final, next_critic[:, t])
    return assemble(
        policy,
        normalize,
        raw_obs=raw_obs,
        is_first=is_first,
        action=actions,
        outputs=outputs,
        critic=critic,
        next_critic=next_critic,
        reward=reward.to(critic),
        terminated=terminated.to(policy.device),
        truncated=truncated,
        valid=valid.to(policy.device),
        initial_state=initial_state,
    )


def assemble(
    policy: ActorCritic,
    normalize: Normalize,
    *,
    raw_obs: Float[Tensor, "P T E O"],
    action: Tensor,
    outputs: Float[Tensor, "P T E A"],
    critic: Float[Tensor, "P T E K"],
    next_critic: Float[Tensor, "P T E K"],
    **rest: Tensor,
) -> Rollout:
    """The rollout of what was seen and done: normalised observations, log-probabilities and values, for all steps at once.

    Args:
        outputs: the actor's.
        rest: the other fields of `Rollout`.
    """
    return Rollout(
        raw_obs=raw_obs,
        obs=normalize(raw_obs),
        action=action,
        log_prob=policy.distribution(outputs).log_prob(action),
        value=policy.values.mean(critic),
        next_value=policy.values.mean(next_critic),
        critic=critic,
        next_critic=next_critic,
        **rest,
    )


def enter_scores_(
    state: CollectorState, reward: Float[np.ndarray, "T N"], ended: Bool[np.ndarray, "T N"], valid: Bool[np.ndarray, "T N"]
) -> None:
    """Enter a rollout of ``N = P * E`` environments into the running episodes and those that ended, in place.

    Recent episodes follow one another in the order of time, those of one step in that of the environments.
    """
    # On views as arrays: a few numbers at a time are cheaper there than as tensors.
    running_return, running_length = state.episode_return.view(-1).numpy(), state.episode_length.view(-1).numpy()
    gained = np.where(valid, reward, 0.0).astype(running_return.dtype, copy=False)
    places, returns, lengths = ([np.zeros(0, dtype)] for dtype in (np.int64, running_return.dtype, running_length.dtype))
    for t in range(len(ended)):
        running_return += gained[t]
        running_length += valid[t]
        (place,) = ended[t].nonzero()
        if place.size:
            places.append(place)
            returns.append(running_return[place])
            lengths.append(running_length[place])
            running_return[place] = running_length[place] = 0
    member = np.concatenate(places) // state.episode_return.shape[1]
    count = np.bincount(member, minlength=len(state.episodes))
    order = member.argsort(kind="stable")
    before = np.empty_like(member)  # of the same member
    before[order] = np.arange(len(member)) - (count.cumsum() - count).repeat(count)
    episodes = state.episodes.numpy()
    newest = before >= count[member] - RECENT_EPISODES
    slot = member[newest], (episodes[member] + before)[newest] % RECENT_EPISODES
    state.recent_returns.numpy()[slot] = np.concatenate(returns)[newest]
    state.recent_lengths.numpy()[slot] = np.concatenate(lengths)[newest]
    episodes += count


@torch.no_grad()
def evaluate(
    env: BatchedEnv,
    policy: ActorCritic,
    normalize: Normalize,
    members: int,
    deterministic: bool,
    noise: MemberGenerators,
    *,
    max_steps: int,
    stop: Callable[[], bool] = lambda: False,
    alter: Alter | None = None,
) -> Float[np.ndarray, "P episodes"]:
    """The return of one whole episode of every environment, weights and statistics frozen.

    One episode per environment, so that short episodes are not counted more often than long ones.

    Args:
        env: ``P * episodes`` environments, freshly made.
        deterministic: take the mode of the action distribution instead of a sample.
        noise: generators for the samples; not drawn from where ``deterministic``.
        max_steps: an episode still running then counts with its return so far: some environments never end one.
        stop: asked before every step.
        alter: what the policy is shown instead of the observation; the memory follows from that.

    Raises:
        KeyboardInterrupt: ``stop`` said so.
    """
    obs = policy.flatten(env.reset(), members)
    envs = obs.shape[1]
    is_first = torch.ones(members, envs, dtype=torch.bool, device=obs.device)
    recurrent = policy.initial_state(members, envs)
    policy_step = policy.stepper(members, envs)
    total = np.zeros(members * envs)
    running = np.ones(members * envs, dtype=bool)
    for _ in range(max_steps):
        if not running.any():
            break
        if stop():
            raise KeyboardInterrupt
        seen = normalize(obs) if alter is None else alter(normalize(obs), recurrent, is_first)
        outputs, _, recurrent = policy_step(seen, recurrent, is_first)
        distribution = policy.distribution(outputs)
        action = distribution.mode() if deterministic else distribution.sample(policy.draw_noise(noise, envs))
        step = env.step(action.flatten(0, 1).cpu().numpy())
        total += np.where(running & step.valid, step.reward, 0.0)
        running &= ~(step.terminated | step.truncated)
        obs = policy.flatten(step.obs, members)
        is_first = torch.from_numpy(step.is_first).view(members, envs).to(obs.device)
    return total.reshape(members, envs)


def running_scores(state: CollectorState) -> dict[str, Any]:
    """Mean return and length of the recent episodes of each member, NaN before the first one ended."""
    return {
        "rollout/ep_rew_mean": state.recent_returns.nanmean(1),
        "rollout/ep_len_mean": state.recent_lengths.nanmean(1),
        "rollout/episodes": state.episodes.float(),
    }
