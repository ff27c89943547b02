"""The main job on five real data sets: what the tool decides by itself, and what comes of it.

    python benchmarks/sets.py [--shared ../shared] [--runs benchmarks/runs]

Each set is trained with `finetune train data.root=SET backbone=... data.image_size=128` and nothing else, unless
`--runs` holds a finished run of it already; so a stopped benchmark goes on where it was. The table of the newest run
of each set is printed and written to `results/sets.md`. About half an hour on two cores. One seed: the intervals are
those of the test images alone.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
BACKBONE, PIXELS = "mobilenetv2_100.imagenet_keras", 128
SETS = ("ants_bees", "flowers5", "sign_digits", "malaria", "cifar10_20k")


def newest_run(runs: Path, name: str) -> Path | None:
    finished = [path.parent for path in runs.glob(f"{name}-{BACKBONE}-*/scores.json")]
    return max(finished, key=lambda path: path.name, default=None)


def train(name: str, shared: Path, runs: Path) -> Path:
    words = [
        "train",
        "--json",
        f"data.root={shared / 'data' / name}",
        f"backbone={BACKBONE}",
        f"data.image_size={PIXELS}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "FINETUNE_ZOO": str(shared / "zoo"), "FINETUNE_RUNS": str(runs)},
    )
    return Path(json.loads(done.stdout)["run"])


def row(name: str, run: Path) -> str:
    scores, facts = (json.loads((run / f"{part}.json").read_text()) for part in ("scores", "facts"))
    plan = yaml.safe_load((run / "plan.yaml").read_text())
    pair = scores.get("paired", {}).get("test")

    def share(part: dict) -> str:
        return f"{100 * part['value']:.1f} [{100 * part['low']:.1f}, {100 * part['high']:.1f}]"

    gain = (
        "-"
        if pair is None
        else f"{100 * pair['difference']:+.1f} [{100 * pair['low']:+.1f}, {100 * pair['high']:+.1f}]"
    )
    cells = [
        f"`{name}`",
        f"{sum(facts['counts']['train']):,}",
        f"{facts['similarity']['value']:.2f}",
        plan["train"]["strategy"],
        share(scores["probe"]["test"]["top1"]),
        share(scores["test"]["top1"]),
        gain,
        str(scores["test"]["top1"]["n"]),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    arguments = parser.parse_args()
    lines = [
        "| set | training images | similarity | chosen | probe, % | final, % | final minus probe | test images |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in SETS:
        run = newest_run(arguments.runs, name) or train(name, arguments.shared.resolve(), arguments.runs.resolve())
        lines.append(row(name, run))
        print(lines[-1], flush=True)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "sets.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
