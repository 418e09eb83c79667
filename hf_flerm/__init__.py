"""Function-space learning rates for Transformers and PEFT: record them on a small run, match them on a big one."""

from .alignment import log_alignments
from .callback import FLeRMCallback
from .config import FLeRMConfig
from .mapping import map_profile
from .matching import match_rates
from .measurement import Measurement
from .planning import Plan, plan
from .probes import measure_rates
from .rate_profile import RateProfile, RateProfileError
from .rules import mup_param_groups
from .trainer import FLeRMTrainer

__all__ = [
    "FLeRMCallback",
    "FLeRMConfig",
    "FLeRMTrainer",
    "Measurement",
    "Plan",
    "RateProfile",
    "RateProfileError",
    "log_alignments",
    "map_profile",
    "match_rates",
    "measure_rates",
    "mup_param_groups",
    "plan",
]
