"""The demo: real handwritten digits, few labels, the bundled backbone, and random weights beside it."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.config.backbone_names import cache_folder, default_backbone
from finetune.config.reading import load_recipe
from finetune.pipeline import Summary, summarize, train
from finetune.preparing import say_on_stderr
from finetune.reporting.text import percent
from finetune.runs.folder import runs_folder

LABELLED_PER_CLASS = 30
"""Digits of each class that the user has labelled; val and calibration are cut from them."""
PIXELS = 64
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Demo(Summary):
    """The first run, and the same from random weights."""

    control: Summary


def run_demo(runs: Path | None = None) -> Demo:
    """Fine-tune on the digits, then the same budget from random weights; the first run with both scores."""
    folder = _find_digits(runs or runs_folder())
    wish = [f"data.root={folder}", f"backbone={default_backbone()}", "name=digits"]
    run = train(load_recipe(None, wish), runs=runs)
    found = summarize(run)
    epochs = run.plan.epochs or 10
    say_on_stderr("\nThe same images and epochs from random weights, as a control:")
    control = summarize(
        train(
            load_recipe(
                None,
                [
                    *wish,
                    "name=digits-control",
                    "pretrained=false",
                    f"train.epochs={epochs}",
                    f"train.patience={epochs}",
                ],
            ),
            runs=runs,
            say=lambda text: None,
        )
    )
    lines = ["", "test images right, 95 % intervals"]
    for name, part in (
        ("fine-tuned", found.scores),
        ("probe alone", found.scores.probe),
        ("from random", control.scores),
    ):
        if part is not None and part.test is not None:
            lines.append(f"  {name:<12} {percent(part.test.top1)}")
    where = "" if runs is None else f" --runs {runs}"
    lines += ["", f"report     {found.report}", f"MLflow UI  {_command()} ui{where}"]
    say_on_stderr("\n".join(lines))
    return Demo(**dict(found), control=control)


def _find_digits(runs: Path) -> Path:
    """The images, in the cache, or beside the runs where the cache cannot be written to."""
    try:
        return draw_digits(cache_folder() / "demo" / "digits")
    except OSError as fault:
        say_on_stderr(f"{fault.filename}: {fault.strerror}; the digits are drawn in {runs / 'demo-digits'} instead.")
        return draw_digits(runs / "demo-digits")


def _command() -> str:
    """How this tool is called from here: by its name, or by its path where it is not on PATH."""
    if shutil.which("finetune"):
        return "finetune"
    path = Path(sys.executable).with_name("finetune")
    return os.path.relpath(path) if path.exists() else f"{sys.executable} -m finetune"


def draw_digits(folder: Path) -> Path:
    """The 1,797 digits that we ship (assets/LICENSES.txt) as PNG files in train/ and test/ class folders, once."""
    marker = folder / "drawn.json"
    if marker.exists():
        return folder
    with np.load(Path(__file__).parent / "assets" / "digits.npz") as digits:
        images, labels = digits["images"], digits["labels"]  # (1797, 8, 8) of 0 to 16, and (1797,)
    seen = dict.fromkeys(range(10), 0)
    # In the set's own order the writers change; a user's labelled images are a sample of all of them.
    for number in np.random.default_rng(0).permutation(len(labels)):
        pixels, label = images[number], labels[number]
        role = "train" if seen[int(label)] < LABELLED_PER_CLASS else "test"
        seen[int(label)] += 1
        path = folder / role / NAMES[int(label)] / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        image.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(path)
    marker.write_text(json.dumps({"images": len(labels)}), encoding="utf-8")
    return folder
