"""Memory and processor time of a training on a CPU, by how many images pass through the network at once.

    python benchmarks/memory.py [--shared ../shared] [--rounds 1]     # 6 minutes a round; writes results/memory.md

250 images of flowers5 at 224 px, full fine-tuning at 64 images per step, batch norm frozen; each run a process of its
own with an empty cache, sizes in turn. Told of each: the largest resident size of the process while it surveys, trains
and judges (reset between them), and the processor seconds of its training steps, with one thread.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BACKBONE, PIXELS, PER_CLASS, EPOCHS = "mobilenetv2_100.imagenet_keras", 224, 50, 3
SIZES = (0, 16, 12)
PARTS = ("survey", "training", "evaluation")


def peak_mb() -> float:
    """The largest resident size since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def run(size: int, work: Path) -> dict[str, float]:
    """One training in this process; what it took."""
    import finetune as ft
    from finetune import pipeline
    from finetune.training import checkpoints

    found: dict[str, float] = {}
    times: list[float] = []
    start, end, give_back = checkpoints.Keeper.on_train_epoch_start, checkpoints.Keeper.on_train_epoch_end, (
        pipeline.give_back_memory
    )  # fmt: skip

    def on_start(keeper: Any, trainer: Any, module: Any) -> None:
        start(keeper, trainer, module)
        times.append(-time.process_time())

    def on_end(keeper: Any, trainer: Any, module: Any) -> None:
        times.append(time.process_time())
        end(keeper, trainer, module)

    def next_part() -> None:
        found[PARTS[len(found)]] = peak_mb()
        give_back()
        forget_peak()

    checkpoints.Keeper.on_train_epoch_start, checkpoints.Keeper.on_train_epoch_end = on_start, on_end  # type: ignore[method-assign]
    pipeline.give_back_memory = next_part
    wishes = [f"backbone={BACKBONE}", f"data.image_size={PIXELS}"]
    wishes += ["train.strategy=full", f"train.epochs={EPOCHS}", "train.batch_size=64", "train.batch_norm=frozen"]
    wishes += ["augment.preset=light", "data.invariances=[hflip]", "data.split.refit=false", "tracking.enabled=false"]
    wishes += [f"hardware.micro_batch={size}"]
    ft.train(str(work / "images"), wishes, runs=work / "runs", say=lambda text: None)
    next_part()
    return {**found, "seconds": sum(times[2:]) / (EPOCHS - 1)}  # the first epoch warms up


def table(rows: dict[int, list[dict[str, float]]]) -> str:
    """Medians over rounds, as Markdown."""
    lines = [
        "| images per pass | survey, MB | training, MB | evaluation, MB | processor seconds per epoch |",
        "|---|---|---|---|---|",
    ]
    for size, found in rows.items():
        cells = [statistics.median(row[part] for row in found) for part in PARTS]
        seconds = statistics.median(row["seconds"] for row in found)
        shown = " | ".join(f"{cell:,.0f}" for cell in cells)
        lines.append(f"| {size or '64, all of a step'} | {shown} | {seconds:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(run(arguments.one, arguments.work)))
        return
    shared = arguments.shared.resolve()
    rows: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    with tempfile.TemporaryDirectory() as work:
        for folder in sorted((shared / "data" / "flowers5" / "train").iterdir()):
            shutil.copytree(folder, f"{work}/images/{folder.name}", ignore=lambda _, names: sorted(names)[PER_CLASS:])
        for number in range(arguments.rounds):
            for size in SIZES:
                cache = {"FINETUNE_ZOO": str(shared / "zoo"), "FINETUNE_CACHE": f"{work}/cache-{number}-{size}"}
                words = [sys.executable, __file__, "--one", str(size), "--work", work]
                env = {**os.environ, **cache, "OMP_NUM_THREADS": "1"}
                done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
                rows[size].append(json.loads(done.stdout.splitlines()[-1]))
                print(number, size, rows[size][-1], flush=True)
    (HERE / "results" / "memory.md").write_text(table(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
