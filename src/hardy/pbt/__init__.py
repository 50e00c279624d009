"""Population-based training, for any algorithm: who copies whom, and what a copy tries, from scores and numbers alone."""

from hardy.pbt.exploration import Gain, draw_initial, explore
from hardy.pbt.members import PopulationMember
from hardy.pbt.scheduler import PBTConfig, PBTScheduler
from hardy.pbt.selection import Scores, Selection, groups, select
from hardy.pbt.settings import HyperparameterSpace, PBTRules, PBTSettings

__all__ = [
    "Gain",
    "HyperparameterSpace",
    "PBTConfig",
    "PBTRules",
    "PBTScheduler",
    "PBTSettings",
    "PopulationMember",
    "Scores",
    "Selection",
    "draw_initial",
    "explore",
    "groups",
    "select",
]
