"""What a sweep of the linear probe costs, in processor seconds, with one thread and with two.

    python benchmarks/probe_speed.py [small] [large]   # small by default: seconds; large: minutes

Writes results/probe_speed.md.

Features are drawn: images lie around the centres of their classes, mostly along few directions, the centres along fewer
still, and every value is cut off at zero as by a last activation; a tenth of the labels is wrong. So the best penalty
lies inside the grid. Each measurement is a process of its own: threads that were started may go on waiting and be
counted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "probe_speed.md"
SIZES = {"small": (200, 7, 128), "large": (1000, 20, 1280)}
"""Classes, training images of each, and features. Half as many images again are val."""
SPREAD = 4.0
"""Of the centres along the first direction, beside that of the images around them."""
WRONG = 0.1
"""Share of the images with the label of any class."""
THREADS = (1, 2)


def draw(classes: int, images: int, width: int, *, seed: int) -> tuple[Any, Any]:
    """Features (N, D) in float32 and labels (N,); the seed is that of the images, the classes stay."""
    import torch

    ours, theirs = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000)
    scale = torch.arange(1, width + 1).pow(-0.5)
    turn = torch.linalg.qr(torch.randn(width, width, generator=theirs))[0]
    labels = torch.arange(classes * images) % classes
    centres = torch.randn(classes, width, generator=theirs)
    inner = (SPREAD * scale * centres[labels] + torch.randn(len(labels), width, generator=ours)) * scale
    is_wrong = torch.rand(len(labels), generator=ours) < WRONG
    told = torch.where(is_wrong, torch.randint(classes, labels.shape, generator=ours), labels)
    return (inner @ turn + 0.5 * scale.mean()).relu(), told


def measure(size: str, threads: int) -> dict[str, Any]:
    """Processor and wall seconds of one sweep, and what it chose."""
    import torch

    from finetune.features.probing import sweep_probe

    torch.set_num_threads(threads)
    classes, images, width = SIZES[size]
    train = draw(classes, images, width, seed=0)
    val = draw(classes, (images + 1) // 2, width, seed=1)
    wall, processor = time.perf_counter(), time.process_time()
    probe, choice = sweep_probe(*train, *val, num_classes=classes)
    seconds = {"processor": time.process_time() - processor, "wall": time.perf_counter() - wall}
    right = float((probe.logits(val[0]).argmax(1) == val[1]).double().mean())
    found = {"tried": len(choice.losses), "l2": probe.l2, "at_edge": choice.at_edge, "val_top1": right}
    return {"size": size, "threads": threads, **seconds, **found, "gradient_norm": probe.gradient_norm}


def measure_alone(size: str, threads: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, size, "--threads", str(threads)]
    # What the environment says of threads would count before what the process sets.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    row: dict[str, Any] = json.loads(answer.stdout)
    return row


def write(rows: list[dict[str, Any]]) -> None:
    """The table, one line a measurement."""
    lines = [
        "One sweep over `L2_GRID`, the chosen penalty solved exactly (`python benchmarks/probe_speed.py`).",
        "",
        "| classes x images x features | threads | processor seconds | wall seconds | tried | chosen | val top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = " x ".join(f"{number:,}" for number in SIZES[row["size"]])
        numbers = [size, row["threads"], f"{row['processor']:.1f}", f"{row['wall']:.1f}", row["tried"]]
        numbers += [f"{row['l2']:g}{' (edge)' if row['at_edge'] else ''}", f"{100 * row['val_top1']:.1f} %"]
        lines.append(f"| {' | '.join(str(number) for number in numbers)} |")
    RESULTS.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Measure the sizes that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["small"], help=", ".join(SIZES))
    parser.add_argument("--threads", type=int, help="measure in this process, print one line, write nothing")
    arguments = parser.parse_args()
    if arguments.threads:
        for size in arguments.sizes:
            print(json.dumps(measure(size, arguments.threads)))
        return
    write([measure_alone(size, threads) for size in arguments.sizes for threads in THREADS])


if __name__ == "__main__":
    main()
