"""What the apparatus costs: `fit`, with all that is watched by default, over a bare loop of the same steps.

    python benchmarks/overhead.py [--shared ../shared]     # some minutes; writes results/overhead.md

Both take the same batches through the same classifier with the same optimizer and clipping; the bare loop does nothing
else but look at val after each epoch. Told twice: the steps alone, and the whole of it, where `fit` also measures val,
counts units that never fire, keeps the best weights and writes a checkpoint. Processor time in alternating rounds, one
thread; the median of the ratios.
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
BACKBONE, PIXELS, EPOCHS, ROUNDS = "mobilenetv2_100.imagenet_keras", 96, 4, 5


def prepare(shared: Path) -> tuple[Any, Any, Any, Any]:
    """The plan, a maker of classifiers, and batches."""
    import finetune as ft
    from finetune.features.survey import look
    from finetune.planning.planner import make_plan
    from finetune.training.setup import make_batches, make_classifier

    wishes = [f"data.root={shared / 'data' / 'sign_digits'}", f"backbone={BACKBONE}", f"data.image_size={PIXELS}"]
    wishes += ["train.strategy=full", "data.invariances=[]", f"train.epochs={EPOCHS}", "data.max_train_per_class=80"]
    recipe = ft.load_recipe(None, wishes)
    seen = look(recipe)
    plan = make_plan(recipe, seen.facts)
    assert seen.probe is not None
    probe = {"weight": seen.probe.weight.float(), "bias": seen.probe.bias.float()}

    def make() -> Any:
        return make_classifier(plan, copy.deepcopy(seen.backbone), probe, seen.facts.counts["train"])

    return plan, make, *make_batches(plan, seen.dataset)


def time_fit(plan: Any, classifier: Any, train: Any, val: Any) -> tuple[float, float]:
    """Seconds of the steps alone, and of everything."""
    from finetune.training import checkpoints, fit
    from finetune.training.watching import Curves

    times: list[float] = []
    start, end = checkpoints.Keeper.on_train_epoch_start, checkpoints.Keeper.on_train_epoch_end

    def on_start(keeper: Any, trainer: Any, module: Any) -> None:
        start(keeper, trainer, module)
        times.append(-time.process_time())

    def on_end(keeper: Any, trainer: Any, module: Any) -> None:
        times.append(time.process_time())
        end(keeper, trainer, module)

    checkpoints.Keeper.on_train_epoch_start, checkpoints.Keeper.on_train_epoch_end = on_start, on_end  # type: ignore[method-assign]
    began = time.process_time()
    try:
        with tempfile.TemporaryDirectory() as name:
            here = Path(name)
            fit.fit(plan, 0, classifier, train, val, here, Curves(here / "curves.csv"), members=here,
                        say=lambda text: None, notify=lambda: None)  # fmt: skip
    finally:
        checkpoints.Keeper.on_train_epoch_start, checkpoints.Keeper.on_train_epoch_end = start, end  # type: ignore[method-assign]
    return sum(times), time.process_time() - began


def time_loop(plan: Any, classifier: Any, train: Any, val: Any) -> tuple[float, float]:
    """The same of a bare loop."""
    import torch
    import torch.nn.functional as F

    from finetune.training.optimization import make_optimizer

    spent = 0.0
    whole = time.process_time()
    classifier.freeze(plan.stages[0].trainable_stages, batch_norm=plan.stages[0].batch_norm)
    optimizer = make_optimizer(classifier, plan.stages[0], plan.train.optimizer)
    for epoch in range(EPOCHS):
        classifier.train()
        train.set_epoch(epoch)
        began = time.process_time()
        for images, labels, _ in train:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(classifier(images), labels).backward()
            torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
        spent += time.process_time() - began
        classifier.eval()
        with torch.inference_mode():
            for images, _, _ in val:
                classifier(images)
    return spent, time.process_time() - whole


def _told(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    shared = parser.parse_args().shared.resolve()
    os.environ["FINETUNE_ZOO"] = str(shared / "zoo")
    import torch

    from finetune.process import tune_process

    tune_process()
    torch.set_num_threads(1)
    plan, make, train, val = prepare(shared)
    time_loop(plan, make(), train, val)  # decodes and warms up
    pairs = [(time_fit(plan, make(), train, val), time_loop(plan, make(), train, val)) for _ in range(ROUNDS)]
    steps, whole = ([own[part] / bare[part] for own, bare in pairs] for part in (0, 1))
    text = (
        f"The steps of `fit` take {_told(steps)} times the processor time of a bare loop of the same "
        f"{EPOCHS * len(train)} steps, and the whole of it, {EPOCHS} looks at val, checkpoints and all, "
        f"{_told(whole)} times that of the loop with a look at val after each epoch (median of {ROUNDS} alternating "
        f"rounds, and the range; {PIXELS} px, 64 images per step; `python benchmarks/overhead.py`)."
    )
    (HERE / "results" / "overhead.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
