"""What ten crops cost: processor time of looking at and of preparing ten views of an image, over those of the centre.

    python benchmarks/views.py [--shared ../shared] [--images 128]     # a minute; writes results/views.*

Photographs of `flowers5` at 96 px through a zoo backbone, one thread. Preparing is reading, decoding, resizing and
cutting; looking is normalising and the forward pass. Both are measured in batches as judging makes them, in alternating
rounds; the ratio is that of medians.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BACKBONE, PIXELS, ROUNDS = "mobilenetv2_100.imagenet_keras", 96, 7
VIEWS = ("center", "ten")
TARGETS = {"forward": 10.5, "preparation": 1.3}
"""Ratios that should not be exceeded."""


def gather(shared: Path, count: int, folder: Path) -> Path:
    """A folder of class folders with about `count` of the photographs, the same every time."""
    classes = sorted((shared / "data" / "flowers5" / "test").iterdir())
    for source in classes:
        (folder / source.name).mkdir(parents=True)
        for file in sorted(source.iterdir())[: -(-count // len(classes))]:
            (folder / source.name / file.name).symlink_to(file)
    return folder


def prepare(root: Path) -> tuple[dict[str, Any], Any, list[int]]:
    """Viewers by views, a store that keeps nothing, and its items."""
    import torch

    import finetune as ft
    from finetune.data.loading import ImageStore
    from finetune.features.survey import look
    from finetune.inference.tta_views import Viewer
    from finetune.models.classifier import Classifier
    from finetune.planning.planner import make_plan

    wishes = [f"data.root={root}", f"backbone={BACKBONE}", f"data.image_size={PIXELS}", "train.strategy=full"]
    recipe = ft.load_recipe(None, [*wishes, "data.invariances=[hflip]"])
    seen = look(recipe)
    plan = make_plan(recipe, seen.facts)
    classifier = Classifier(seen.backbone, torch.nn.Linear(seen.backbone.num_features, len(plan.classes)))
    classifier.eval().to(memory_format=torch.channels_last)
    viewers = {views: Viewer(classifier, plan, views) for views in VIEWS}
    return viewers, ImageStore(seen.dataset.items, plan.view, limit_bytes=0), list(range(len(seen.dataset.items)))


def measure(viewers: dict[str, Any], store: Any, rows: list[int]) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of processor time per image, by part and views, one number for each round."""
    found: dict[str, dict[str, list[float]]] = {part: {views: [] for views in VIEWS} for part in TARGETS}
    for number in range(ROUNDS + 1):
        for views in VIEWS if number % 2 else VIEWS[::-1]:
            seconds = walk(viewers[views], store, rows)
            if number:  # the first round warms up
                for part in TARGETS:
                    found[part][views].append(1000 * seconds[part] / len(rows))
    return found


def walk(viewer: Any, store: Any, rows: list[int]) -> dict[str, float]:
    """Seconds of processor time to prepare and to look at all images once, batch by batch."""
    seconds = dict.fromkeys(TARGETS, 0.0)
    for start in range(0, len(rows), viewer.images_at_once):
        began = time.process_time()
        pictures = [viewer.read(store, row) for row in rows[start : start + viewer.images_at_once]]
        ready = time.process_time()
        viewer.judge(pictures)
        seconds["preparation"] += ready - began
        seconds["forward"] += time.process_time() - ready
    return seconds


def summarize(found: dict[str, dict[str, list[float]]], count: int) -> dict[str, Any]:
    parts = {}
    for part, by_views in found.items():
        center, ten = (by_views[views] for views in VIEWS)
        ratios = [many / one for one, many in zip(center, ten, strict=True)]
        parts[part] = {
            "center_ms": statistics.median(center),
            "ten_ms": statistics.median(ten),
            "ratio": statistics.median(ten) / statistics.median(center),
            "low": min(ratios),
            "high": max(ratios),
            "target": TARGETS[part],
        }
    return {"backbone": BACKBONE, "pixels": PIXELS, "images": count, "rounds": ROUNDS, **parts}


def sentence(summary: dict[str, Any]) -> str:
    forward, preparation = summary["forward"], summary["preparation"]
    return (
        f"Ten crops take {forward['ratio']:.1f} times the processor time of the centre to look at "
        f"({forward['low']:.1f} to {forward['high']:.1f} over {ROUNDS} rounds; {forward['ten_ms']:.1f} ms per image "
        f"instead of {forward['center_ms']:.1f}) and {preparation['ratio']:.2f} times that to prepare "
        f"({preparation['low']:.2f} to {preparation['high']:.2f}; {preparation['ten_ms']:.2f} ms instead of "
        f"{preparation['center_ms']:.2f}), for the file is decoded once: `{BACKBONE}` at {PIXELS} px on "
        f"{summary['images']} photographs of `flowers5`, one thread (`python benchmarks/views.py`)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--images", type=int, default=128)
    arguments = parser.parse_args()
    shared = arguments.shared.resolve()
    os.environ["FINETUNE_ZOO"] = str(shared / "zoo")
    import torch

    from finetune.process import tune_process

    tune_process()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        viewers, store, rows = prepare(gather(shared, arguments.images, Path(name) / "flowers5"))
        summary = summarize(measure(viewers, store, rows), len(rows))
    results = HERE / "results"
    (results / "views.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (results / "views.md").write_text(sentence(summary) + "\n", encoding="utf-8")
    print(sentence(summary))


if __name__ == "__main__":
    main()
