"""One thread, no network, and a cache of its own for every test session."""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in ("URI", "USERNAME", "PASSWORD"):
    os.environ.pop(f"MLFLOW_TRACKING_{_name}", None)  # nobody's server gets the runs of tests
os.environ.pop("MLFLOW_EXPERIMENT_NAME", None)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _scores_are_read_back():
    """Whatever run a test makes, its scores.json says what the value that is read from it says, byte for byte."""
    from finetune.runs.folder import RunFolder

    write = RunFolder.write_text

    def checked(run, name, text):
        write(run, name, text)
        if name == "scores.json":
            again = json.dumps(run.scores.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
            assert again == text, f"{run} loses something on the way"

    RunFolder.write_text = checked
    yield
    RunFolder.write_text = write


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_user(tmp_path_factory):
    """Fixtures of modules are made before those of a test, and are not to find what other versions have kept."""
    os.environ["FINETUNE_CACHE"] = str(tmp_path_factory.mktemp("session-cache"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared images and backbones, or a skip that says so."""
    folder = Path(os.environ.get("FINETUNE_SHARED", Path(__file__).parents[1].parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared material at {folder}; set FINETUNE_SHARED")
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """Three classes of 24 drawn images each, as one tree of class folders."""
    return draw_shapes(tmp_path_factory.mktemp("images") / "shapes", per_class=24)


def draw_shapes(folder: Path, *, per_class: int, pixels: int = 40) -> Path:
    """Discs, squares and stripes of random place and colour; easy, but not trivial."""
    import numpy as np
    from PIL import Image, ImageDraw

    random = np.random.default_rng(0)
    for label in ("disc", "square", "stripes"):
        (folder / label).mkdir(parents=True)
        for number in range(per_class):
            image = Image.fromarray(random.integers(0, 90, (pixels, pixels, 3), dtype=np.uint8))
            brush, colour = ImageDraw.Draw(image), tuple(int(v) for v in random.integers(120, 255, 3))
            x, y, size = (int(v) for v in (*random.integers(2, 16, 2), random.integers(12, 22)))
            if label == "disc":
                brush.ellipse((x, y, x + size, y + size), fill=colour)
            elif label == "square":
                brush.rectangle((x, y, x + size, y + size), fill=colour)
            else:
                for row in range(y, y + size, 5):
                    brush.line((x, row, x + size, row), fill=colour, width=2)
            image.save(folder / label / f"{number:02}.png")
    return folder


def role_of(number):
    """The role of the image of this number in its class: ten train, five val, three calibrate, the rest test."""
    return "train" if number < 10 else "val" if number < 15 else "calibration" if number < 18 else "test"
