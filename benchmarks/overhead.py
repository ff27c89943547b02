"""What the apparatus costs: an epoch of `fit`, with all that is watched by default, over a bare loop of the same steps.

    python benchmarks/overhead.py [--shared ../shared]     # some minutes; writes results/overhead.md

Both take the same batches through the same classifier with the same optimizer and clipping; the bare loop does nothing
else. Processor time of the training steps of an epoch (the look at val after it is left out), in alternating rounds,
one thread; the median of the ratios.
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BACKBONE, PIXELS, ROUNDS = "mobilenetv2_100.imagenet_keras", 96, 5


def prepare(shared: Path) -> tuple[Any, Any, Any, Any]:
    """The plan, a maker of classifiers, and batches."""
    import finetune as ft
    from finetune.features.survey import look
    from finetune.recipe.planning import make_plan
    from finetune.training.starting import make_batches, make_classifier

    wishes = [f"data.root={shared / 'data' / 'sign_digits'}", f"backbone={BACKBONE}", f"data.image_size={PIXELS}"]
    wishes += ["train.strategy=full", "data.invariances=[]", "train.epochs=1", "data.max_train_per_class=80"]
    recipe = ft.load_recipe(None, wishes)
    seen = look(recipe)
    plan = make_plan(recipe, seen.facts)
    assert seen.probe is not None
    probe = {"weight": seen.probe.weight.float(), "bias": seen.probe.bias.float()}

    def make() -> Any:
        return make_classifier(plan, copy.deepcopy(seen.backbone), probe, seen.facts.counts["train"])

    return plan, make, *make_batches(plan, seen)


def fit_epoch(plan: Any, classifier: Any, train: Any, val: Any) -> float:
    from finetune.training import fitting, keeping
    from finetune.training.watching import Curves

    times: list[float] = []
    start, end = keeping.Keeper.on_train_epoch_start, keeping.Keeper.on_train_epoch_end

    def on_start(keeper: Any, trainer: Any, module: Any) -> None:
        start(keeper, trainer, module)
        times.append(time.process_time())

    def on_end(keeper: Any, trainer: Any, module: Any) -> None:
        times.append(time.process_time())
        end(keeper, trainer, module)

    keeping.Keeper.on_train_epoch_start, keeping.Keeper.on_train_epoch_end = on_start, on_end  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as name:
            here = Path(name)
            fitting.fit(plan, 0, classifier, train, val, here, Curves(here / "curves.csv"), members=here,
                        say=lambda text: None, notify=lambda: None)  # fmt: skip
    finally:
        keeping.Keeper.on_train_epoch_start, keeping.Keeper.on_train_epoch_end = start, end  # type: ignore[method-assign]
    return times[1] - times[0]


def loop_epoch(plan: Any, classifier: Any, train: Any) -> float:
    import torch
    import torch.nn.functional as F

    from finetune.training.optimization import make_optimizer

    classifier.freeze(plan.stages[0].trainable_stages, batch_norm=plan.stages[0].batch_norm)
    optimizer = make_optimizer(classifier, plan.stages[0], plan.train.optimizer)
    classifier.train()
    train.set_epoch(0)
    began = time.process_time()
    for images, labels, _ in train:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(classifier(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    shared = parser.parse_args().shared.resolve()
    os.environ["FINETUNE_ZOO"] = str(shared / "zoo")
    import torch

    from finetune.machine import tune_process

    tune_process()
    torch.set_num_threads(1)
    plan, make, train, val = prepare(shared)
    loop_epoch(plan, make(), train)  # decodes and warms up
    ratios = [fit_epoch(plan, make(), train, val) / loop_epoch(plan, make(), train) for _ in range(ROUNDS)]
    text = (
        f"An epoch of `fit` takes {statistics.median(ratios):.3f} times the processor time of a bare loop of the same "
        f"{len(train)} steps (median of {ROUNDS} alternating rounds, {min(ratios):.3f} to {max(ratios):.3f}; {PIXELS} "
        "px, 64 images per step; `python benchmarks/overhead.py`)."
    )
    (HERE / "results" / "overhead.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
