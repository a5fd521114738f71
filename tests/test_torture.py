"""The short form of scripts/torture.py on a tiny model: killed, interrupted and concurrent runs end like undisturbed ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_judges import uncalibrated

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="children, limits and /proc of Linux")
def test_a_disturbed_run_ends_as_the_undisturbed_one(tiny_folder, tmp_path):
    (tmp_path / "train.txt").write_text("nurse\nchef\n")
    (tmp_path / "test.txt").write_text("carpenter\nperson\n")
    command = [sys.executable, "scripts/torture.py", "--short"]
    command += [f"model.path={tiny_folder}", "detector=whole", "loss.face=null", "prompts.template='a photo of {}'"]
    command += [f"audit.judge.path={uncalibrated(tmp_path / 'judge')}"]
    command += [f"prompts.{name}={tmp_path / f'{name}.txt'}" for name in ("train", "test")]
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.endswith("all as undisturbed\n"), ended.stdout + ended.stderr
