"""Hardy trains agents that remember, keep learning and stay safe while the world changes."""

from hardy.algorithm import DistributionalPPO
from hardy.checkpoint import CheckpointError
from hardy.config import ConfigError
from hardy.envs import Drift, DriftSettings, list_envs
from hardy.optim import UPGD, UPGDW, AdaptiveUPGD, VarianceGradientScaler
from hardy.pbt import PBTConfig, PBTScheduler, PopulationMember

__version__ = "0.1.0"
__all__ = [
    "UPGD",
    "UPGDW",
    "AdaptiveUPGD",
    "CheckpointError",
    "ConfigError",
    "DistributionalPPO",
    "Drift",
    "DriftSettings",
    "PBTConfig",
    "PBTScheduler",
    "PopulationMember",
    "VarianceGradientScaler",
    "__version__",
    "list_envs",
]
