"""Function-space learning rates for Transformers and PEFT: record them on a small run, match them on a big one."""

from .alignment import log_alignments as log_alignments
from .arguments import FLeRMArguments as FLeRMArguments
from .callback import FLeRMCallback as FLeRMCallback
from .config import FLeRMConfig as FLeRMConfig
from .mapping import map_profile as map_profile
from .matching import match_rates as match_rates
from .measurement import Measurement as Measurement
from .planning import Plan as Plan
from .planning import plan as plan
from .probes import measure_rates as measure_rates
from .rate_profile import RateProfile as RateProfile
from .rate_profile import RateProfileError as RateProfileError
from .rules import mup_param_groups as mup_param_groups
from .run import FLeRMRun as FLeRMRun
from .trainer import FLeRMMixin as FLeRMMixin
from .trainer import FLeRMTrainer as FLeRMTrainer
from .version import __version__ as __version__
