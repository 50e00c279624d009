"""PB2: the hyperparameters of a copy chosen by a Gaussian-process bandit that knows the past gains of the whole population.

Parker-Holder, Nguyen & Roberts 2020, "Provably Efficient Online Hyperparameter Optimization with Population-Based Bandits",
arXiv:2002.02518. The Gaussian process is scikit-learn's, which is optional: ``pip install 'hardy[pb2]'``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize

from hardy.config import ConfigError
from hardy.pbt.exploration import Gain
from hardy.pbt.settings import PBTRules
from hardy.population import stream_seed

MAX_POINTS = 200
"""Points of history that are fitted, the newest: the cost grows with their cube, and what is older than some tens of exchanges
has been forgotten by the kernel anyway."""
CANDIDATES = 512
"""Random places at which the bound is looked at before the best of them are polished."""
POLISHED = 3
PROBE = 1e-5
"""Step of the differences that the slope is taken from."""
NOISE_BOUNDS = (1e-3, 1.0)
"""Variance of the noise of a gain, as a share of the variance of all gains."""
EXACT = 1e-6
"""Noise of a place that is only imagined."""


def require() -> None:
    """Make sure that PB2 can run, before anything starts that would need it later.

    Raises:
        ConfigError: scikit-learn is not installed or does not import.
    """
    try:
        import sklearn.gaussian_process  # noqa: F401
        import threadpoolctl  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            [
                f"pbt.explore = 'pb2': needs scikit-learn, which cannot be imported ({error}): "
                "pip install 'hardy[pb2]', or choose pbt.explore = 'both'"
            ]
        ) from None


def suggest(
    rules: PBTRules,
    history: Sequence[Gain],
    running: Sequence[Mapping[str, float]],
    count: int,
    *,
    seed: int,
    round: int,
) -> list[dict[str, float]]:
    """Hyperparameters for ``count`` copies, each where the gain until the next exchange may be highest.

    The gains so far are fitted over (round, hyperparameters), the latter on the even scale of each space, between 0 and 1.
    A suggestion maximises the upper confidence bound ``μ + κ·σ`` at the next round, κ = √(0.2 + max(0, ln 0.4 n)) with n
    points of history. One is chosen after another: what ``running`` members and earlier suggestions try counts as known to have
    the gain that is expected there, which leaves μ as it is and lowers σ around it (GP-BUCB, Desautels et al. 2014).
    These imagined gains are taken as exact; were they as noisy as the real ones, a noisy history would send a whole batch to
    one place.

    Args:
        rules: the hyperparameters and their spaces.
        history: gains of any member. A point with a gain or value that is not finite, or without one of the hyperparameters,
            is left out.
        running: what the members train with that go on unchanged.
        count: how many suggestions.
        seed: of the run.
        round: the exchange at which the copies are made.

    Returns:
        ``count`` mappings of the rules' hyperparameters, inside their bounds: uniform draws on the even scales while fewer than
        two points of history are usable.

    Raises:
        ConfigError: scikit-learn is missing.
        ValueError: ``count`` is negative.
    """
    if count < 0:
        raise ValueError(f"count = {count}: must be ≥ 0")
    require()
    generator = np.random.default_rng(stream_seed(seed, "pb2", round))
    usable = [point for point in history if math.isfinite(point.gain) and _is_complete(rules, point.hyperparams)]
    points = sorted(usable, key=lambda point: point.round)[-MAX_POINTS:]
    if len(points) < 2:
        return [_values(rules, generator.random(len(rules.hyperparams))) for _ in range(count)]
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):  # on matrices this small, threads cost far more time than they save
        known = np.array([[point.round, *_place(rules, point.hyperparams)] for point in points], dtype=np.float64)
        bandit = _Bandit(known, _standardized(np.array([point.gain for point in points])), generator)
        bandit.imagine([_place(rules, values) for values in running if _is_complete(rules, values)], round + 1)
        found = []
        for _ in range(count):
            place = bandit.best(round + 1)
            bandit.imagine([place], round + 1)
            found.append(_values(rules, place))
    return found


class _Bandit:
    """A Gaussian process over rows ``[round, x]`` and the search for the place where its upper bound is highest."""

    def __init__(self, known: Float[np.ndarray, "N D"], gains: Float[np.ndarray, "N"], generator: np.random.Generator) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, WhiteKernel

        from hardy.pbt.time_kernel import TimeVaryingRBF

        self.generator = generator
        self.known, self.gains = known, gains
        self.kappa = math.sqrt(0.2 + max(0.0, math.log(0.4 * len(known))))
        kernel = ConstantKernel(1.0, (0.05, 20.0)) * TimeVaryingRBF() + WhiteKernel(0.1, NOISE_BOUNDS)
        fitted = GaussianProcessRegressor(
            kernel, alpha=0.0, n_restarts_optimizer=1, random_state=int(generator.integers(2**31))
        )
        with warnings.catch_warnings():
            # Few points often leave a parameter at its bound. The bounds are chosen so that this does no harm.
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted.fit(known, gains)
        # From here on the noise belongs to the gains alone: the bound is on the gain itself, not on a noisy copy of it.
        self.noise = fitted.kernel_.k2.noise_level
        self.process = partial(GaussianProcessRegressor, fitted.kernel_.k1, optimizer=None)
        self.expected = self.process(alpha=self.noise).fit(known, gains)
        self.imagined = np.empty((0, known.shape[1]))
        self.uncertain = self.expected

    def imagine(self, places: Sequence[Float[np.ndarray, "D"]], time: int) -> None:
        """Count places as known to gain what is expected there."""
        if not places:
            return
        rows = np.array([[time, *place] for place in places])
        self.imagined = np.concatenate([self.imagined, rows])
        noise = np.concatenate([np.full(len(self.known), self.noise), np.full(len(self.imagined), EXACT)])
        gains = np.concatenate([self.gains, self.expected.predict(self.imagined)])
        everything = np.concatenate([self.known, self.imagined])
        self.uncertain = self.process(alpha=noise).fit(everything, gains)

    def bound(self, places: Float[np.ndarray, "N D"], time: int) -> Float[np.ndarray, "N"]:
        """``μ + κ·σ`` at a time."""
        rows = np.column_stack([np.full(len(places), time), places])
        _, deviation = self.uncertain.predict(rows, return_std=True)
        upper: Float[np.ndarray, "N"] = self.expected.predict(rows) + self.kappa * deviation
        return upper

    def best(self, time: int) -> Float[np.ndarray, "D"]:
        """The place with the highest bound: the best of random ones, climbed from."""
        dimensions = self.known.shape[1] - 1
        candidates = self.generator.random((CANDIDATES, dimensions))
        order = np.argsort(-self.bound(candidates, time), kind="stable")

        probes = np.concatenate([np.zeros((1, dimensions)), np.eye(dimensions), -np.eye(dimensions)]) * PROBE

        def descent(place: Float[np.ndarray, "D"]) -> tuple[float, Float[np.ndarray, "D"]]:
            # One prediction for all differences: a call costs far more than a row.
            bound = self.bound(place + probes, time)
            return -float(bound[0]), (bound[dimensions + 1 :] - bound[1 : dimensions + 1]) / (2 * PROBE)

        limits = [(0.0, 1.0)] * dimensions
        climbs = [
            minimize(descent, start, jac=True, method="L-BFGS-B", bounds=limits) for start in candidates[order[:POLISHED]]
        ]
        found: Float[np.ndarray, "D"] = np.clip(min(climbs, key=lambda climb: float(climb.fun)).x, 0, 1)
        return found


def _is_complete(rules: PBTRules, hyperparams: Mapping[str, float]) -> bool:
    return all(math.isfinite(hyperparams.get(name, math.nan)) for name in rules.hyperparams)


def _place(rules: PBTRules, hyperparams: Mapping[str, float]) -> Float[np.ndarray, "D"]:
    """Values on their even scales, brought to [0, 1]."""
    place = []
    for name, space in rules.hyperparams.items():
        low, high = space.to_even(space.low), space.to_even(space.high)
        inside = min(max(hyperparams[name], space.low), space.high)
        place.append((space.to_even(inside) - low) / (high - low))
    return np.array(place)


def _values(rules: PBTRules, place: Float[np.ndarray, "D"]) -> dict[str, float]:
    """What `_place` stands for."""
    values = {}
    for (name, space), share in zip(rules.hyperparams.items(), place, strict=True):
        low, high = space.to_even(space.low), space.to_even(space.high)
        values[name] = space.from_even(low + float(share) * (high - low))
    return values


def _standardized(gains: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Gains with mean 0 and deviation 1; all 0 where they are alike."""
    shrunk = gains / max(float(np.abs(gains).max()), 1e-300)  # so that no square overflows
    centred = shrunk - shrunk.mean()
    deviation = float(centred.std())
    standardized: Float[np.ndarray, "N"] = centred / deviation if deviation > 1e-12 else np.zeros_like(centred)
    return standardized
