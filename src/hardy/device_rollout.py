"""Collecting from environments that are tensors: a time step is a function of fixed buffers, and nothing leaves the device."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hardy.envs import TensorEnv
from hardy.graphs import Captured
from hardy.policy import ActorCritic
from hardy.population import MemberGenerators
from hardy.profiling import phase
from hardy.rollout import RECENT_EPISODES, CollectorState, Normalize, Rollout, assemble, reset_memory_


class DeviceCollector:
    """`hardy.rollout.collect` for a `TensorEnv`, prepared for many rollouts of one length.

    The results are those of `collect`, to rounding. The host draws the numbers that pick the actions, once a rollout, and does
    no more than start the steps: on a CUDA device each is a replayed graph.

    Args:
        env: member after member.
        policy: whose weights change in place only.
        state: where the environments stand, on their device; written in place.
        normalize: the observation normaliser, by statistics that change in place, between rollouts only.
        steps: T of every rollout.
    """

    def __init__(self, env: TensorEnv, policy: ActorCritic, state: CollectorState, normalize: Normalize, steps: int) -> None:
        self.env, self.policy, self.state = env, policy, state
        self.normalize = normalize
        self.steps = steps
        device = state.obs.device
        self._t = torch.zeros(1, dtype=torch.int64, device=device)
        with torch.no_grad():
            outputs, critic, memory = self._next(state.obs, state.recurrent, state.is_first)
            noise = policy.draw_noise(MemberGenerators(range(len(state.obs)), "shape"), steps, state.obs.shape[1])
            action = policy.distribution(outputs).sample(noise[:, 0])
        self._outputs, self._critic, self._memory = outputs.clone(), critic.clone(), memory.clone()
        """What the policy makes of ``state.obs``: the actor's and critics' outputs, and the memory after it."""
        self._noise = noise
        reward, flag = critic[..., 0], state.is_first
        kept = {"raw_obs": state.obs, "is_first": flag, "action": action, "outputs": outputs, "critic": critic,
                "next_critic": critic, "reward": reward, "terminated": flag, "truncated": flag}  # fmt: skip
        self._kept = {name: like.new_empty(len(like), steps, *like.shape[1:]) for name, like in kept.items()}
        """``[P, T, E, ...]`` by the names of `assemble`."""
        self._step = Captured(self._advance, device)

    @torch.no_grad()
    def collect(self, noise: MemberGenerators) -> Rollout:
        """Run the steps with the policy as it is.

        Args:
            noise: the members' generators for their actions.
        """
        state = self.state
        self._noise.copy_(self.policy.draw_noise(noise, self.steps, state.obs.shape[1]))
        self._t.zero_()
        initial_state = state.recurrent.clone()
        self._remember(*self._next(state.obs, state.recurrent, state.is_first))
        for _ in range(self.steps):
            with phase("device step"):
                self.env.prepare_step()
                self._step()
        reset_memory_(state, ~state.recurrent.isfinite().all(-1))
        # Copies, for the next rollout writes into the same memory.
        kept = {name: value.clone() for name, value in self._kept.items()}
        valid = torch.ones_like(kept["is_first"])
        return assemble(self.policy, self.normalize, **kept, valid=valid, initial_state=initial_state)

    def _next(self, obs: Tensor, recurrent: Tensor, is_first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.policy.step_outputs(self.normalize(obs), recurrent, is_first)

    def _remember(self, outputs: Tensor, critic: Tensor, memory: Tensor) -> None:
        self._outputs.copy_(outputs)
        self._critic.copy_(critic)
        self._memory.copy_(memory)

    def _advance(self) -> None:
        """One time step of everything."""
        state = self.state
        envs = state.obs.shape[1]
        action = self.policy.distribution(self._outputs).sample(self._noise.index_select(1, self._t).squeeze(1))
        step = self.env.step_tensor(action.flatten(0, 1))
        obs, final_obs = (seen.view_as(state.obs).to(state.obs.dtype) for seen in (step.obs, step.final_obs))
        terminated, truncated = (flag.view_as(state.is_first) for flag in (step.terminated, step.truncated))
        ended = terminated | truncated
        # One call for what follows and for the value of a truncated episode, whose memory goes on from the same step.
        outputs, critic, memory = self._next(
            torch.cat([obs, final_obs], 1), self._memory.repeat(1, 2, 1), torch.cat([ended, torch.zeros_like(ended)], 1)
        )
        critic, final = critic[:, :envs], critic[:, envs:]
        reward = step.reward.view_as(self._critic[..., 0]).to(self._critic.dtype)
        now = {"raw_obs": state.obs, "is_first": state.is_first, "action": action, "outputs": self._outputs,
               "critic": self._critic, "next_critic": torch.where(truncated.unsqueeze(-1), final, critic),
               "reward": reward, "terminated": terminated, "truncated": truncated}  # fmt: skip
        for name, value in now.items():
            self._kept[name].index_copy_(1, self._t, value.unsqueeze(1))
        self._t.add_(1)
        count_episodes_(state, step.reward.view_as(state.episode_return), ended)
        state.obs.copy_(obs)
        state.is_first.copy_(ended)
        state.recurrent.copy_(self._memory)
        self._remember(outputs[:, :envs], critic, memory[:, :envs])


def count_episodes_(state: CollectorState, reward: Float[Tensor, "P E"], ended: Bool[Tensor, "P E"]) -> None:
    """Enter one step into the running episodes and those that ended, in place; of one step, in the environments' order."""
    state.episode_return.add_(reward)
    state.episode_length.add_(1)
    place = ended.cumsum(1)
    newest = ended & (place > place[:, -1:] - RECENT_EPISODES)
    # One slot more takes what does not count.
    slot = torch.where(newest, (state.episodes[:, None] + place - 1) % RECENT_EPISODES, RECENT_EPISODES)
    for recent, running in ((state.recent_returns, state.episode_return), (state.recent_lengths, state.episode_length)):
        wider = torch.cat([recent, recent[:, :1]], 1).scatter_(1, slot, running.to(recent.dtype))
        recent.copy_(wider[:, :RECENT_EPISODES])
        running.masked_fill_(ended, 0)
    state.episodes.add_(place[:, -1])
