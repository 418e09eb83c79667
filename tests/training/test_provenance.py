"""A profile tells where its rates come from."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import datasets
from safetensors import safe_open

from hf_flerm import FLeRMConfig, Research
from hf_flerm.model.names import tensor_kinds, trainable_parameters
from hf_flerm.profile.rate_profile import PROFILE_NAME
from tests.shared.training import Rows, gpt2, lora, make_trainer, recorded


def test_provenance(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"input_ids": Rows().tokens.tolist(), "labels": Rows().tokens.tolist()})
    config = FLeRMConfig(seed=7, research=Research(probes=2, probe_batch_size=3))
    trainer = make_trainer(tmp_path, lora(), config, data=data, max_steps=1, warmup_steps=0, seed=5)
    trainer.train()
    metadata = trainer.rate_profile.metadata
    assert set(metadata) == {
        "packages",
        "model",
        "model_config",
        "adapters",
        "optimizer",
        "param_groups",
        "training_arguments",
        "flerm",
        "dataset_fingerprint",
        "largest_change",
        "shapes",
        "kinds",
    }
    packages = ("hf_flerm", "torch", "transformers", "peft", "accelerate")
    assert metadata["packages"] == {name: version(name) for name in packages}
    assert metadata["model"] == "PeftModel"
    assert metadata["model_config"]["n_embd"] == 16
    assert metadata["adapters"]["default"]["r"] == 2
    assert metadata["adapters"]["default"]["target_modules"] == ["attn.c_attn", "mlp.c_proj"]
    assert metadata["optimizer"]["class"] == "AdamW"
    assert metadata["optimizer"]["lr"] == 1e-2
    known = metadata["training_arguments"]
    assert (known["learning_rate"], known["lr_scheduler_type"], known["seed"]) == (1e-2, "linear", 5)
    assert {key: metadata["flerm"][key] for key in ("mode", "estimator", "probes", "probe_batch_size", "seed")} == {
        "mode": "record",
        "estimator": "per_example",
        "probes": 2,
        "probe_batch_size": 3,
        "seed": 7,
    }
    parameters = trainable_parameters(trainer.model)
    assert metadata["shapes"] == {name: list(parameter.shape) for name, parameter in parameters.items()}
    assert metadata["kinds"] == {name: kind for name, kind in tensor_kinds(trainer.model).items() if name in parameters}
    with safe_open(tmp_path / PROFILE_NAME, framework="pt") as file:
        written = json.loads(file.metadata()["hf_flerm"])
    joint = {
        key: {path: row.tolist() for path, row in rows.items()}
        for key, rows in trainer.rate_profile.joint_rates.items()
    }
    assert written == {"schema_version": 1, "joint_rates": joint, **metadata}


def test_the_fingerprint_tells_data_sets_apart(folder: Path) -> None:
    def fingerprint(seed: int) -> str:
        tokens = Rows(seed=seed).tokens.tolist()
        data = datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})
        return recorded(folder, gpt2(), data=data, max_steps=1).metadata["dataset_fingerprint"]

    assert fingerprint(0) == fingerprint(0) != fingerprint(1)
