"""The settings of a run: the sections of the parts, composed and checked against one another."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator

from hardy.adversary import AdversarySettings
from hardy.config import Settings, nearest, tunables
from hardy.envs import EnvSettings
from hardy.nn.normalizer import NormalizerSettings
from hardy.ops.critic import Critic, CriticSettings
from hardy.ops.risk import RiskSettings
from hardy.optim import OptimizerSettings, VGSSettings
from hardy.parallel import MOST_THREADS
from hardy.pbt import PBTSettings
from hardy.pbt.pb2 import require
from hardy.policy import PolicySettings
from hardy.ppo import PPOSettings


class EvaluationSettings(Settings):
    """The evaluation at the end of a run, and the default of ``hardy eval``."""

    episodes: int = Field(20, ge=2)
    deterministic: bool = True
    """Take the most probable action instead of a sample."""
    max_steps: int = Field(100_000, ge=1)
    """Steps after which an episode that does not end counts with its return so far."""


class CheckpointSettings(Settings):
    """When the whole training state is written."""

    every: int = Field(50_000, ge=1)
    """Environment steps of one member between two checkpoints."""
    keep: int = Field(2, ge=1)
    """Checkpoints that stay in the folder: the newest ones."""


class PopulationSettings(Settings):
    """How many agents train at once."""

    size: int = Field(1, ge=1)
    """Members; member ``p`` has the seed ``seed + p``."""


class ScheduledChange(Settings):
    """Hyperparameters that change in the course of a run."""

    step: int = Field(ge=0)
    """Environment steps after which they hold."""
    values: dict[str, float] = Field(min_length=1)
    """Values by dotted path; a schedule such as ``ppo.lr_schedule`` still multiplies them."""


class RunSettings(Settings):
    """Everything that decides a run: the sections of the parts, composed."""

    seed: int = Field(0, ge=0)
    total_timesteps: int = Field(100_000, ge=1)
    """Environment steps of one member, rounded up to whole rollouts."""
    artifacts_dir: str = Field("artifacts", min_length=1)
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = Field(None, ge=1, le=MOST_THREADS)
    """Processor threads; ``null`` takes every core the process may use."""
    profile: bool = False
    """Measure where the time of an iteration goes."""
    env: EnvSettings
    policy: PolicySettings = PolicySettings()
    critic: CriticSettings = CriticSettings()
    risk: RiskSettings = RiskSettings()
    adversary: AdversarySettings = AdversarySettings()
    ppo: PPOSettings = PPOSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    vgs: VGSSettings = VGSSettings()
    normalizer: NormalizerSettings = NormalizerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    population: PopulationSettings = PopulationSettings()
    pbt: PBTSettings = PBTSettings()
    schedule: tuple[ScheduledChange, ...] = ()
    """What ``schedule.yaml`` of a population replays in a single run."""

    @model_validator(mode="after")
    def _hyperparameters_exist(self) -> Self:
        for name, space in self.pbt.hyperparams.items():
            where = f"pbt.hyperparams.{name}"
            for end, value in (("low", space.low), ("high", space.high)):
                self.require_tunable(f"{where}.{end}", name, value)
            self._require_use(where, name)
            configured = tunables(self)[name]
            if self.pbt.initial == "configured" and not space.low <= configured <= space.high:
                raise ValueError(
                    f"{where}: {name} = {configured:g} lies outside {space.low:g} to {space.high:g}, "
                    "which pbt.initial = 'configured' starts from"
                )
        steps = [change.step for change in self.schedule]
        if sorted(set(steps)) != steps:
            raise ValueError(f"schedule: the steps are {steps}: they must increase")
        for index, change in enumerate(self.schedule):
            for name, value in change.values.items():
                self.require_tunable(f"schedule.{index}.values.{name}", name, value)
        if self.schedule and self.population.size > 1:
            raise ValueError(
                f"schedule: population.size = {self.population.size}, whose exchanges decide; allowed is a population of 1"
            )
        return self

    def _require_use(self, where: str, name: str) -> None:
        if name.startswith("vgs.") and not self.vgs.enabled:
            raise ValueError(f"{where}: {name} has no effect with vgs.enabled = false")
        if name in ("optimizer.beta1", "optimizer.beta2", "optimizer.eps") and self.optimizer.name != "AdaptiveUPGD":
            raise ValueError(f"{where}: {name} has no effect with optimizer.name = '{self.optimizer.name}'")
        if name.startswith("risk.") and not self.risk.used:
            raise ValueError(f"{where}: {name} has no effect with risk.weight = 0 and risk.cvar_limit = null")
        if name == "critic.value_clip" and self.critic.value_clip == 0:
            raise ValueError(f"{where}: {name} has no effect with critic.value_clip = 0; give it a value to switch clipping on")
        attacked = self.adversary.epsilon > 0 or "adversary.epsilon" in self.pbt.hyperparams
        if name.startswith("adversary.") and not attacked:
            raise ValueError(f"{where}: {name} has no effect with adversary.epsilon = 0")

    def require_tunable(self, where: str, name: str, value: float) -> None:
        """Refuse a name that is no tunable number, or a value that it cannot have.

        Raises:
            ValueError: names ``where`` the problem is, the name, the value and what is allowed.
        """
        known = tunables(self)
        if name not in known:
            allowed = ", ".join(sorted(known))
            raise ValueError(f"{where}: '{name}' is no tunable number{nearest(name, known)}; allowed are {allowed}")
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{where} = {value!r}: must be a number")
        path, _, key = name.rpartition(".")
        section: Settings = self
        for part in path.split("."):
            section = getattr(section, part)
        try:
            type(section).model_validate({**section.model_dump(), key: value})
        except ValidationError as error:
            raise ValueError(f"{where} = {value:g}: {error.errors()[0]['msg'].lower()}") from None

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        smallest = self.env.num_envs // self.ppo.n_minibatches
        if smallest == 0:
            raise ValueError(
                f"ppo.n_minibatches = {self.ppo.n_minibatches}: at most env.num_envs = {self.env.num_envs}, "
                "since a minibatch holds whole sequences"
            )
        if smallest < self.microbatches:
            raise ValueError(
                f"vgs.microbatches = {self.vgs.microbatches}: at most {smallest}, the environments in one minibatch "
                f"(env.num_envs = {self.env.num_envs} over ppo.n_minibatches = {self.ppo.n_minibatches})"
            )
        if self.env.num_envs % (self.ppo.n_minibatches * self.microbatches) and self.microbatches > 1:
            raise ValueError(
                f"vgs.estimator = 'microbatch': env.num_envs = {self.env.num_envs} must be a multiple of ppo.n_minibatches * "
                f"vgs.microbatches = {self.ppo.n_minibatches * self.microbatches}, since unequal parts would count as noise"
            )
        if self.risk.used and Critic.head_size(self.critic) == 1:
            raise ValueError(
                f"risk.weight = {self.risk.weight}, risk.cvar_limit = {self.risk.cvar_limit}: risk needs a distribution, but "
                f"critic.kind = '{self.critic.kind}' predicts a single number here; use several quantiles or atoms"
            )
        if 1 < self.population.size < len(self.pbt.frequencies):
            raise ValueError(
                f"pbt.frequencies = {list(self.pbt.frequencies)}: at most population.size = {self.population.size} of them, "
                "since each belongs to a sub-population"
            )
        if self.population.size > 1 and self.pbt.explore == "pb2":
            require()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device = 'cuda': this machine has no CUDA device that PyTorch can use; allowed is 'cpu'")
        return self

    @property
    def microbatches(self) -> int:
        """Parts of a minibatch whose gradients are taken one by one."""
        return self.vgs.microbatches if self.vgs.enabled and self.vgs.estimator == "microbatch" else 1

    @property
    def member_seeds(self) -> list[int]:
        """One seed per member: member ``p`` is the single run with this seed, but for the drift, which is the same for all."""
        return [self.seed + member for member in range(self.population.size)]

    @property
    def drift_seeds(self) -> list[int]:
        """The drift's seed of each member: the world changes for all in the same way, so that their scores compare."""
        return [self.seed] * self.population.size
