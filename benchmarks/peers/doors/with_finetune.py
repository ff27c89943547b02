"""Ours: `finetune train FOLDER backbone=NAME`, at defaults, as a probe, or with the wishes of a variant.

The folder holds `train/` and `test/`; the run scores the test images itself, and its answers are taken from the run
folder. So its time until fitted includes that judgement, of the trained model and of the probe. The cache of
features is empty.
"""

import os
import runpy
import sys

import numpy as np
from door import Task, read_task

WISHES = {"defaults": [], "probe": ["train.strategy=probe"]}


def train(task: Task) -> None:
    runs = task.out / "runs"
    os.environ |= {"FINETUNE_CACHE": str(task.out / "cache"), "FINETUNE_RUNS": str(runs)}
    # user code
    words = ["train", str(task.cell), f"backbone={task.weights.name}", f"seed={task.seed}", *WISHES[task.variant]]
    # end of user code
    words += [f"data.image_size={task.pixels}"] if task.pixels != task.config["pretrained_cfg"]["input_size"][1] else []
    words += [f"train.epochs={task.epochs}"] if task.epochs and task.variant != "probe" else []
    words += ["train.optimizer.learning_rate=0.001"] if task.misspelt else []
    if task.resume:
        words = ["resume", str(next(path for path in runs.iterdir() if (path / "recipe.yaml").exists()))]
    sys.argv = ["finetune", *words]
    try:
        runpy.run_module("finetune", run_name="__main__", alter_sys=True)
    except SystemExit as leave:
        if leave.code:
            raise


def answers(task: Task) -> None:
    run = max((task.out / "runs").glob("*/predictions.npz")).parent
    with np.load(run / "predictions.npz") as stored:
        probabilities = stored["test_probabilities"]
        told = [str(name) for name in stored["test_names"]]
    names = [name.removeprefix("test/") for name in told]
    classes = (run / "classes.txt").read_text(encoding="utf-8").splitlines()
    task.write(names, probabilities, classes, ("finetune", "timm", "torch"))


if __name__ == "__main__":
    task = read_task()
    task.watch_torch()
    train(task)
    task.mark_fitted()
    answers(task)
