"""Optimizers: UPGD, UPGDW and AdaptiveUPGD, and the variance gradient scaler, for one model or a population."""

from hardy.optim.gradient_scaler import VarianceGradientScaler
from hardy.optim.population_optimizer import OptimizerState, PopulationOptimizer
from hardy.optim.settings import OptimizerSettings, ParameterGroupSettings, VGSSettings
from hardy.optim.torch_optimizers import UPGD, UPGDW, AdaptiveUPGD
from hardy.optim.transforms import Step, TensorOptions, Transform, chain

__all__ = [
    "UPGD",
    "UPGDW",
    "AdaptiveUPGD",
    "OptimizerSettings",
    "OptimizerState",
    "ParameterGroupSettings",
    "PopulationOptimizer",
    "Step",
    "TensorOptions",
    "Transform",
    "VGSSettings",
    "VarianceGradientScaler",
    "chain",
]
