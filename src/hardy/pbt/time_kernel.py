"""The kernel of PB2 for scikit-learn; imported only where a Gaussian process is fitted."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.spatial.distance import cdist
from sklearn.gaussian_process.kernels import Hyperparameter, Kernel, NormalizedKernelMixin


class TimeVaryingRBF(NormalizedKernelMixin, Kernel):  # type: ignore[misc]  # scikit-learn has no types
    """``exp(−|x − x'|² / 2ℓ²) · (1 − ε)^(|t − t'| / 2)``: old points say less about now.

    From PB2 (Parker-Holder, Nguyen & Roberts 2020, arXiv:2002.02518, section 3), after Bogunovic et al. 2016. Both factors are
    kernels, the second one an exponential in time, so their product is one.

    A point is a row ``[t, x_1, …, x_D]``.

    Args:
        length_scale: ℓ, the same in every direction of x.
        epsilon: ε in (0, 1), how much is forgotten in one unit of time.
        length_scale_bounds: between which ℓ is fitted, or "fixed".
        epsilon_bounds: between which ε is fitted, inside (0, 1), or "fixed".
    """

    def __init__(
        self,
        length_scale: float = 0.5,
        epsilon: float = 0.1,
        length_scale_bounds: tuple[float, float] | str = (0.1, 10.0),
        epsilon_bounds: tuple[float, float] | str = (1e-3, 0.9),
    ) -> None:
        self.length_scale = length_scale
        self.epsilon = epsilon
        self.length_scale_bounds = length_scale_bounds
        self.epsilon_bounds = epsilon_bounds

    # scikit-learn finds what is to be fitted by these names, sorted: epsilon, then length_scale.
    @property
    def hyperparameter_epsilon(self) -> Any:
        """What is fitted of ε."""
        return Hyperparameter("epsilon", "numeric", self.epsilon_bounds)

    @property
    def hyperparameter_length_scale(self) -> Any:
        """What is fitted of ℓ."""
        return Hyperparameter("length_scale", "numeric", self.length_scale_bounds)

    def __call__(
        self, X: Float[np.ndarray, "N D"], Y: Float[np.ndarray, "M D"] | None = None, eval_gradient: bool = False
    ) -> Any:
        """The kernel ``[N, M]``, and with ``eval_gradient`` its derivatives ``[N, N, θ]`` with respect to the logarithms of
        ε and ℓ.

        Raises:
            ValueError: a gradient is asked for between two sets of points.
        """
        if eval_gradient and Y is not None:
            raise ValueError("eval_gradient = True with Y: the gradient is that of k(X, X)")
        other = X if Y is None else Y
        squares = cdist(X[:, 1:], other[:, 1:], metric="sqeuclidean") / self.length_scale**2
        ages = np.abs(X[:, :1] - other[:, :1].T)
        kernel = np.exp(-0.5 * squares) * (1 - self.epsilon) ** (0.5 * ages)
        if not eval_gradient:
            return kernel
        parts = []
        if not self.hyperparameter_epsilon.fixed:
            parts.append(kernel * (-0.5 * ages * self.epsilon / (1 - self.epsilon)))
        if not self.hyperparameter_length_scale.fixed:
            parts.append(kernel * squares)
        return kernel, np.stack(parts, axis=-1) if parts else np.empty((*kernel.shape, 0))

    def is_stationary(self) -> bool:
        """Whether it depends on differences of points only: it does."""
        return True
