"""What looking costs: `plan` on five sets, extraction beside the bare forward pass, forecasts beside runs.

    python benchmarks/plans.py [--shared ../shared] [--only plan|extract|forecast]

Whole processes on a machine with nothing else to do; a few minutes. Results go to `results/plans.json`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "plans.json"
BACKBONE, PIXELS = "mobilenetv2_100.imagenet_keras", 96
SETS = ("ants_bees", "flowers5", "sign_digits", "malaria", "cifar10_20k")


def call(words: list[str], shared: Path, cache: Path) -> tuple[float, dict]:
    env = {**os.environ, "FINETUNE_ZOO": str(shared / "zoo"), "FINETUNE_CACHE": str(cache)}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *words, "--json"], env=env, check=True, stdout=subprocess.PIPE, text=True
    )
    return time.perf_counter() - began, json.loads(done.stdout)


def wishes(name: str, shared: Path, *more: str) -> list[str]:
    return [f"data.root={shared / 'data' / name}", f"backbone={BACKBONE}", f"data.image_size={PIXELS}", *more]


def time_plans(shared: Path) -> dict[str, dict[str, float]]:
    found = {}
    for name in SETS:
        with tempfile.TemporaryDirectory() as folder:
            cold, answer = call(["plan", *wishes(name, shared)], shared, Path(folder))
            warm = min(call(["plan", *wishes(name, shared)], shared, Path(folder))[0] for _ in range(2))
        images = sum(sum(row) for row in answer["facts"]["counts"].values())
        found[name] = {"images": images, "cold": cold, "warm": warm, "bytes": answer["facts"]["features"]["bytes"]}
        print(name, found[name], flush=True)
    return found


def compare_extraction(shared: Path) -> dict[str, float]:
    """Images per second of extracting every depth from decoded images, and of the bare network's forward pass."""
    import numpy as np
    import torch

    from finetune.compute import PLAIN
    from finetune.config.backbone_names import read_zoo
    from finetune.data.loading import normalize
    from finetune.features.extraction import BATCH, look_at_all
    from finetune.models.backbones import load_backbone
    from finetune.models.frozen import FrozenBackbone
    from finetune.process import tune_process

    os.environ["FINETUNE_ZOO"] = str(shared / "zoo")
    tune_process()
    backbone = load_backbone(BACKBONE, zoo=read_zoo()).eval().to(memory_format=torch.channels_last)
    view = backbone.card.view(size_pixels=PIXELS)
    crops = np.random.default_rng(0).integers(0, 255, (8 * BATCH, PIXELS, PIXELS, 3), dtype=np.uint8)
    frozen = FrozenBackbone(backbone, size_pixels=PIXELS, device="cpu")
    ready = [normalize(torch.from_numpy(crops[at : at + BATCH]), view) for at in range(0, len(crops), BATCH)]
    speeds: dict[str, list[float]] = {"extraction": [], "bare": []}
    for _ in range(4):
        began = time.perf_counter()
        look_at_all(frozen, crops, view, PLAIN)
        speeds["extraction"].append(len(crops) / (time.perf_counter() - began))
        began = time.perf_counter()
        with torch.inference_mode():
            for images in ready:
                backbone(images)
        speeds["bare"].append(len(crops) / (time.perf_counter() - began))
    best = {name: max(values) for name, values in speeds.items()}
    return best | {"ratio": best["extraction"] / best["bare"]}


def compare_forecasts(shared: Path) -> list[dict[str, float | str]]:
    """Seconds that a plan foretells for each strategy, and what a run of it then takes after the survey."""
    rows: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory() as folder:
        more = ["train.epochs=6", "tracking.enabled=false", "train.patience=6"]
        _, answer = call(["plan", *wishes("malaria", shared, *more)], shared, Path(folder))
        foretold = {row["strategy"]: row["seconds"] for row in answer["plan"]["advice"]["forecasts"]}
        for strategy in ("partial", "full"):
            words = ["train", *wishes("malaria", shared, *more), f"train.strategy={strategy}", "--runs", folder]
            _, done = call(words, shared, Path(folder))
            taken = done["seconds"]["training"] + done["seconds"]["evaluation"]
            rows.append({"strategy": strategy, "foretold": foretold[strategy], "taken": taken})
            print(rows[-1], flush=True)
            shutil.rmtree(done["run"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--only", choices=["plan", "extract", "forecast"])
    arguments = parser.parse_args()
    shared = arguments.shared.resolve()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    parts = {"extract": compare_extraction, "plan": time_plans, "forecast": compare_forecasts}
    for name, work in parts.items():
        if arguments.only in (None, name):
            found[name] = work(shared)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
