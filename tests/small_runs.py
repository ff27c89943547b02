"""Runs of a few seconds on drawn shapes."""

import finetune as ft

SMALL = [
    "data.image_size=32",
    "train.batch_size=16",
    "train.epochs=3",
    "tracking.enabled=false",
    "data.split.refit=false",
]


def start(shapes, tmp_path, *wishes, say=lambda text: None, **rest):
    recipe = ft.load_recipe(None, [f"data.root={shapes}", *SMALL, *wishes])
    return ft.train(recipe, runs=tmp_path / "runs", say=say, **rest)
