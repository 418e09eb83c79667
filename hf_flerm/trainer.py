"""`FLeRMTrainer`: a `Trainer` that records or matches function-space learning rates; a mixin for other trainers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from huggingface_hub.constants import REPOCARD_NAME
from torch.utils.data import Dataset
from transformers import Trainer

from .config import FLeRMConfig
from .engines import engine_of
from .optimizer.param_groups import raw_optimizer
from .planning.plan import Plan, plan
from .planning.sweep.sweep import Sweep, sweep
from .profile.rate_profile import PROFILE_NAME, RateProfile, shared_files
from .training.callback import FLeRMCallback

_Base: Any = Trainer if TYPE_CHECKING else object
_OLD_KEY = "flerm_names"  # in param groups in checkpoints of matched runs of version 0.1


class FLeRMMixin(_Base):
    """Adds function-space learning rates to a trainer's class: `class MyTrainer(FLeRMMixin, SFTTrainer)`.

    Args:
        *args: Arguments of the trainer's class.
        flerm: The options; see `FLeRMConfig`.
        probe_dataset: Examples to probe with, prepared like the training set. None: examples of the training set.
        **kwargs: Keyword arguments of the trainer's class.

    Raises:
        RateProfileError: If the profile to match cannot be loaded.
    """

    def __init__(
        self, *args: Any, flerm: FLeRMConfig, probe_dataset: Dataset[Any] | None = None, **kwargs: Any
    ) -> None:
        self._flerm = FLeRMCallback(flerm, probe_dataset)
        super().__init__(*args, **kwargs)
        self._flerm.add_to(self)

    @property
    def flerm_callback(self) -> FLeRMCallback:
        """The callback that measures and matches."""
        return self._flerm

    @property
    def rate_profile(self) -> RateProfile:
        """The rates that this run has measured so far."""
        return self._flerm.rate_profile

    def plan(self, profile: RateProfile | str | None = None, **options: Any) -> Plan:
        """Estimate the learning rate that this training needs, before it begins; nothing here changes.

        Args:
            profile: Profile of the base: a `RateProfile`, a folder, a file, or a repository on the Hub. None: no base.
            **options: `steps`, `looks` and further keyword arguments of `hf_flerm.plan`.

        Raises:
            RateProfileError: If the profile does not fit the model, or holds no joint rates.
            ValueError: If nothing could be measured, or several processes run.
        """
        return plan(self, profile=profile, **options)

    def sweep(self, **options: Any) -> Sweep:
        """Find the best learning rate of this training by training copies of the model; nothing here changes.

        Args:
            **options: `folder`, `around`, `seeds`, `refine` and further keyword arguments of `hf_flerm.sweep`.

        Raises:
            ValueError: If an option is not allowed, every run diverged, or several processes run.
        """
        return sweep(self, **options)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train like `Trainer`; FLeRM's hooks are removed from the optimizer at the end, also after an exception."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._flerm.close()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer like `Trainer`; to match, DeepSpeed ZeRO needs one param group for each tensor."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._flerm.config.mode == "match":
            engine = engine_of(self.model)
            engine.check(self._flerm.config.research.estimator)
            engine.prepare_optimizer(raw_optimizer(optimizer))
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save like `Trainer`, with `rate_profile.safetensors` beside the weights."""
        if self.args.should_save:
            self._flerm.save(str(output_dir if output_dir is not None else self.args.output_dir))
        super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card like `Trainer`, with a section on the profile and its figure beside it."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero() or not self._flerm.has_begun:
            return
        folder = Path(str(self.args.output_dir))
        address = self.hub_model_id or folder.name
        files = shared_files(self.rate_profile, address, ModelCard.load(folder / REPOCARD_NAME))
        for name, content in files.items():
            if name != PROFILE_NAME:
                (folder / name).write_bytes(content)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._flerm.resume_from(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        for group in getattr(self.optimizer, "param_groups", ()):
            group.pop(_OLD_KEY, None)


class FLeRMTrainer(FLeRMMixin, Trainer):
    """`Trainer` with function-space learning rates.

    Args:
        *args: Arguments of `transformers.Trainer`.
        flerm: The options; see `FLeRMConfig`.
        probe_dataset: Examples to probe with. None: examples of the training set.
        **kwargs: Keyword arguments of `transformers.Trainer`.

    Raises:
        RateProfileError: If the profile to match cannot be loaded.
    """
