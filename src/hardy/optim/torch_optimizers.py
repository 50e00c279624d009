"""UPGD as ordinary ``torch.optim`` optimizers: a model is a population of one."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, get_args, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from hardy.optim import compiled
from hardy.optim.gradient_scaler import VarianceGradientScaler, refuse_sparse
from hardy.optim.noise import KeyedNormal
from hardy.optim.population_optimizer import FIXED_NOISE_WARNING
from hardy.optim.transforms import Gating, Step, TensorOptions, chain, clip_by_member_norm, descend, scale, stateless
from hardy.optim.upgd import OptimizerName, UPGDState, perturb, upgd
from hardy.optim.validation import Number, require_bool, require_instance, require_number, require_one_of

GATINGS = get_args(Gating)
Rows = list[tuple[str, tuple[float, ...]]]
"""Hyperparameters by name: one number for all tensors, or one for each."""
_LATER_DEFAULTS = {"gating": "global", "protecting": True, "step_factor": 1.0, "adaptive_noise": True}
_RUNTIME = ("reference", "max_grad_norm", "generator", "gradient_scaler", "diagnostics")


class _UPGDBase(Optimizer):
    """What the three optimizers share: validation, and one step of the chain over all parameter groups together."""

    _name: ClassVar[OptimizerName]
    _reference_step_factor: ClassVar[float]
    _moments: ClassVar[tuple[str, ...]] = ("utility",)
    _numbers: ClassVar[tuple[str, ...]] = ("lr", "beta_utility", "sigma", "step_factor")

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        gating: str,
        protecting: bool,
        adaptive_noise: bool | None,
        step_factor: Number | None,
        reference: bool,
        max_grad_norm: Number | None,
        generator: torch.Generator | None,
        gradient_scaler: VarianceGradientScaler | None,
    ) -> None:
        require_bool("reference", reference)
        require_instance("generator", generator, torch.Generator)
        require_instance("gradient_scaler", gradient_scaler, VarianceGradientScaler)
        if reference and adaptive_noise is True:
            raise ValueError("adaptive_noise = True with reference = True: the published noise is of fixed sigma")
        if reference and gradient_scaler is not None:
            raise ValueError("gradient_scaler with reference = True: the published step has no scaling; drop one of them")
        if max_grad_norm is not None:
            require_number("max_grad_norm", max_grad_norm, gt=0)
        if step_factor is None:
            step_factor = self._reference_step_factor if reference else 1.0
        self.reference = reference
        self.max_grad_norm = max_grad_norm
        self.generator = generator
        self.gradient_scaler = gradient_scaler
        self.diagnostics: dict[str, float] = {}
        self._forget()
        noise = not reference if adaptive_noise is None else adaptive_noise
        options = {"gating": gating, "protecting": protecting, "adaptive_noise": noise, "step_factor": step_factor}
        super().__init__(params, {**defaults, **options})
        if gradient_scaler is not None:
            gradient_scaler.attach()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may set any number, ``gating``, ``protecting``, ``adaptive_noise`` (``sigma=0``: no noise).

        Raises:
            ValueError: a value outside its range.
        """
        self._validate({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for key, value in _LATER_DEFAULTS.items():
                group.setdefault(key, self.defaults.get(key, value))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _RUNTIME}}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient, in place.

        ``diagnostics`` then holds ``train/grad_norm`` (raw), ``upgd/utility_max``, ``upgd/noise_to_signal`` and, with a scaler,
        ``vgs/scaling_factor`` and ``vgs/normalized_variance``.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters, groups = self._with_gradient()
        if not parameters:
            return loss
        states = self._states(parameters)
        rows = self._hyper_rows(groups)
        options = [TensorOptions(g["gating"], g["protecting"], g["adaptive_noise"]) for g in groups]
        if self.gradient_scaler is not None:
            self.gradient_scaler.measure_once()
        found = self._repeat(parameters, states, rows, options)
        if found is None:
            found = self._step(parameters, states, rows, options)
        self._counts.add_(1)
        self.diagnostics = dict(zip(compiled.METRICS, found, strict=True))
        if self.gradient_scaler is not None:
            self.diagnostics["vgs/scaling_factor"] = self.gradient_scaler.scaling_factor
            self.diagnostics["vgs/normalized_variance"] = self.gradient_scaler.normalized_variance
        return loss

    def _with_gradient(self) -> tuple[list[Tensor], list[dict[str, Any]]]:
        parameters, groups = [], []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or not parameter.numel():
                    continue
                refuse_sparse(parameter.grad, type(self).__name__)
                parameters.append(parameter)
                groups.append(group)
        return parameters, groups

    def _states(self, parameters: list[Tensor]) -> list[dict[str, Any]]:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, own in zip(parameters, states, strict=True):
            if not own:
                own["step"] = torch.zeros((), dtype=torch.float32)
                own.update({name: torch.zeros_like(parameter) for name in self._moments})
        return states

    def _forget(self) -> None:
        """Nothing is kept from one step for the next."""
        self._counts = torch.zeros(0)
        self._count_of: list[Tensor] = []
        self._call: compiled.Call | None = None
        self._made_for: tuple[object, ...] = ()

    def _join_counts(self, states: list[dict[str, Any]]) -> Tensor:
        """The step counts as one tensor, of which each state's is an element: what is done to one is done to the other."""
        if len(states) != len(self._count_of) or any(
            own["step"] is not count for own, count in zip(states, self._count_of, strict=True)
        ):
            self._counts = torch.stack([own["step"].float().cpu() for own in states])
            self._count_of = list(self._counts.unbind())
            for own, count in zip(states, self._count_of, strict=True):
                own["step"] = count
        return self._counts

    def _repeat(
        self, parameters: list[Tensor], states: list[dict[str, Any]], rows: Rows, options: list[TensorOptions]
    ) -> list[float] | None:
        """Take the step by the call of the one before, if nothing has changed but the gradients; returns the metrics."""
        if self._call is None or self._made_for != self._structure(parameters, states, rows, options):
            return None
        if self._join_counts(states).tolist() != self._call.steps[0].tolist():
            return None  # somebody has set them
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        moments = (own[name] for name in self._moments for own in states)
        if not compiled.fit(parameters, gradients, itertools.chain(parameters, moments)):
            return None
        if self.gradient_scaler is not None:
            self._call.factor.copy_(self.gradient_scaler.factors(parameters))
        self._call(gradients)
        metrics: list[float] = self._call.metrics[0].tolist()
        return metrics

    def _structure(
        self, parameters: list[Tensor], states: list[dict[str, Any]], rows: Rows, options: list[TensorOptions]
    ) -> tuple[object, ...]:
        """All that a call is made for and that may change between two steps, but for gradients and step counts."""
        addresses = [own[name].data_ptr() for name in self._moments for own in states]
        addresses += [parameter.data_ptr() for parameter in parameters]
        shapes = [parameter.shape for parameter in parameters]
        scaled = self.gradient_scaler is not None
        return rows, options, addresses, shapes, scaled, self.reference, torch.get_num_threads()

    def _step(
        self, parameters: list[Tensor], states: list[dict[str, Any]], rows: Rows, options: list[TensorOptions]
    ) -> list[float]:
        """Take the step; returns the metrics. If the compiled library takes it, its call is kept."""
        device = parameters[0].device
        state = self._stacked(states, device)
        step = Step(
            [str(k) for k in range(len(parameters))],
            [parameter[None] for parameter in parameters],
            [parameter.grad[None] for parameter in parameters if parameter.grad is not None],
            {name: torch.tensor([row], dtype=torch.float64, device=device) for name, row in rows},
            options,
            KeyedNormal(self._draw_key),
        )
        if self.gradient_scaler is not None:
            step.factor = self.gradient_scaler.factors(parameters)
        if compiled.supports(step, state):
            threads = torch.get_num_threads()
            self._call = compiled.Call(step, state, self._name, raw_maximum=self.reference, threads=threads)
            self._made_for = self._structure(parameters, states, rows, options)
            self._call(step.gradients)
            metrics: list[float] = self._call.metrics[0].tolist()
            return metrics
        before = (stateless(clip_by_member_norm), upgd(self._name, raw_maximum=self.reference))
        after = (stateless(scale), stateless(perturb), stateless(descend))
        chain(*before, *after).update(step, (None, state, None, None, None))
        return [float(step.metrics[name]) for name in compiled.METRICS]

    def _stacked(self, states: list[dict[str, Any]], device: torch.device) -> UPGDState:
        steps = self._join_counts(states).to(device, torch.int64)[None]
        stacked = {name: {str(k): own[name][None] for k, own in enumerate(states)} for name in self._moments}
        return UPGDState(steps, stacked["utility"], stacked.get("first_moment", {}), stacked.get("second_moment", {}))

    def _hyper_rows(self, groups: list[dict[str, Any]]) -> Rows:
        if len(self.param_groups) == 1:
            groups = groups[:1]  # one number for all tensors
        decay = "coupled_decay" if self._name == "UPGD" and not self.reference else "decoupled_decay"
        rows = [(name, tuple([float(group[name]) for group in groups])) for name in self._numbers]
        rows.append((decay, tuple([float(group["weight_decay"]) for group in groups])))
        if self.max_grad_norm is not None:
            rows.append(("max_grad_norm", (float(self.max_grad_norm),) * len(groups)))
        return rows

    def _draw_key(self) -> Tensor:
        return torch.empty(1, dtype=torch.int64).random_(generator=self.generator)

    def _validate(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr = {lr!r}: a tensor lr must have one element")
        require_number("lr", float(lr) if isinstance(lr, Tensor) else lr, ge=0)
        for name in ("weight_decay", "sigma"):
            require_number(name, group[name], ge=0)
        require_number("step_factor", group["step_factor"], gt=0)
        for name in ("beta_utility", "beta1", "beta2"):
            if name in group:
                require_number(name, group[name], ge=0, lt=1)
        if "eps" in group:
            require_number("eps", group["eps"], gt=0)
        require_one_of("gating", group["gating"], GATINGS)
        for name in ("protecting", "adaptive_noise"):
            require_bool(name, group[name])
        if self.reference and group["adaptive_noise"]:
            raise ValueError("adaptive_noise = True in a group, reference = True: the published noise is of fixed sigma")
        if self.gradient_scaler is not None and not group["adaptive_noise"] and group["sigma"] > 0:
            warnings.warn(FIXED_NOISE_WARNING, UserWarning, stacklevel=4)


class UPGD(_UPGDBase):
    """Utility-based perturbed gradient descent with weight decay coupled into the gradient (as ``torch.optim.Adam`` has it).

    ``w ← w − lr·gate·(s·(g + weight_decay·w) + noise)``, gate = 1 − sigmoid(U/η), s the factor of ``gradient_scaler``; see
    `hardy.optim.upgd` and Elsayed & Mahmood (ICLR 2024), Algorithm 1.

    Args:
        params: parameters or groups; a group may override every number, ``gating``, ``protecting``, ``adaptive_noise``.
        lr: learning rate, a number or a tensor of one element.
        weight_decay: decay λ.
        beta_utility: decay of the average utility.
        sigma: if adaptive, noise-to-signal ratio of the update; else the noise's standard deviation before the gate, in units
            of the update before lr.
        adaptive_noise: noise relative to the update it is added to; None means True, or False with ``reference``.
        gating: ``global`` (η over all globally gated weights), ``local`` (unit norm along the last axis) or ``none``.
        protecting: gate the update as well as the noise.
        step_factor: in front of the gate; None means 1, or with ``reference`` what the published code has (2, `UPGDW` 1).
        reference: the published code step by step: η the raw, unguarded maximum against corrected utilities, noise of fixed
            sigma, decay decoupled.
        max_grad_norm: clip all gradients together, after they are measured; None for no clip.
        generator: CPU generator, from which each step with noise draws one number, its key; None for torch's default.
        gradient_scaler: `VarianceGradientScaler` that this optimizer measures and applies in ``step()``.

    Raises:
        ValueError: a value outside its range, or ``reference`` with ``adaptive_noise=True`` or with ``gradient_scaler``.
        TypeError: ``generator`` or ``gradient_scaler`` is something else.
    """

    _name: ClassVar[OptimizerName] = "UPGD"
    _reference_step_factor = 2.0

    def __init__(
        self,
        params: ParamsT,
        lr: Number | Tensor = 1e-5,
        weight_decay: Number = 0.001,
        beta_utility: Number = 0.999,
        sigma: Number = 0.001,
        adaptive_noise: bool | None = None,
        *,
        gating: str = "global",
        protecting: bool = True,
        step_factor: Number | None = None,
        reference: bool = False,
        max_grad_norm: Number | None = None,
        generator: torch.Generator | None = None,
        gradient_scaler: VarianceGradientScaler | None = None,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, "beta_utility": beta_utility, "sigma": sigma},
            gating=gating,
            protecting=protecting,
            adaptive_noise=adaptive_noise,
            step_factor=step_factor,
            reference=reference,
            max_grad_norm=max_grad_norm,
            generator=generator,
            gradient_scaler=gradient_scaler,
        )


class UPGDW(UPGD):
    """`UPGD` with decoupled weight decay: ``w ← (1 − lr·weight_decay)·w − lr·gate·(s·g + noise)``, the paper's UPGD-W."""

    _name: ClassVar[OptimizerName] = "UPGDW"
    _reference_step_factor = 1.0


class AdaptiveUPGD(_UPGDBase):
    """UPGD on Adam's preconditioned update, decay decoupled (Elsayed & Mahmood, ICLR 2024, Algorithm 5).

    ``w ← (1 − lr·weight_decay)·w − lr·gate·(s·m̂/(√v̂ + eps) + noise)``. The factor s of ``gradient_scaler`` acts on the
    preconditioned update, where it does not cancel, and ``sigma`` is in units of that update. With ``reference`` the step
    factor is 2, as in the authors' PPO optimizer; the paper has 1.

    Args:
        beta1: decay of the average gradient.
        beta2: decay of the average squared gradient.
        eps: added to √v̂.

    The other arguments and errors are those of `UPGD`.
    """

    _name: ClassVar[OptimizerName] = "AdaptiveUPGD"
    _reference_step_factor = 2.0
    _moments = ("utility", "first_moment", "second_moment")
    _numbers = (*_UPGDBase._numbers, "beta1", "beta2", "eps")

    def __init__(
        self,
        params: ParamsT,
        lr: Number | Tensor = 1e-5,
        weight_decay: Number = 0.001,
        beta_utility: Number = 0.999,
        sigma: Number = 0.001,
        adaptive_noise: bool | None = None,
        *,
        beta1: Number = 0.9,
        beta2: Number = 0.999,
        eps: Number = 1e-5,
        gating: str = "global",
        protecting: bool = True,
        step_factor: Number | None = None,
        reference: bool = False,
        max_grad_norm: Number | None = None,
        generator: torch.Generator | None = None,
        gradient_scaler: VarianceGradientScaler | None = None,
    ) -> None:
        numbers = {"lr": lr, "weight_decay": weight_decay, "beta_utility": beta_utility, "sigma": sigma}
        super().__init__(
            params,
            {**numbers, "beta1": beta1, "beta2": beta2, "eps": eps},
            gating=gating,
            protecting=protecting,
            adaptive_noise=adaptive_noise,
            step_factor=step_factor,
            reference=reference,
            max_grad_norm=max_grad_norm,
            generator=generator,
            gradient_scaler=gradient_scaler,
        )
