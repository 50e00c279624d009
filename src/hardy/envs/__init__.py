"""Environments: one batched protocol, the built-in tasks, the adapter to Gymnasium, and tasks that drift."""

from hardy.envs.base import BatchedEnv, EnvStep
from hardy.envs.device import TensorEnv, TensorStep
from hardy.envs.drift import Drift, DriftSettings
from hardy.envs.factory import EnvSettings, make, make_from
from hardy.envs.gymnasium_adapter import GymVectorEnv
from hardy.envs.tasks import EnvInfo, list_envs, register_tasks

register_tasks()

__all__ = [
    "BatchedEnv",
    "Drift",
    "DriftSettings",
    "EnvInfo",
    "EnvSettings",
    "EnvStep",
    "GymVectorEnv",
    "TensorEnv",
    "TensorStep",
    "list_envs",
    "make",
    "make_from",
]
