"""The script for a GPU runs whole on any machine, and its checks pass there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.shared import ROOT


def test_tiny_models_pass_every_check_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "gpu.py"), "--tiny", "--output", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["device"] == "CPU"
    sections = report["sections"]
    assert all(0 < found["log_error"] < 0.1 and found["fallen_back"] == 0 for found in sections["rates"])
    assert len(sections["training"]) == 4
    assert all(found["difference_of_a_recorded_run"] == 0 for found in sections["training"])
    assert [found["method"] for found in sections["cost"]] == ["LoRA r = 16", "full"]
    assert all(found["measured_step_per_step"] > 1 for found in sections["cost"])
    assert [found["init"] for found in sections["transfer"]] == ["gaussian", "default"]
    rows = [line for line in (tmp_path / "gpu.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == sum(1 + len(found) for found in sections.values())
