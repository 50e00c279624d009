"""The recurrent actor-critic of a whole population."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import gymnasium
import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from hardy.config import Settings
from hardy.nn import compiled_step
from hardy.nn.compiled_sequence import CompiledSequence
from hardy.nn.compiled_step import CompiledStep
from hardy.nn.distributions import ActionDistribution, action_noise, distribution_head_size, make_distribution
from hardy.nn.linear import Activation, StackedLinear, StackedMLP
from hardy.nn.packed_step import OBSERVATION, Act, Layers, PackedStep, PolicyStep
from hardy.nn.recurrent import StackedRecurrent
from hardy.ops.categorical import FIRST_SUPPORT
from hardy.ops.critic import Critic, CriticSettings
from hardy.parallel import pool
from hardy.population import MemberGenerators

ACTION_GAIN = 0.01
"""The first policy is nearly uniform, so that early exploration does not depend on the draw of the weights."""

LayersT = TypeVar("LayersT", bound=Layers)
StepOutputs = tuple[Tensor, Tensor, Tensor]
"""The actor's outputs ``[P, E, A]``, the critics' ``[P, E, K]`` and the state ``[P, E, S]`` after a step."""


class PolicySettings(Settings):
    """Shape of the actor-critic; structure, shared by all members."""

    memory: Literal["none", "lstm", "gru"] = "lstm"
    memory_size: int = Field(64, ge=1)
    memory_layers: int = Field(1, ge=1)
    shared_memory: bool = True
    """One encoder and memory for actor and critic, or one each."""
    encoder: tuple[Annotated[int, Field(ge=1)], ...] = (64,)
    """Widths of the layers before the memory."""
    head: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Widths of the layers between the memory and each output."""
    activation: Activation = "tanh"
    layer_norm: bool = False
    log_std_init: float = 0.0
    """Start of the logarithm of the standard deviation of continuous actions."""


class Trunk(nn.Module):
    """Encoder and memory: observations to features."""

    def __init__(self, input_size: int, settings: PolicySettings, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.encoder = StackedMLP(input_size, settings.encoder, generators, settings.activation, settings.layer_norm)
        self.memory = (
            None
            if settings.memory == "none"
            else StackedRecurrent(
                settings.memory, self.encoder.output_size, settings.memory_size, settings.memory_layers, generators
            )
        )
        self.output_size = self.encoder.output_size if self.memory is None else settings.memory_size
        self.state_size = 0 if self.memory is None else self.memory.state_size

    def step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: ``obs [P, E, O]``, ``state [P, E, S]``."""
        features = self.encoder(obs)
        return (features, state) if self.memory is None else self.memory.step(features, state)

    def forward(self, obs: Tensor, state: Tensor, is_first: Tensor) -> Tensor:
        """A sequence: ``obs [P, T, E, O]`` to features ``[P, T, E, H]``."""
        features: Tensor = self.encoder(obs)
        return features if self.memory is None else self.memory(features, state, is_first)


class Branch(nn.Module):
    """Actor or critic: a trunk of its own unless it is shared, hidden layers, the output layer.

    Attributes:
        log_std: ``[P, A]`` of an actor with continuous actions.
        twin: a critic's second head.
    """

    log_std: nn.Parameter | None
    twin: Branch

    def __init__(
        self, trunk: Trunk | None, input_size: int, output_size: int, gain: float, settings: PolicySettings,
        generators: Sequence[torch.Generator],
    ) -> None:  # fmt: skip
        super().__init__()
        self.trunk = trunk
        self.head = StackedMLP(input_size, settings.head, generators, settings.activation, settings.layer_norm)
        self.output = StackedLinear(self.head.output_size, output_size, generators, gain)
        self.register_parameter("log_std", None)

    def forward(self, features: Tensor) -> Tensor:
        """Features ``[P, ..., H]`` to outputs ``[P, ..., O]``."""
        outputs: Tensor = self.output(self.head(features))
        return outputs


class ActorCritic(nn.Module):
    """Actor-critics of ``len(seeds)`` members. The names of its parameters begin with ``core``, ``actor`` or ``critic``.

    A parameter may be replaced by another of its shape, a submodule not: the policy was laid out from those it was made with.

    Args:
        observation_space: a ``Box``; observations are flattened.
        action_space: a ``Discrete`` or a ``Box``.
        seeds: one seed per member; a member's initial weights depend on its own seed only.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        settings: PolicySettings,
        critic: CriticSettings,
        seeds: Sequence[int],
    ) -> None:
        super().__init__()
        self.settings = settings
        self.action_space = action_space
        self.observation_size = math.prod(observation_space.shape or ())
        generators = MemberGenerators(seeds, "init").generators
        trunks = [Trunk(self.observation_size, settings, generators) for _ in range(1 if settings.shared_memory else 2)]
        self.core = trunks[0] if settings.shared_memory else None
        self._own_trunks = tuple(trunks)
        """Actor's and critic's, where they do not share; registered as theirs."""
        own = [None, None] if settings.shared_memory else trunks
        self.state_sizes = [trunk.state_size for trunk in trunks]
        self.state_size = sum(self.state_sizes)
        features = trunks[0].output_size
        actions = distribution_head_size(action_space)
        self.actor = Branch(own[0], features, actions, ACTION_GAIN, settings, generators)
        self.critic = Branch(own[1], features, Critic.head_size(critic), 1.0, settings, generators)
        if critic.twin:  # a head of its own, drawn after everything else: the other weights stay those of a single critic
            self.critic.twin = Branch(None, features, Critic.head_size(critic), 1.0, settings, generators)
        if critic.kind == "categorical":  # beside the weights, so that whatever copies or saves those takes it along
            support = torch.tensor(FIRST_SUPPORT).repeat(len(seeds), 1)
            self.critic.support = nn.Parameter(support, requires_grad=False)
        self.values = Critic(critic, getattr(self.critic, "support", None))
        if isinstance(action_space, gymnasium.spaces.Box):
            self.actor.log_std = nn.Parameter(torch.full((len(seeds), actions), settings.log_std_init))
        self._sequence = self._laid_out(CompiledSequence()) if self._layered else None

    def initial_state(self, members: int, envs: int) -> Float[Tensor, "P E S"]:
        """The state at the start of an episode: zeros."""
        return self.actor.output.weight.new_zeros(members, envs, self.state_size)

    def step(
        self, obs: Float[Tensor, "P E O"], state: Float[Tensor, "P E S"], is_first: Bool[Tensor, "P E"]
    ) -> tuple[ActionDistribution, Float[Tensor, "P E K"], Float[Tensor, "P E S"]]:
        """One time step, the state reset first where ``is_first``.

        Returns:
            The action distribution, the critics' outputs (which `values` reads), and the state after this step.
        """
        outputs, critic, state = self.step_outputs(obs, state, is_first)
        return self.distribution(outputs), critic, state

    def step_outputs(
        self, obs: Float[Tensor, "P E O"], state: Float[Tensor, "P E S"], is_first: Bool[Tensor, "P E"]
    ) -> tuple[Float[Tensor, "P E A"], Float[Tensor, "P E K"], Float[Tensor, "P E S"]]:
        """As `step`, with the actor's outputs instead of the distribution that `distribution` makes of them."""
        state = state.masked_fill(is_first.unsqueeze(-1), 0.0)
        if self.core is not None:
            actor_features, state = self.core.step(obs, state)
            critic_features = actor_features
        else:
            actor_state, critic_state = state.split(self.state_sizes, dim=-1)
            actor_features, actor_state = self._own_trunks[0].step(obs, actor_state)
            critic_features, critic_state = self._own_trunks[1].step(obs, critic_state)
            state = torch.cat([actor_state, critic_state], dim=-1)
        return self.actor(actor_features), self._critics(critic_features), state

    def stepper(self, members: int, envs: int) -> Callable[[Tensor, Tensor, Tensor], StepOutputs]:
        """`step_outputs` for many steps with the weights of this moment, without gradients; compiled where that is possible."""
        if not self._layered:
            return self.step_outputs
        step: PolicyStep = PackedStep()
        if compiled_step.available() and self.dtype is torch.float32 and self.device.type == "cpu":
            step = CompiledStep(members, envs, self.state_size, pool().threads)
        return self._laid_out(step)

    @property
    def _layered(self) -> bool:
        """Whether linear layers and LSTMs are all there is."""
        return self.settings.memory != "gru" and not self.settings.layer_norm

    def _laid_out(self, layers: LayersT) -> LayersT:
        """``layers`` with all of the policy's, ready for calls."""
        features, state_at = [], 0
        for trunk in self._own_trunks:
            layer = layers.add_mlp(OBSERVATION, trunk.encoder)
            features.append(layer if trunk.memory is None else layers.add_lstm(layer, trunk.memory, state_at))
            state_at += trunk.state_size
        branches = [(self.actor, features[0]), (self.critic, features[-1])]
        if self.values.heads == 2:
            branches.append((self.critic.twin, features[-1]))
        actor, *critics = (layers.add_linear(layers.add_mlp(source, branch.head), branch.output) for branch, source in branches)
        return layers.pack(actor, *critics)

    def acting(self, step: Callable[[Tensor, Tensor, Tensor], StepOutputs], normalize: Callable[[Tensor], Tensor]) -> Act:
        """A whole time step of a rollout around a `stepper`: observations normalised before it, actions drawn behind it.

        To be made anew when the weights change, as the stepper is.

        Raises:
            ValueError: ``normalize`` holds the statistics of other observations.
        """
        if isinstance(step, CompiledStep):
            return step.acting(normalize, self.actor.log_std)

        def act(obs: Tensor, state: Tensor, is_first: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            outputs, critic, state = step(normalize(obs), state, is_first)
            return self.distribution(outputs).sample(noise), outputs, critic, state

        return act

    def forward(
        self, obs: Float[Tensor, "P T E O"], state: Float[Tensor, "P E S"], is_first: Bool[Tensor, "P T E"]
    ) -> tuple[ActionDistribution, Float[Tensor, "P T E K"]]:
        """Whole sequences from a stored state: the action distributions and the critics' outputs (which `values` reads)."""
        outputs, critic = self.outputs(obs, state, is_first)
        return self.distribution(outputs), critic

    def outputs(
        self, obs: Float[Tensor, "P T E O"], state: Float[Tensor, "P E S"], is_first: Bool[Tensor, "P T E"]
    ) -> tuple[Float[Tensor, "P T E A"], Float[Tensor, "P T E K"]]:
        """As `forward`, with the actor's outputs instead of the distribution that `distribution` makes of them."""
        if self._sequence is not None and self._sequence.supports(obs, state):
            return self._sequence(obs, state, is_first)
        actor_features, critic_features = self.features(obs, state, is_first)
        return self.actor(actor_features), self._critics(critic_features)

    def features(
        self, obs: Float[Tensor, "P T E O"], state: Float[Tensor, "P E S"], is_first: Bool[Tensor, "P T E"]
    ) -> tuple[Float[Tensor, "P T E H"], Float[Tensor, "P T E H"]]:
        """What the actor's and the critic's heads see; the same tensor where the memory is shared."""
        if self.core is not None:
            shared = self.core(obs, state, is_first)
            return shared, shared
        actor_state, critic_state = state.split(self.state_sizes, dim=-1)
        actor, critic = self._own_trunks
        return actor(obs, actor_state, is_first), critic(obs, critic_state, is_first)

    def distribution(self, outputs: Float[Tensor, "P *batch A"]) -> ActionDistribution:
        """The action distribution that the actor's outputs stand for."""
        return make_distribution(self.action_space, outputs, self.actor.log_std)

    def _critics(self, features: Tensor) -> Tensor:
        outputs: Tensor = self.critic(features)
        return torch.cat([outputs, self.critic.twin(features)], dim=-1) if self.values.heads == 2 else outputs

    def draw_noise(self, generators: MemberGenerators, *batch: int) -> Float[Tensor, "P ..."]:
        """The randomness of ``[P, *batch]`` actions, each member's from its own generator."""
        kind, shape = action_noise(self.action_space)
        noise = torch.empty(len(generators), *batch, *shape, dtype=self.dtype)
        drawn = generators.uniform_(noise) if kind == "uniform" else generators.normal_(noise)
        return drawn.to(self.device)

    def flatten(self, obs: np.ndarray, members: int) -> Float[Tensor, "P E O"]:
        """A batch of observations ``[P * E, ...]`` of the environments as ``[P, E, O]``."""
        flat = torch.as_tensor(obs).reshape(members, -1, self.observation_size)
        return flat.to(device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights, and so of everything computed from them."""
        return self.actor.output.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.actor.output.weight.device


def describe_space(space: gymnasium.Space[Any]) -> dict[str, Any]:
    """A ``Box`` or ``Discrete`` space in words and numbers that JSON can hold."""
    if isinstance(space, gymnasium.spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    assert isinstance(space, gymnasium.spaces.Box)  # the environments refuse everything else
    bounds = {name: [str(bound) for bound in getattr(space, name).ravel().tolist()] for name in ("low", "high")}
    return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}


def space_from(description: Mapping[str, Any]) -> gymnasium.Space[Any]:
    """The space that `describe_space` described."""
    if description["type"] == "Discrete":
        return gymnasium.spaces.Discrete(description["n"], start=description["start"])
    dtype = np.dtype(description["dtype"])
    low, high = (np.array([float(bound) for bound in description[name]]).astype(dtype) for name in ("low", "high"))
    shape = description["shape"]
    return gymnasium.spaces.Box(low.reshape(shape), high.reshape(shape), dtype=dtype.type)
