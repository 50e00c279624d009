"""UPGD and VGS over a population: one chain, every tensor stacked, every hyperparameter per member."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hardy.config import nearest
from hardy.graphs import may_ask
from hardy.optim import compiled
from hardy.optim import vgs as variance
from hardy.optim.noise import KeyedNormal
from hardy.optim.settings import OptimizerSettings, VGSSettings
from hardy.optim.transforms import Step, TensorOptions, chain, clip_by_member_norm, descend, scale, stateless
from hardy.optim.upgd import UPGDState, perturb, upgd
from hardy.parallel import pool
from hardy.population import MemberGenerators, leaves, nested, per_member, training_state

FIXED_NOISE_WARNING = (
    "adaptive_noise=False with VGS on: VGS scales the update but not noise of fixed sigma, so the noise-to-signal ratio grows "
    "by up to 1/min_scale; use adaptive_noise=True, sigma=0, or switch VGS off"
)
_OPTIMIZER_NUMBERS = ("lr", "weight_decay", "beta_utility", "sigma", "max_grad_norm", "step_factor")
_ADAM_NUMBERS = ("beta1", "beta2", "eps")
_VGS_NUMBERS = ("alpha", "min_scale", "beta", "signal_floor")


@training_state
class OptimizerState:
    """State of a `PopulationOptimizer`; ``vgs`` is None where VGS is off."""

    upgd: UPGDState = nested()
    vgs: variance.VGSState | None = nested()


class _Given(NamedTuple):
    """What a step is given."""

    names: list[str]
    weights: list[Tensor]
    gradients: list[Tensor]
    state: OptimizerState
    numbers: Float[Tensor, "N P"]
    noise: MemberGenerators | Int[Tensor, "P"]
    active: Bool[Tensor, "P"]


class _Prepared:
    """A step and, where the compiled library takes it, its call: for the next one too, while nothing but the gradients changes.

    Every tensor that the call has the address of is held here, so that what comes to stand at the same address is the same.

    Args:
        repeats: whether the call may be taken again.
    """

    def __init__(
        self, step: Step, call: compiled.Call | None, given: _Given, options: list[TensorOptions], threads: int, repeats: bool
    ) -> None:
        self.step, self.call, self.repeats = step, call, repeats
        self._given = given._replace(gradients=[])  # of this step's, none is kept for the next one
        self._tensors = _tensors(given.state)
        self._options, self._threads = options, threads

    def fits(self, given: _Given, options: list[TensorOptions]) -> bool:
        """Whether a step with these is this one but for its gradients."""
        mine, tensors = self._given, _tensors(given.state)
        return (
            given.noise is mine.noise
            and given.names == mine.names
            and options == self._options
            and self._threads == pool().threads
            and len(tensors) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
            and [weight.data_ptr() for weight in given.weights] == [weight.data_ptr() for weight in mine.weights]
            and torch.equal(given.numbers, mine.numbers)
            and torch.equal(given.active, mine.active)
            and compiled.fit(given.weights, given.gradients, given.weights)
        )


def _tensors(state: OptimizerState) -> list[Tensor]:
    parts: list[UPGDState | variance.VGSState] = [state.upgd] if state.vgs is None else [state.upgd, state.vgs]
    values = [value for part in parts for value in vars(part).values()]
    return [tensor for value in values for tensor in (value.values() if isinstance(value, dict) else (value,))]


class PopulationOptimizer:
    """The update rule of a population's parameters.

    Args:
        shapes: the parameters' names and shapes ``[P, ...]``.
        settings: of the optimizer; its tunable numbers are only defaults, `step_` reads ``hyper``.
        vgs: of the variance gradient scaler.

    Raises:
        ValueError: ``shapes`` is empty or its tensors disagree on P, or ``settings.overrides`` names a prefix that no
            parameter has.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], settings: OptimizerSettings, vgs: VGSSettings) -> None:
        sizes = {shape[0] for shape in shapes.values()}
        if len(sizes) != 1:
            listed = {name: tuple(shape) for name, shape in shapes.items()}
            raise ValueError(f"shapes = {listed}: there must be some, and all must start with the same P")
        self.size = sizes.pop()
        self.names = list(shapes)
        self.settings, self.vgs = settings, vgs
        self.options = _tensor_options(self.names, settings)
        self._numbers = [f"optimizer.{name}" for name in _OPTIMIZER_NUMBERS]
        if settings.name == "AdaptiveUPGD":
            self._numbers += [f"optimizer.{name}" for name in _ADAM_NUMBERS]
        after = (stateless(clip_by_member_norm), upgd(settings.name), stateless(scale), stateless(perturb), stateless(descend))
        self._chain = chain(*after)
        self._scopes = variance.Scopes(self.names, vgs.scope)
        if vgs.enabled:
            self._numbers += [f"vgs.{name}" for name in _VGS_NUMBERS]
            self._chain = chain(variance.measure(self._scopes, vgs.warmup_steps, vgs.estimator), *after)
            if settings.sigma > 0 and not settings.adaptive_noise:
                warnings.warn(FIXED_NOISE_WARNING, UserWarning, stacklevel=2)
        self._prepared: _Prepared | None = None

    def init(self, parameters: Mapping[str, Tensor]) -> OptimizerState:
        """A fresh state for parameters ``[P, ...]``.

        Raises:
            ValueError: names or P are not those given to the constructor.
        """
        if list(parameters) != self.names or any(p.shape[0] != self.size for p in parameters.values()):
            raise ValueError(f"parameters = {list(parameters)}: must be {self.names}, in this order, with P = {self.size}")
        states = self._chain.init({name: parameter.detach() for name, parameter in parameters.items()})
        return OptimizerState(states[-4], states[0] if self.vgs.enabled else None)

    @torch.no_grad()
    def observe_microbatch(self, gradients: Mapping[str, Tensor], state: OptimizerState) -> None:
        """Record one microbatch's contribution ``[P, ...]`` to the next `step_`'s gradient, for the ``microbatch`` estimator.

        The gradient given to `step_` is the sum of the contributions.

        Raises:
            RuntimeError: VGS is off or has another estimator.
        """
        if state.vgs is None or self.vgs.estimator != "microbatch":
            raise RuntimeError("observe_microbatch() needs vgs.enabled = true and vgs.estimator = 'microbatch'")
        names = [name for name in self.names if name in gradients]
        variance.observe_microbatch_(state.vgs, [gradients[name] for name in names], self._columns(names, state))

    @torch.no_grad()
    def step_(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        state: OptimizerState,
        hyper: Mapping[str, Float[Tensor, "P"]],
        noise: MemberGenerators | Int[Tensor, "P"],
        active: Bool[Tensor, "P"],
    ) -> dict[str, Float[Tensor, "P"]]:
        """Update parameters and state in place; a parameter without a gradient is left alone, its state too.

        Args:
            parameters: ``[P, ...]`` each.
            gradients: raw gradients of the loss summed over P, ``[P, ...]`` each.
            state: from `init`.
            hyper: dotted path of each tunable number to ``[P]``, schedules already multiplied in.
            noise: the members' generators, of which a member with ``sigma`` 0 draws nothing, or keys drawn already.
            active: members to update. The others keep parameters and state bit for bit and draw nothing, whatever their
                gradient holds; only the contributions recorded by `observe_microbatch` are discarded for all.

        Returns:
            Diagnostics, ``[P]`` each: ``train/grad_norm`` (raw), ``upgd/utility_max``, ``upgd/noise_to_signal``, and with VGS
            ``vgs/scaling_factor`` and ``vgs/normalized_variance``, the mean over scopes and ``…/scope`` for each. Those of a
            member that is not active mean nothing.

        Raises:
            KeyError: ``hyper`` lacks a number.
        """
        names = [name for name in self.names if name in gradients]
        if not names:
            return {}
        missing = [name for name in self._numbers if name not in hyper]
        if missing:
            raise KeyError(f"hyper lacks {missing}")
        given = _Given(
            names,
            [parameters[name].detach() for name in names],
            [gradients[name] for name in names],
            state,
            torch.stack([hyper[name] for name in self._numbers]),
            noise,
            active.clone(),  # the library reads it in every step that repeats this one
        )
        prepared = self._prepared
        if prepared is None or not prepared.fits(given, self.options):
            prepared = self._prepare(given)
        step = prepared.step
        if prepared.call is not None:
            prepared.call(given.gradients)
            prepared.call.record(step)
        else:
            states: tuple[Any, ...] = (None, state.upgd, None, None, None)
            with _preserved(~active, step.weights, state):
                self._chain.update(step, states if state.vgs is None else (state.vgs, *states))
        self._prepared = prepared if prepared.repeats else None
        if state.vgs is not None:
            state.vgs.microbatches.zero_()
            state.vgs.microbatch_squares.zero_()
        metrics = torch.stack(list(step.metrics.values())).to(hyper["optimizer.lr"].dtype)
        return dict(zip(step.metrics, metrics.unbind(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        # A copy goes without the call, whose addresses are those of this one's tensors.
        return self.__dict__ | {"_prepared": None}

    def _prepare(self, given: _Given) -> _Prepared:
        names, state, noise = given.names, given.state, given.noise
        draw = given.active & (given.numbers[self._numbers.index("optimizer.sigma")] > 0)
        keys = (lambda: noise) if isinstance(noise, Tensor) else (lambda: noise.keys(draw))
        step = Step(
            names,
            given.weights,
            given.gradients,
            self._hyper_columns(given.numbers),
            self.options if len(names) == len(self.names) else [self.options[self.names.index(name)] for name in names],
            KeyedNormal(keys),
            self._columns(names, state),
        )
        measuring, call, threads = None, None, pool().threads
        if state.vgs is not None:
            measuring = compiled.Measuring(self._scopes, self.vgs.warmup_steps, self.vgs.estimator, state.vgs)
        if compiled.supports(step, state.upgd, measuring):
            call = compiled.Call(
                step, state.upgd, self.settings.name, measuring=measuring, active=given.active, threads=threads
            )
            step.gradients = step.direction = []  # what is kept for the next step keeps none of this one's
        # Of microbatches each step must have seen enough, which making it ready checks.
        repeats = call is not None and (state.vgs is None or self.vgs.estimator != "microbatch")
        return _Prepared(step, call, given, list(self.options), threads, repeats)

    def _hyper_columns(self, values: Float[Tensor, "N P"]) -> dict[str, Tensor]:
        stacked = values.double()[:, :, None]
        numbers = dict(zip((name.removeprefix("optimizer.") for name in self._numbers), stacked, strict=True))
        decay = numbers.pop("weight_decay")
        numbers["coupled_decay" if self.settings.name == "UPGD" else "decoupled_decay"] = decay
        return numbers

    def _columns(self, names: Sequence[str], state: OptimizerState) -> Tensor | None:
        if len(names) == len(self.names):
            return None
        return torch.tensor([self.names.index(name) for name in names], device=state.upgd.step.device)


@contextmanager
def _preserved(members: Bool[Tensor, "P"], weights: Sequence[Tensor], state: OptimizerState) -> Iterator[None]:
    """Put these members' rows of weights and state back afterwards, bit for bit."""
    rows = members.nonzero().squeeze(1) if may_ask(members) else None
    if rows is not None and not rows.numel():
        yield
        return
    tensors = [*weights, *(leaf.tensor for leaf in leaves(state))]
    if rows is None:
        copies = [tensor.clone() for tensor in tensors]
        yield
        kept = [torch.where(per_member(members, tensor.ndim), old, tensor) for tensor, old in zip(tensors, copies, strict=True)]
        torch._foreach_copy_(tensors, kept)
        return
    saved = [tensor[rows] for tensor in tensors]
    yield
    for tensor, before in zip(tensors, saved, strict=True):
        tensor[rows] = before


def _tensor_options(names: Sequence[str], settings: OptimizerSettings) -> list[TensorOptions]:
    """Each tensor's options: the optimizer's, replaced by those of its prefixes, the longest last.

    Raises:
        ValueError: a prefix that no name has.
    """
    prefixes = {name: [".".join(name.split(".")[: depth + 1]) for depth in range(name.count(".") + 1)] for name in names}
    existing = sorted({prefix for listed in prefixes.values() for prefix in listed})
    for prefix in settings.overrides:
        if prefix not in existing:
            known = ", ".join(existing) + nearest(prefix, existing)
            raise ValueError(f"optimizer.overrides: no parameter has the prefix {prefix!r}; prefixes are {known}")
    options = []
    for name in names:
        option = TensorOptions(settings.gating, settings.protecting, settings.adaptive_noise)
        for prefix in prefixes[name]:
            override = settings.overrides.get(prefix)
            if override is not None:
                option = option._replace(**override.model_dump(exclude_none=True))
        options.append(option)
    return options
