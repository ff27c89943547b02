"""Memory and time that a plan costs as a data set grows, to be drawn on to a million images.

    python benchmarks/many.py [--num 20000 80000]    # minutes; writes results/many.md

The images are 400 tiny ones under many names (hard links), at 16 px with the bundled backbone, so that what is measured
is the listing, the digests, the split and the cache. Memory is the process's own (pages of mapped feature files, which
the system takes back when it is short, are not counted), sampled every twentieth of a second; decoded images, which
`hardware.image_cache_gb` bounds, are not kept. Each number of images is a process of its own, with an empty cache, and
again with a full one.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES, CLASSES = 400, 20


def make_images(root: Path, num: int) -> None:
    """`num` names in twenty class folders for four hundred files."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (root / "files").mkdir(parents=True)
    files = [root / "files" / f"{number}.png" for number in range(SOURCES)]
    for file in files:
        Image.fromarray(rng.integers(0, 255, (18, 18, 3), dtype=np.uint8)).save(file)
    for label in range(CLASSES):
        (root / "data" / f"class-{label:02d}").mkdir(parents=True)
    for number in range(num):
        label, turn = number % CLASSES, number // CLASSES
        source = files[turn % (SOURCES // CLASSES) * CLASSES + label]
        os.link(source, root / "data" / f"class-{label:02d}" / f"image-{number:07d}.png")


def own_megabytes() -> float:
    """Memory of this process that no file stands behind."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found
    return int(found[1]) / 1e3


def plan_once(root: Path) -> None:
    """Plan in this process and print what it cost."""
    from finetune.config.reading import load_recipe
    from finetune.preparing import plan

    peak, is_done = [0.0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.05):
            peak[0] = max(peak[0], own_megabytes())

    threading.Thread(target=watch, daemon=True).start()
    wishes = ["data.image_size=16", "hardware.image_cache_gb=0"]
    began = time.perf_counter()
    facts, _ = plan(load_recipe(str(root), wishes), say=lambda text: None)
    is_done.set()
    print(json.dumps({"images": facts.num_images, "seconds": time.perf_counter() - began, "megabytes": peak[0]}))


def measure(num: int, folder: Path) -> list[dict]:
    make_images(folder / str(num), num)
    environment = {**os.environ, "FINETUNE_CACHE": str(folder / f"cache-{num}"), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(Path(__file__)), "--one", str(folder / str(num) / "data")]
    rows = []
    for _ in ("cold", "warm"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, nargs="+", default=[20_000, 80_000])
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        plan_once(arguments.one)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(num, Path(folder)) for num in arguments.num]
    lines = ["| images | MB, cold | MB, warm | seconds, cold | seconds, warm |", "|---|---|---|---|---|"]
    for cold, warm in found:
        cells = [f"{row[what]:.0f}" for what in ("megabytes", "seconds") for row in (cold, warm)]
        lines.append(f"| {cold['images']:,} | {' | '.join(cells)} |")
    (least, _), (most, _) = found[0], found[-1]
    each = 1e6 * (most["megabytes"] - least["megabytes"]) / max(1, most["images"] - least["images"])
    lines += ["", f"{each:.0f} bytes for each further image; a million would take {each * 1e6 / 1e9:.1f} GB more."]
    text = "\n".join(lines)
    print(text)
    (HERE / "results" / "many.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
