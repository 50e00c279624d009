"""VGS for any ``torch.optim`` optimizer: between backward and step, or inside one of Hardy's optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hardy.optim import vgs
from hardy.optim.transforms import columns, tensor_norms
from hardy.optim.validation import Number, require_number, require_one_of

_MATRICES = ("steps", "second_moment", "variance", "signal")


def refuse_sparse(gradient: Tensor, who: str) -> None:
    """Refuse a sparse gradient.

    Raises:
        RuntimeError: it is sparse.
    """
    if gradient.layout != torch.strided:
        raise RuntimeError(f"{who} does not support sparse gradients: use sparse=False in the layer that made this one")


class VarianceGradientScaler:
    """Scale gradients down by how noisy they are (see `hardy.optim.vgs`).

    Alone::

        loss.backward()
        scaler.scale_gradients(max_grad_norm=0.5)
        optimizer.step()

    Given to a Hardy optimizer as ``gradient_scaler``, the optimizer measures and scales in ``step()``, behind its
    preconditioner. In front of an optimizer that divides by the gradient's size, such as Adam, a factor cancels: use
    ``AdaptiveUPGD`` there.

    Args:
        named_parameters: ``module.named_parameters()``, or any (name, parameter) pairs or mapping.
        alpha: weight of the noise-to-signal ratio; 1 minimises the mean squared error of the gradient.
        min_scale: smallest factor, in (0, 1].
        warmup_steps: updates during which the factor is 1.
        scope: ``global``, ``module`` (first component of the name) or ``tensor``: what shares a factor.
        estimator: ``ema``, or ``microbatch`` with `record_microbatch` after each microbatch's backward.
        beta: decay of the averages, in (0, 1).
        signal_floor: the signal counts as at least this share of the second moment.

    Raises:
        ValueError: an argument outside its range, no parameters, or a name given twice.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
        alpha: Number = 1.0,
        min_scale: Number = 0.01,
        warmup_steps: int = 20,
        scope: str = "module",
        estimator: str = "ema",
        beta: Number = 0.9,
        signal_floor: Number = 1e-4,
    ) -> None:
        pairs = list(named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters)
        self._parameters = {name: parameter for name, parameter in pairs if parameter.numel()}
        if not self._parameters or len(dict(pairs)) < len(pairs):
            raise ValueError(f"named_parameters = {[name for name, _ in pairs]}: must be non-empty, each name once")
        require_number("alpha", alpha, ge=0)
        require_number("min_scale", min_scale, gt=0, le=1)
        require_number("warmup_steps", warmup_steps, ge=0)
        require_one_of("estimator", estimator, vgs.ESTIMATORS)
        require_number("beta", beta, gt=0, lt=1)
        require_number("signal_floor", signal_floor, gt=0, lt=1)
        self.alpha, self.min_scale, self.warmup_steps = alpha, min_scale, warmup_steps
        self.scope, self.estimator, self.beta, self.signal_floor = scope, estimator, beta, signal_floor
        self._scopes = vgs.Scopes(list(self._parameters), scope)
        self._column = {id(parameter): k for k, parameter in enumerate(self._parameters.values())}
        self._state = vgs.init_state({name: p.detach()[None] for name, p in self._parameters.items()}, estimator)
        self._previous: dict[str, Tensor] = {}
        self._attached = False
        self._measured = False

    @torch.no_grad()
    def scale_gradients(self, max_grad_norm: Number | None = None) -> None:
        """Measure the raw gradients, clip them together to ``max_grad_norm``, multiply each by its factor; in place.

        Where an optimizer holds this scaler, only that optimizer scales: gradients are measured and clipped here, and its next
        ``step()`` applies the factor without measuring again. Statistics are left as they are when a gradient is not finite.
        """
        self.measure()
        named = self._with_gradient()
        if not named:
            return
        gradients = [gradient for _, gradient in named]
        if max_grad_norm is not None:
            require_number("max_grad_norm", max_grad_norm, gt=0)
            norm = float(tensor_norms(gradients).norm())
            if norm > max_grad_norm:
                torch._foreach_mul_(gradients, max_grad_norm / norm)
        if not self._attached:
            factors = self.factors([self._parameters[name] for name, _ in named])
            torch._foreach_mul_(gradients, columns(factors, gradients))

    @torch.no_grad()
    def record_microbatch(self) -> None:
        """Record what the last backward added to the gradients; call it after each microbatch's backward.

        Gradients must start from zero (or None) at each update.

        Raises:
            RuntimeError: the estimator is not ``microbatch``, or a gradient is sparse.
        """
        if self.estimator != "microbatch":
            raise RuntimeError(f"record_microbatch() needs estimator='microbatch', this scaler has {self.estimator!r}")
        named = self._with_gradient()
        if not named:
            raise RuntimeError("record_microbatch() found no gradient: call it after backward()")
        added = [gradient - self._previous[name] if name in self._previous else gradient for name, gradient in named]
        vgs.observe_microbatch_(self._state, added, self._positions(named))
        self._previous = {name: gradient.clone() for name, gradient in named}

    @property
    def scaling_factor(self) -> float:
        """Mean over scopes of the factor; 1 during the warm-up."""
        return _mean(self.scaling_factors.values())

    @property
    def scaling_factors(self) -> dict[str, float]:
        """The factor of each scope, in [min_scale, 1]."""
        return dict(zip(self._scopes.names, self._evaluate()[0][0].tolist(), strict=True))

    @property
    def normalized_variance(self) -> float:
        """Mean over scopes of the noise-to-signal ratio ``tr Var / ‖E g‖²`` of an update's gradient."""
        return _mean(self.normalized_variances.values())

    @property
    def normalized_variances(self) -> dict[str, float]:
        """The noise-to-signal ratio of each scope."""
        return dict(zip(self._scopes.names, self._evaluate()[1][0].tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The statistics, between two updates: tensors per parameter name, a microbatch half way is not included."""
        columns = {field: getattr(self._state, field)[0].clone().unbind() for field in _MATRICES}
        per_name = {field: dict(zip(self._parameters, column, strict=True)) for field, column in columns.items()}
        return {**per_name, "mean": {name: mean[0].clone() for name, mean in self._state.mean.items()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; storage stays.

        Raises:
            ValueError: a field is missing, or its names are not this scaler's (another estimator has no ``mean``).
        """
        for field in (*_MATRICES, "mean"):
            expected = set(self._state.mean if field == "mean" else self._parameters)
            found = set(state_dict.get(field, {}))
            if found != expected or field not in state_dict:
                what = f"this scaler (estimator={self.estimator!r})"
                raise ValueError(f"state_dict[{field!r}] has names {sorted(found)}, {what} expects {sorted(expected)}")
        for field in _MATRICES:
            for k, name in enumerate(self._parameters):
                getattr(self._state, field)[0, k].copy_(torch.as_tensor(state_dict[field][name]))
        for name, mean in self._state.mean.items():
            mean[0].copy_(state_dict["mean"][name])
        self._state.microbatches.zero_()
        self._state.microbatch_squares.zero_()
        self._previous, self._measured = {}, False

    def attach(self) -> None:
        """Let an optimizer do the scaling; its constructor calls this.

        Raises:
            ValueError: another optimizer holds this scaler.
        """
        if self._attached:
            raise ValueError("gradient_scaler is held by another optimizer: give each optimizer its own")
        self._attached = True

    @torch.no_grad()
    def measure(self) -> None:
        """Take the raw gradients of one update into the statistics; gradients stay as they are."""
        self._measured = True
        named = self._with_gradient()
        gradients = [gradient for _, gradient in named]
        self._previous = {}
        if not named or not bool(torch.isfinite(norms := tensor_norms(gradients)).all()):
            self._state.microbatches.zero_()
            self._state.microbatch_squares.zero_()
            return
        names = [name for name, _ in named]
        beta = torch.full((1, 1), self.beta, dtype=torch.float64, device=norms.device)
        vgs.update_statistics_(self._state, names, gradients, norms, beta, self.estimator, self._positions(named))

    def measure_once(self) -> None:
        """Measure unless `scale_gradients` already has since the last step; the optimizer that holds this scaler calls it."""
        if not self._measured:
            self.measure()
        self._measured = False

    def factors(self, parameters: Sequence[Tensor]) -> Float[Tensor, "1 K"]:
        """The factor of each of these parameters; 1 for one that the scaler does not know."""
        by_tensor = self._scopes.spread(self._evaluate()[0])
        known = torch.cat([by_tensor, torch.ones_like(by_tensor[:, :1])], dim=1)
        return known[:, [self._column.get(id(parameter), len(self._column)) for parameter in parameters]]

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        numbers = torch.tensor([self.alpha, self.min_scale, self.signal_floor], dtype=torch.float64)
        alpha, min_scale, floor = numbers.to(self._state.signal.device)[:, None, None]
        return vgs.scope_factors(self._state, self._scopes, alpha, min_scale, floor, self.warmup_steps)

    def _with_gradient(self) -> list[tuple[str, Tensor]]:
        named = [(name, p.grad.detach()) for name, p in self._parameters.items() if p.grad is not None]
        for _, gradient in named:
            refuse_sparse(gradient, "VarianceGradientScaler")
        return [(name, gradient[None]) for name, gradient in named]

    def _positions(self, named: Sequence[tuple[str, Tensor]]) -> Tensor | None:
        if len(named) == len(self._parameters):
            return None
        return torch.tensor([self._column[id(self._parameters[name])] for name, _ in named], device=named[0][1].device)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
