"""Engines that cannot be followed are refused before training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from hf_flerm import FLeRMConfig
from tests.shared.training import assert_identical, gpt2, make_trainer, weights_of

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "megatron": ({"distributed_type": DistributedType.MEGATRON_LM}, "Megatron-LM"),
    "xla": ({"distributed_type": DistributedType.XLA}, "XLA"),
    "fsdp1": (
        {"distributed_type": DistributedType.FSDP, "fsdp_plugin": SimpleNamespace(fsdp_version=1)},
        "FSDP1 flattens",
    ),
    "tensor parallel": ({"parallelism_config": SimpleNamespace(tp_enabled=True)}, "tp_size > 1"),
    "context parallel": ({"parallelism_config": SimpleNamespace(cp_enabled=True)}, "cp_size > 1"),
    "sequence parallel": ({"parallelism_config": SimpleNamespace(sp_enabled=True)}, "sp_size > 1"),
}


REFUSED = {engine: (state, rf"{reason}.*Use DDP, FSDP2") for engine, (state, reason) in REFUSED.items()}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
ZERO_3 = {"stage": 3, "zero_hpz_partition_size": 1, "mics_shard_size": -1}


REFUSED |= {
    f"DeepSpeed: {name}": (
        {
            "distributed_type": DistributedType.DEEPSPEED,
            "deepspeed_plugins": SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}, **config}),
        },
        reason,
    )
    for name, config, reason in (
        ("hpZ", {"zero_optimization": ZERO_3 | {"zero_hpz_partition_size": 2}}, "hpz_partition_size'.*Remove it"),
        ("MiCS", {"zero_optimization": ZERO_3 | {"mics_shard_size": 2}}, "mics_shard_size'.*Remove it"),
        ("its optimizer", {"optimizer": {"type": "AdamW"}}, "'optimizer'.*Remove the block"),
        ("its scheduler", {"scheduler": {"type": "WarmupLR"}}, "'scheduler'.*Remove the block"),
        ("offload", {"zero_optimization": OFFLOAD}, r"'zero_optimization\.offload_optimizer'.*set its device to none"),
        ("tensor parallel", {"tensor_parallel": {"autotp_size": 2}}, "'tensor_parallel'.*Remove it"),
    )
}


@pytest.mark.parametrize("engine", REFUSED)
def test_other_engines_are_refused_before_training(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, reason = REFUSED[engine]

    class Pretend(TrainerCallback):
        """Tells of another engine once everything is prepared for this one."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            for key, value in state.items():
                for shared in (AcceleratorState._shared_state, PartialState._shared_state):
                    monkeypatch.setitem(shared, key, value)

    trainer = make_trainer(tmp_path, gpt2(), FLeRMConfig())
    trainer.callback_handler.callbacks.insert(0, Pretend())
    before = weights_of(trainer.model)
    with pytest.raises(ValueError, match=reason):
        trainer.train()
    assert_identical(weights_of(trainer.model), before)
