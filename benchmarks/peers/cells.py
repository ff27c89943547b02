"""What all peers are given: one folder of images per cell, and the backbone's weights in every form that a door takes.

A cell is a data set cut to so many labelled images per class, as `benchmarks/advice.py` cuts it, so that its images
are those of the other benchmarks: `CELL/train/CLASS/*` and `CELL/test/CLASS/*`, copies, in which a peer may divide
as it likes.
"""

import csv
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from advice import cell_table


def lay_out(table: Path, folder: Path) -> Path:
    """`folder/SPLIT/CLASS/NAME`, a copy of every image that `table` (image, label, split) names; `folder`.

    Raises:
        ValueError: if two images would have one name.
    """
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            target = folder / row["split"] / row["label"] / Path(row["image"]).name
            if target.exists():
                raise ValueError(f"{table}: two images are called {target.name} in class {row['label']}.")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(row["image"], target)
    (folder / "done").touch()
    return folder


def cell_folder(name: str, per_class: int, seed: int, shared: Path, work: Path) -> Path:
    """The folder of one cell, made once."""
    table = cell_table(name, per_class, seed, shared, work)
    return lay_out(table, work / "cells" / f"{name}-{per_class}-{seed}")


def timm_config(card: dict) -> dict:
    """What timm's own model folders say (`config.json`), from one of our cards."""
    classifier, first = "classifier", "conv_stem"
    return {
        "architecture": card["arch"],
        "num_classes": card["num_classes"],
        "num_features": 1280,
        "model_args": card["arch_kwargs"],
        "pretrained_cfg": {
            "num_classes": card["num_classes"],
            "input_size": list(card["input_size"]),
            "pool_size": [7, 7],
            "crop_pct": card["crop_pct"],
            "crop_mode": card["crop_mode"],
            "interpolation": card["interpolation"],
            "mean": list(card["mean"]),
            "std": list(card["std"]),
            "first_conv": first,
            "classifier": classifier,
        },
    }


def weights_folder(backbone: str, zoo: Path, work: Path) -> Path:
    """A folder that timm (`local-dir:`), transformers, AutoGluon and lightly-train load, in single precision.

    The card's own file holds half precision where that is exact; transformers would train in what it finds.
    """
    import torch
    import yaml
    from safetensors.torch import load_file, save_file

    folder = work / "weights" / backbone
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    card = yaml.safe_load((zoo / backbone / "card.yaml").read_text(encoding="utf-8"))
    tensors = {name: value.float() for name, value in load_file(zoo / backbone / card["weights"]["file"]).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    headless = {name: value for name, value in tensors.items() if not name.startswith("classifier.")}
    torch.save(headless, folder / "backbone.pth")
    torch.save(headless, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(timm_config(card), indent=1), encoding="utf-8")
    return folder
