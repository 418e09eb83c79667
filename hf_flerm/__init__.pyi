"""Function-space learning rates for Transformers and PEFT: record them on a small run, match them on a big one."""

from .config import FLeRMConfig as FLeRMConfig
from .config import Research as Research
from .planning.plan import Plan as Plan
from .planning.plan import plan as plan
from .planning.sweep.sweep import Sweep as Sweep
from .planning.sweep.sweep import sweep as sweep
from .profile.rate_profile import RateProfile as RateProfile
from .profile.rate_profile import RateProfileError as RateProfileError
from .rates.alignment import log_alignments as log_alignments
from .rates.measurement import Measurement as Measurement
from .rates.probe import measure_rates as measure_rates
from .trainer import FLeRMMixin as FLeRMMixin
from .trainer import FLeRMTrainer as FLeRMTrainer
from .training.arguments import FLeRMArguments as FLeRMArguments
from .training.callback import FLeRMCallback as FLeRMCallback
from .training.run import FLeRMRun as FLeRMRun
from .transfer.mapping import map_profile as map_profile
from .transfer.rules import mup_param_groups as mup_param_groups
from .version import __version__ as __version__
