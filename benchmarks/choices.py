"""Small experiments behind some defaults, as told in LOG.md: which epoch to keep, how fast the backbone moves,
how many of its stages move, how sure the head begins, and how the probe scales its features.

    python benchmarks/choices.py keep  [--shared ../shared]     # a row per cell and rule, some minutes
    python benchmarks/choices.py ratio [--shared ../shared]
    python benchmarks/choices.py ladder [--shared ../shared]
    python benchmarks/choices.py depth [--shared ../shared]
    python benchmarks/choices.py budget [--shared ../shared]
    python benchmarks/choices.py size [--shared ../shared]
    python benchmarks/choices.py far [--shared ../shared]
    python benchmarks/choices.py soften [--shared ../shared]
    python benchmarks/choices.py scale [--shared ../shared]
    python benchmarks/choices.py whiten [--shared ../shared]

Cells are those of `advice.py`, with seed 0.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import advice
import torch

HERE = Path(__file__).resolve().parent
BACKBONE = advice.BACKBONES[0]
CLASSES = {"ants_bees": 2, "flowers5": 5, "sign_digits": 10, "malaria": 2, "cifar10_20k": 10}
RATIO_CELLS = (("flowers5", 20), ("ants_bees", 50), ("sign_digits", 20), ("malaria", 50))


def train(name: str, per_class: int, wishes: list[str], shared: Path, work: Path, *, share: float = 1) -> Any:
    import finetune as ft

    epochs = round(share * min(20, max(3, round(advice.BUDGET / (0.85 * per_class * CLASSES[name])))))
    more = ["augment.preset=light", "train.batch_norm=frozen", f"train.epochs={epochs}", *wishes]
    recipe = advice.cell_recipe(name, BACKBONE, per_class, 0, shared, work, more)
    return ft.train(recipe, runs=work / "runs", say=lambda text: None)


def percent(scores: dict) -> str:
    return f"{100 * scores['test']['top1']['value']:.1f}"


def compare_ratios(shared: Path, work: Path) -> None:
    for name, per_class in RATIO_CELLS:
        row, probe = [], ""
        for strategy in ("partial", "full"):
            for ratio in (0.1, 0.3, 1):
                wishes = [f"train.strategy={strategy}", f"train.optimizer.backbone_lr_ratio={ratio}"]
                scores = train(name, per_class, wishes, shared, work).read_json("scores.json")
                probe = percent(scores["probe"])
                row.append(percent(scores))
        print(f"| `{name}`, {per_class} | {probe} | {' | '.join(row)} |", flush=True)


def compare_ladders(shared: Path, work: Path) -> None:
    ladders = (("partial", 0.3, 1), ("partial", 1, 1), ("full", 0.3, 1), ("full", 1, 0.65), ("full", 1, 0.5),
               ("full", 0.6, 0.75))  # fmt: skip
    for per_class in (20, 400):
        for name in advice.SETS:
            row, probe = [], ""
            for strategy, ratio, decay in ladders:
                wishes = [f"train.strategy={strategy}", f"train.optimizer.backbone_lr_ratio={ratio}"]
                scores = train(name, per_class, [*wishes, f"train.optimizer.layer_decay={decay}"], shared, work)
                probe, row = percent(scores.read_json("scores.json")["probe"]), [
                    *row, percent(scores.read_json("scores.json"))]  # fmt: skip
            print(f"| `{name}`, {per_class} | {probe} | {' | '.join(row)} |", flush=True)


def compare_depths(shared: Path, work: Path) -> None:
    """How many stages train, and how fast: accuracy, and processor time over that of training all eight."""
    variants = [("full", None, 0.3), ("full", None, 0.5)]
    variants += [
        ("partial", depth, ratio) for depth, ratio in ((3, 1), (5, 0.5), (6, 0.3), (6, 0.5), (6, 0.7), (7, 0.5))
    ]
    for per_class in (20, 5, 50, 400):
        for name in advice.SETS:
            row, whole = [], 0.0
            for strategy, depth, ratio in variants:
                wishes = [f"train.strategy={strategy}", f"train.optimizer.backbone_lr_ratio={ratio}"]
                began = time.process_time()
                run = train(name, per_class, [*wishes, *([f"train.depth={depth}"] if depth else [])], shared, work)
                spent = time.process_time() - began
                whole = whole or spent
                row.append(f"{percent(run.read_json('scores.json'))} ({spent / whole:.2f})")
            print(f"| `{name}`, {per_class} | {' | '.join(row)} |", flush=True)


def compare_budgets(shared: Path, work: Path) -> None:
    """Half of the epochs, and smaller batches at a rate that follows their root: accuracy, and processor time."""
    for per_class in (20, 5):
        for name in advice.SETS:
            row, whole = [], 0.0
            for share, batch in ((1, 64), (1, 32), (1, 16), (0.5, 64), (0.5, 16)):
                wishes = ["train.strategy=full", f"train.batch_size={batch}"]
                if batch < 64:
                    wishes.append(f"train.optimizer.lr={1e-3 * (batch / 64) ** 0.5:g}")
                began = time.process_time()
                run = train(name, per_class, wishes, shared, work, share=share)
                spent = time.process_time() - began
                whole = whole or spent
                row.append(f"{percent(run.read_json('scores.json'))} ({spent / whole:.2f})")
            print(f"| `{name}`, {per_class} | {' | '.join(row)} |", flush=True)


def compare_sizes(shared: Path, work: Path) -> None:
    """A default run of a whole set at the size it is judged at, and trained at a sixth less."""
    import finetune as ft

    for name, large, small in (("malaria", 96, 80), ("flowers5", 128, 112), ("sign_digits", 96, 80)):
        row = []
        for pixels in (large, small):
            wishes = [f"data.root={shared / 'data' / name}", f"backbone={BACKBONE}", f"data.image_size={pixels}"]
            wishes += [f"evaluate.views=center@{large}", "seed=0", "tracking.enabled=false"]
            began = time.process_time()
            run = ft.train(ft.load_recipe(None, wishes), runs=work / "runs", say=lambda text: None)
            row.append(f"{percent(run.read_json('scores.json'))} ({time.process_time() - began:.0f} s)")
        print(f"| `{name}` | {' | '.join(row)} |", flush=True)


def compare_far(shared: Path, work: Path) -> None:
    """Enough images unlike those of pretraining: whether batch norm and the backbone's rate should go further."""
    import finetune as ft

    variants = (("frozen", 0.3), ("train", 1))
    for name in ("malaria", "sign_digits"):
        for backbone in advice.BACKBONES:
            for seed in advice.SEEDS:
                row = []
                for mode, ratio in variants:
                    wishes = ["train.strategy=full", f"train.batch_norm={mode}", "augment.preset=light"]
                    wishes += [f"train.optimizer.backbone_lr_ratio={ratio}"]
                    recipe = advice.cell_recipe(name, backbone, 400, seed, shared, work, wishes)
                    run = ft.train(recipe, runs=work / "runs", say=lambda text: None)
                    row.append(percent(run.read_json("scores.json")))
                print(f"| `{name}`, {backbone.partition('.')[2]}, {seed} | {' | '.join(row)} |", flush=True)


def compare_epochs(shared: Path, work: Path) -> None:
    """Keep every epoch, and ask of each what val and test say of it; a row per cell."""
    from finetune.compute import PLAIN
    from finetune.data.loading import Batches
    from finetune.features.survey import look
    from finetune.inference.loading import load_final
    from finetune.training.module import measure_loss
    from finetune.training.snapshots import load_member, read_members
    from finetune.training.watching import is_clearly_higher

    for per_class in (20, 50, 400):
        for name in advice.SETS:
            wishes = ["train.strategy=partial", "train.checkpoint=last", "train.averaging.keep_last=20"]
            run = train(name, per_class, wishes, shared, work)
            seen = look(advice.cell_recipe(name, BACKBONE, per_class, 0, shared, work, []))
            images = seen.dataset
            judges = [
                Batches(images.store, images.indices(role), images.labels(role).tolist(), batch_size=64,
                        augmentation=None, shuffle=False, seed=0) for role in ("val", "test")
            ]  # fmt: skip
            classifier, found = load_final(run), []
            for member in read_members(run.file("snapshots")):
                load_member(classifier, member)
                found.append([measure_loss(classifier, judge, PLAIN) for judge in judges])
            keys = [lambda one: one.loss, lambda one: one.chosen_by, lambda one: -one.top1]
            kept = [min(found, key=lambda pair, key=key: key(pair[0])) for key in keys]  # type: ignore[misc]
            settled = kept[1] if is_clearly_higher(found[-1][0].losses, kept[1][0].losses) else found[-1]
            probe = percent(run.read_json("scores.json")["probe"])
            told = [f"{100 * pair[1].top1:.1f}" for pair in (*kept, found[-1], settled)]
            print(f"| `{name}`, {per_class} | {len(judges[0].indices)} | {probe} | {' | '.join(told)} |", flush=True)


def compare_softening(shared: Path, work: Path) -> None:
    from finetune.training import setup

    for name in ("sign_digits", "cifar10_20k", "flowers5"):
        row = []
        for strategy in ("full", "partial"):
            for setup.PROBE_SOFTENING in (0.0, 0.1, 0.3, 1.0):
                wishes = [f"train.strategy={strategy}", "head.init=probe"]
                row.append(percent(train(name, 20, wishes, shared, work).read_json("scores.json")))
        print(f"| `{name}`, 20 | {' | '.join(row)} |", flush=True)


def compare_scales(shared: Path, work: Path) -> None:
    from finetune.features import logistic, probing, survey

    for name, per_class in (("flowers5", 5), ("flowers5", 20), ("sign_digits", 5), ("sign_digits", 20),
                            ("sign_digits", 50), ("malaria", 50), ("ants_bees", 20), ("cifar10_20k", 5)):  # fmt: skip
        recipe = advice.cell_recipe(name, BACKBONE, per_class, 0, shared, work, ["train.strategy=probe"])
        seen, row = survey.look(recipe), []
        parts = [(seen.features(role), seen.dataset.labels(role)) for role in ("train", "val", "test")]
        features, labels = (torch.cat([parts[0][k], parts[1][k]]) for k in (0, 1))
        for logistic.SHRUNK_IMAGES in (0.0, 30.0, 100.0, 1000.0, 1e12):
            right = [
                (probing.fit_probe(features, labels, num_classes=CLASSES[name], l2=l2).logits(parts[2][0]).argmax(1)
                 == parts[2][1]).double().mean()
                for l2 in (1e-3, 1e-2, 0.1, 1.0, 10.0)
            ]  # fmt: skip
            row.append(f"{100 * float(max(right)):.1f}")
        print(f"| `{name}`, {per_class} | {' | '.join(row)} |", flush=True)


def compare_whitening(shared: Path, work: Path) -> None:
    from finetune.features.layer_profile import neighbours_left_out
    from finetune.features.survey import look
    from finetune.metrics.projection import fit_projection

    for name in ("ants_bees", "sign_digits", "malaria", "flowers5"):
        recipe = advice.cell_recipe(
            name, BACKBONE, 400, 0, shared, work, ["train.strategy=probe", "data.image_size=96"]
        )
        seen = look(recipe)
        features, labels = seen.features("train"), seen.dataset.labels("train")
        rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:1000]
        features, labels = features[rows], labels[rows]
        made = [features, features - features.mean(0)]
        made += [fit_projection(features, keep=k, whiten=w).apply(features) for k in (0.9, 0.99) for w in (False, True)]
        votes = [neighbours_left_out(part.float(), labels, num_classes=CLASSES[name], k=10) for part in made]
        cells = " | ".join(f"{100 * float((vote == labels).double().mean()):.1f}" for vote in votes)
        print(f"| `{name}` | {cells} |", flush=True)


EXPERIMENTS = {
    "keep": compare_epochs,
    "ratio": compare_ratios,
    "ladder": compare_ladders,
    "depth": compare_depths,
    "budget": compare_budgets,
    "size": compare_sizes,
    "far": compare_far,
    "soften": compare_softening,
    "scale": compare_scales,
    "whiten": compare_whitening,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(EXPERIMENTS))
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--work", type=Path, default=HERE / "advice")
    arguments = parser.parse_args()
    shared, work = arguments.shared.resolve(), arguments.work.resolve()
    os.environ |= {"FINETUNE_ZOO": str(shared / "zoo"), "FINETUNE_CACHE": str(work / "cache")}
    torch.set_num_threads(1)
    EXPERIMENTS[arguments.what](shared, work)


if __name__ == "__main__":
    main()
