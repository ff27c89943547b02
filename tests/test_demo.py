"""The demo as a newcomer runs it: a whole process, offline, tracked."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from finetune.demo import NAMES, PIXELS, draw_digits


def test_the_digits_that_we_ship_are_scikit_learns_and_are_drawn_once(tmp_path):
    from sklearn.datasets import load_digits

    digits, folder = load_digits(), draw_digits(tmp_path / "digits")
    found = {int(path.stem): path for path in folder.rglob("*.png")}
    assert len(found) == len(digits.target) == 1797
    for number in range(0, 1797, 7):
        grey = Image.fromarray(np.round(digits.images[number] / 16 * 255).astype(np.uint8))
        drawn = np.asarray(Image.open(found[number]))
        assert found[number].parent.name == NAMES[digits.target[number]]
        np.testing.assert_array_equal(drawn, grey.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))
    found[0].unlink()
    draw_digits(folder)
    assert not found[0].exists()


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
