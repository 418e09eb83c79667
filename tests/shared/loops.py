"""A training loop that is nobody's `Trainer`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from hf_flerm import FLeRMConfig, FLeRMRun
from tests.shared.training import BATCH, STEPS, Rows

LEARNING_RATE = 1e-2


class Loop:
    """A training of `STEPS` steps at most, with a decaying learning rate; the order of the data is fixed."""

    def __init__(
        self,
        model: nn.Module,
        *,
        accelerated: bool = False,
        accumulation: int = 1,
        weight_decay: float = 0.1,
        batch: int = BATCH,
        shards: FullyShardedDataParallelPlugin | None = None,
    ) -> None:
        self.model: Any = model
        self.optimizer: Any = AdamW(model.parameters(), LEARNING_RATE, eps=1e-4, weight_decay=weight_decay)
        self.schedule: Any = LambdaLR(self.optimizer, lambda step: 1 - step / STEPS)
        self.loader: Any = DataLoader(Rows(BATCH * STEPS), batch)
        self.backward: Callable[[Tensor], None] = Tensor.backward
        self.block: Callable[[], Any] = contextlib.nullcontext
        self.accumulation = accumulation
        if accelerated:
            self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, fsdp_plugin=shards)
            self.model, self.optimizer, self.loader = self.accelerator.prepare(model, self.optimizer, self.loader)
            self.backward = self.accelerator.backward
            self.block = lambda: self.accelerator.accumulate(self.model)

    def follow(self, config: FLeRMConfig | None = None, **options: Any) -> FLeRMRun:
        return FLeRMRun(self.model, self.optimizer, config or FLeRMConfig(), self.loader, **options)

    def train(self, run: FLeRMRun | None = None, start: int = 0, stop: int = STEPS) -> list[float]:
        losses = []
        torch.manual_seed(1)  # dropout
        for step, batch in enumerate(self.loader):
            if not start <= step < stop:
                continue
            with self.block():
                loss = self.model(**batch, num_items_in_batch=batch["labels"].numel()).loss  # as a Trainer does
                self.backward(loss)
                with contextlib.nullcontext() if run is None else run.step():
                    self.optimizer.step()
                if self.accumulation == 1 or self.accelerator.sync_gradients:
                    self.schedule.step()
                self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses
