"""The demo as a newcomer runs it: a whole process, offline, tracked."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_demo_fine_tunes_beats_its_control_and_says_how_to_look(tmp_path):
    env = {**os.environ, "FINETUNE_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, "-m", "finetune", "demo", "--json", "--runs", str(tmp_path / "runs")]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True, timeout=500)
    found = json.loads(done.stdout)
    final, control = (part["scores"]["test"]["top1"] for part in (found, found["control"]))
    assert found["plan"]["stages"]
    assert final["low"] > control["high"]
    assert final["low"] > 0.9
    assert "from random" in done.stderr
    assert "MLflow UI" in done.stderr
