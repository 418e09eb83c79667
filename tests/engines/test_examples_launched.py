"""The examples run with every file of `accelerate launch`."""

from __future__ import annotations

from pathlib import Path

from accelerate.utils.launch import prepare_multi_gpu_env

from tests.shared.distributed import EXAMPLES, PAIR, SCRIPTS, examples, launched
from tests.shared.processes import launch


def test_every_engine_has_a_file() -> None:
    files = {path.stem for path in (EXAMPLES / "accelerate_configs").glob("*.yaml")}
    assert files == {"ddp", "fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"}


def test_the_examples_run_with_every_config(tmp_path: Path) -> None:
    environments = {}
    for engine in ("ddp", "fsdp2"):
        made = prepare_multi_gpu_env(launched(engine))
        environments[engine] = {k: v for k, v in made.items() if k.startswith(("ACCELERATE_", "FSDP_"))}
    first, second = launch(examples, PAIR, tmp_path, tmp_path, environments)
    assert set(second.values()) == {""}
    for engine, weights, name in (("ddp", "Parameter", "MULTI_CPU"), ("fsdp2", "DTensor", "FSDP")):
        by_trainer, by_loop = (first[engine, script] for script in SCRIPTS)
        assert f"2 processes, {{'{weights}': 28}}" in by_trainer
        assert "base: 2 measurements, target: 2" in by_trainer
        assert f"2 processes ({name}), 2 measurements" in by_loop
        assert "scales from" in by_loop
