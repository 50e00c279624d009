"""A task that changes while it is being learnt: physics or the order of the observation entries, on a seeded schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from gymnasium.spaces import Box
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, Shaped
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from hardy.config import Settings, nearest
from hardy.envs.base import BatchedEnv, EnvStep
from hardy.envs.device import TensorEnv, TensorStep
from hardy.population import stream_seed

# A range arrives from YAML as a list; strict settings would take a tuple only.
Range = Annotated[tuple[float, float], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]

Steps = int | Sequence[int] | Int64[np.ndarray, "P"]


class DriftSettings(Settings):
    """What changes, how often and how fast. Steps are environment steps of one member, all its environments together.

    Args:
        kind: ``physics`` redraws physical parameters, ``permute`` reorders the observation's entries.
        every: steps between two changes.
        over: steps over which a change is spread linearly; 0 is sudden. A permutation passes through a blend of both orders.
        ranges: for ``physics``, parameter name to (low, high); each change draws every one of them uniformly in its range.
        start: step of the first change; ``every`` if ``None``.
        changes: how many changes at most; ``None`` is no limit.
        seed: seed of the changes, the same for all members; the member's own seed if ``None``.
    """

    kind: Literal["physics", "permute"]
    every: int = Field(gt=0)
    over: int = Field(default=0, ge=0)
    ranges: dict[str, Range] = Field(default_factory=dict)
    start: int | None = Field(default=None, ge=0)
    changes: int | None = Field(default=None, gt=0)
    seed: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> DriftSettings:
        if self.over > self.every:
            raise ValueError(
                f"over = {self.over} is longer than every = {self.every}: a change must end before the next begins"
            )
        if self.kind == "physics" and not self.ranges:
            raise ValueError("ranges is empty: kind = 'physics' needs at least one parameter, as name: [low, high]")
        if self.kind == "permute" and self.ranges:
            raise ValueError(f"ranges = {sorted(self.ranges)} has no meaning with kind = 'permute': leave it out")
        for name, (low, high) in self.ranges.items():
            if low > high:
                raise ValueError(f"ranges.{name} = [{low}, {high}]: low must not exceed high")
        return self

    @property
    def first_step(self) -> int:
        """Step at which the first change begins."""
        return self.every if self.start is None else self.start

    def progress(self, steps: Int[np.ndarray, "P"]) -> tuple[Int64[np.ndarray, "P"], Float64[np.ndarray, "P"]]:
        """Index of the current change (0 before the first) and the fraction of it that is done, in [0, 1]."""
        since_first = steps - self.first_step
        index = np.where(since_first < 0, 0, since_first // self.every + 1).astype(np.int64)
        if self.changes is not None:
            index = np.minimum(index, self.changes)
        if self.over == 0:
            return index, np.ones(len(steps))
        fraction = np.clip((since_first - (index - 1) * self.every) / self.over, 0.0, 1.0)
        return index, np.where(index == 0, 1.0, fraction)


class Drift(BatchedEnv):
    """Wrapper that applies a `DriftSettings` schedule, per member.

    What change k brings is a function of (seed, k) alone, so the number of steps is the whole state. It counts valid steps of
    each member. Changed physics hold from the next step on; ``obs`` and ``final_obs`` of a step come in the same order.

    Args:
        env: the environments, row = p·E + e.
        settings: the schedule.
        seeds: one seed per member.
        frozen_at: steps (one number, or one per member) at which the drift is held, for evaluation; ``None`` lets it run.

    Raises:
        ValueError: an unknown physical parameter, an impossible range, or an observation that cannot be permuted.
    """

    def __init__(
        self, env: BatchedEnv, settings: DriftSettings, seeds: Sequence[int], *, frozen_at: Steps | None = None
    ) -> None:
        if env.num_envs % len(seeds):
            raise ValueError(f"{env.num_envs} environments cannot be shared equally by {len(seeds)} members")
        self._env = env
        self.settings = settings
        self.num_envs = env.num_envs
        self.action_space = env.action_space
        self.observation_space = env.observation_space
        self._members = len(seeds)
        self._seeds = [seed if settings.seed is None else settings.seed for seed in seeds]
        self._frozen = frozen_at is not None
        self._steps = np.broadcast_to(np.array(0 if frozen_at is None else frozen_at, dtype=np.int64), (self._members,)).copy()
        self._changes: Int64[np.ndarray, "P"] | None = None
        self._fraction = np.ones(self._members)
        if settings.kind == "physics":
            self._check_ranges()
        else:
            self.observation_space = self._permuted_space()
        self._apply()

    def _check_ranges(self) -> None:
        # Both ends are tried now, so that an impossible range is refused here and not in the middle of a run.
        known = sorted(self._env.physics)
        for name, ends in self.settings.ranges.items():
            path = f"env.drift.ranges.{name}"
            if name not in known:
                raise ValueError(f"{path}: no such parameter; allowed are {', '.join(known) or 'none'}{nearest(name, known)}")
            try:
                for value in ends:
                    self._env.set_physics(name, np.full(self.num_envs, value))
            except ValueError as error:
                reason = str(error).rpartition(": ")[2]
                raise ValueError(f"{path} = {list(ends)}: {reason}") from error

    def _permuted_space(self) -> Box:
        space = self._env.observation_space
        if int(np.prod(space.shape)) < 2:
            raise ValueError(f"drift.kind = 'permute': observation space {space} has fewer than two entries to permute")
        return Box(float(space.low.min()), float(space.high.max()), space.shape, np.float32)

    @property
    def steps(self) -> Int64[np.ndarray, "P"]:
        """Valid steps each member has taken: what a twin for evaluation is frozen at."""
        return self._steps.copy()

    def set_steps(self, steps: Int[np.ndarray, "P"]) -> None:
        """Move the schedule, for environments that cannot be restored themselves.

        Raises:
            ValueError: not one number per member.
        """
        if np.shape(steps) != (self._members,):
            raise ValueError(f"steps have shape {np.shape(steps)}: one per member is needed, ({self._members},)")
        self._steps = np.array(steps, dtype=np.int64)
        self._apply()

    @property
    def changes(self) -> Int64[np.ndarray, "P"]:
        """Changes that have begun, per member."""
        return self.settings.progress(self._steps)[0]

    def _apply(self) -> None:
        """Bring physics or permutation to where the schedule stands."""
        index, fraction = self.settings.progress(self._steps)
        moved = self._changes is None or bool((index != self._changes).any())
        if not moved and bool((fraction == self._fraction).all()):
            return
        self._changes, self._fraction = index, fraction
        if self.settings.kind == "permute":
            if moved:
                self._old_order, self._new_order = self._orders(index - 1), self._orders(index)
            return
        for name in self.settings.ranges:
            old, new = self._values(name, index - 1), self._values(name, index)
            values = np.where(fraction == 1, new, old + fraction * (new - old))
            self._env.set_physics(name, np.repeat(values, self.num_envs // self._members))

    def _generator(self, member: int, change: int, what: str) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=stream_seed(self._seeds[member], "drift", what, change)))

    def _values(self, name: str, changes: Int64[np.ndarray, "P"]) -> Float64[np.ndarray, "P"]:
        low, high = self.settings.ranges[name]
        default = self._env.physics[name]
        drawn = [self._generator(p, int(k), name).uniform(low, high) if k > 0 else default for p, k in enumerate(changes)]
        return np.array(drawn)

    def _orders(self, changes: Int64[np.ndarray, "P"]) -> Int64[np.ndarray, "P 1 D"]:
        size = int(np.prod(self.observation_space.shape))
        identity = np.arange(size)
        orders = [self._generator(p, int(k), "order").permutation(size) if k > 0 else identity for p, k in enumerate(changes)]
        return np.stack(orders)[:, None, :]

    def _see(self, obs: Float32[np.ndarray, "N *obs"]) -> Float32[np.ndarray, "N *obs"]:
        if self.settings.kind == "physics":
            return obs
        rows = obs.reshape(self._members, self.num_envs // self._members, -1)
        seen = np.take_along_axis(rows, self._new_order, axis=2)
        if (self._fraction < 1).any():
            fraction = self._fraction.astype(np.float32)[:, None, None]
            old = np.take_along_axis(rows, self._old_order, axis=2)
            seen = np.where(fraction == 1, seen, (1 - fraction) * old + fraction * seen)
        return seen.reshape(obs.shape)

    def reset(self) -> Float32[np.ndarray, "N *obs"]:
        return self._see(self._env.reset())

    @property
    def resets_rows(self) -> bool:
        return self._env.resets_rows

    def reset_rows(self, rows: Bool[np.ndarray, "N"]) -> Float32[np.ndarray, "N *obs"]:
        return self._see(self._env.reset_rows(rows))

    def step(self, actions: Shaped[np.ndarray, "N ..."]) -> EnvStep:
        step = self._env.step(actions)
        if not self._frozen:
            self._steps = self._steps + step.valid.reshape(self._members, -1).sum(axis=1)
            self._apply()
        if self.settings.kind == "physics":
            return step
        final_obs = None if step.final_obs is None else self._see(step.final_obs)
        return EnvStep(
            self._see(step.obs),
            step.reward,
            step.terminated,
            step.truncated,
            final_obs,
            is_first=step.is_first,
            valid=step.valid,
        )

    def close(self) -> None:
        self._env.close()

    @property
    def physics(self) -> Mapping[str, float]:
        return self._env.physics

    def set_physics(self, name: str, values: Float[np.ndarray, "N"]) -> None:
        """Set a parameter that the schedule leaves alone.

        Raises:
            ValueError: the parameter is unknown, impossible, or drifts.
        """
        if name in self.settings.ranges:
            raise ValueError(f"physics = {name!r} drifts: its value is the schedule's")
        self._env.set_physics(name, values)

    def get_state(self) -> dict[str, Any] | None:
        inner = self._env.get_state()
        return None if inner is None else {"drift_steps": self.steps, "env": inner}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for key in ("drift_steps", "env"):
            if key not in state:
                raise ValueError(f"environment state has no {key!r}: it was not saved from a drifting task")
        self._env.set_state(state["env"])
        self.set_steps(np.asarray(state["drift_steps"]))


class TensorDrift(TensorEnv, Drift):
    """`Drift` around environments that are tensors. What a step needs of the schedule is brought to the device before it.

    Args:
        env: a `TensorEnv`.
        settings, seeds, frozen_at: as for `Drift`.
    """

    _env: TensorEnv

    def __init__(
        self, env: BatchedEnv, settings: DriftSettings, seeds: Sequence[int], *, frozen_at: Steps | None = None
    ) -> None:
        assert isinstance(env, TensorEnv)
        self.device = env.device
        entries = int(np.prod(env.observation_space.shape))
        rows = torch.arange(entries, device=self.device).repeat(len(seeds), 1, 1)
        self._old_rows, self._new_rows = rows, rows.clone()
        self._new_share = torch.ones(len(seeds), 1, 1, device=self.device)
        Drift.__init__(self, env, settings, seeds, frozen_at=frozen_at)

    def _apply(self) -> None:
        before = self._changes, self._fraction
        super()._apply()
        moved = self._changes is not before[0] or self._fraction is not before[1]
        if moved and self.settings.kind == "permute":
            # In place: a captured step reads these very tensors.
            self._old_rows.copy_(torch.from_numpy(self._old_order))
            self._new_rows.copy_(torch.from_numpy(self._new_order))
            self._new_share.copy_(torch.from_numpy(self._fraction)[:, None, None])

    def prepare_step(self) -> None:
        """Count the step, all of whose rows are valid, and bring the task to where the schedule then stands.

        As in `Drift`, physics hold from the step after on which they change, an order of entries for what this step returns.
        """
        self._env.prepare_step()
        if self._frozen:
            return
        if self.settings.kind == "physics":
            self._apply()
        self._steps = self._steps + self.num_envs // self._members
        if self.settings.kind == "permute":
            self._apply()

    def _see_tensor(self, obs: Float32[Tensor, "N D"]) -> Float32[Tensor, "N D"]:
        if self.settings.kind == "physics":
            return obs
        rows = obs.view(self._members, self.num_envs // self._members, -1)
        old = rows.gather(2, self._old_rows.expand_as(rows))
        new = rows.gather(2, self._new_rows.expand_as(rows))
        share = self._new_share
        return torch.where(share == 1, new, (1 - share) * old + share * new).view_as(obs)

    def reset_tensor(self) -> Float32[Tensor, "N D"]:
        return self._see_tensor(self._env.reset_tensor())

    def step_tensor(self, actions: Shaped[Tensor, "N ..."]) -> TensorStep:
        step = self._env.step_tensor(actions)
        obs, final_obs = self._see_tensor(step.obs), self._see_tensor(step.final_obs)
        return TensorStep(obs, step.reward, step.terminated, step.truncated, final_obs)
