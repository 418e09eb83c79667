"""Function-space learning rates for Transformers and PEFT: record them on a small run, match them on a big one."""

from .alignment import log_alignments
from .callback import FLeRMCallback
from .config import FLeRMConfig
from .matching import match_rates
from .measurement import Measurement
from .probes import measure_rates
from .rate_profile import RateProfile, RateProfileError
from .trainer import FLeRMTrainer

__all__ = [
    "FLeRMCallback",
    "FLeRMConfig",
    "FLeRMTrainer",
    "Measurement",
    "RateProfile",
    "RateProfileError",
    "log_alignments",
    "match_rates",
    "measure_rates",
]
