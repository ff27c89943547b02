"""Cells of a benchmark: a data set cut to so many labelled images per class, and the recipe that looks at it.

Sized for one thread of a small machine where nothing else is said: 64 px, two backbones of one architecture.
"""

import hashlib
from pathlib import Path

SETS = ("ants_bees", "flowers5", "sign_digits", "malaria", "cifar10_20k")
BACKBONES = ("mobilenetv2_100.imagenet_keras", "mobilenetv2_100.inat_insect")
PER_CLASS = (5, 20, 50, 400)
SEEDS = (0, 1, 2)
PIXELS, TEST_PER_CLASS, BUDGET = 64, 250, 10_000


def export_cifar(source: Path, target: Path) -> None:
    """The parquet set as PNG files, bytes as they are, so that a table can name them."""
    from finetune.data.sources import open_source, read_bytes

    found = open_source(source)
    for item in found.items:
        path = target / str(item.role) / found.classes[item.label] / f"{item.name.replace('#', '-')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_bytes(item))
    (target / "done").touch()


def cell_table(name: str, per_class: int, seed: int, shared: Path, work: Path) -> Path:
    """A table of `per_class` training images per class, nested in larger ones of the same seed, and the test images."""
    root = shared / "data" / name
    if next(root.glob("*.parquet"), None) or not (root / "train").is_dir():
        if not (work / name / "done").exists():
            export_cifar(root, work / name)
        root = work / name
    lines = ["image,label,split"]
    for role, limit, key in (("train", per_class, f"{seed}"), ("test", TEST_PER_CLASS, "test")):
        for folder in sorted(path for path in (root / role).iterdir() if path.is_dir()):
            files = sorted(path for path in folder.iterdir() if path.is_file())
            files.sort(key=lambda path: hashlib.blake2b(f"{key} {path.name}".encode()).digest())
            lines += [f"{path.resolve()},{folder.name},{role}" for path in files[:limit]]
    table = work / "cells" / f"{name}-{per_class}-{seed}.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def cell_recipe(name: str, backbone: str, per_class: int, seed: int, shared: Path, work: Path, more: list[str]):
    import finetune as ft

    table = cell_table(name, per_class, seed, shared, work)
    wishes = [f"data.root={table}", f"backbone={backbone}", f"data.image_size={PIXELS}", f"seed={seed}"]
    wishes += ["data.split.calibration=0", "evaluate.calibrate=false", "tracking.enabled=false"]
    wishes += ["data.split.refit=false", *more]
    return ft.load_recipe(None, wishes)
