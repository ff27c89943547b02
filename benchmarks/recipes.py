"""Run every shipped recipe on real images and write what came out into its header.

    FINETUNE_ZOO=../shared/zoo python benchmarks/recipes.py [--shared ../shared] [--only NAME ...]

The lines between the first comment and the first key are rewritten; nothing is typed by hand. One seed:
the interval is that of the test images alone. About ten minutes on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent / "recipes"
BACKBONE, PIXELS = "mobilenetv2_100.imagenet_keras", 96
CASES = {
    "quick": ("flowers5", []),
    "probe": ("flowers5", []),
    "small-similar": ("flowers5", ["data.max_train_per_class=40"]),
    "small-different": ("sign_digits", ["data.max_train_per_class=40"]),
    "large-similar": ("flowers5", []),
    "large-different": ("sign_digits", []),
}
"""Shared data set and overrides by recipe."""


def measure(name: str, shared: Path) -> dict:
    data, overrides = CASES[name]
    with tempfile.TemporaryDirectory() as runs:
        words = ["train", name, "--json", f"data.root={shared / 'data' / data}", f"backbone={BACKBONE}", *overrides]
        words += [f"data.image_size={PIXELS}", "tracking.enabled=false"]
        done = subprocess.run(
            [sys.executable, "-m", "finetune", *words],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "FINETUNE_RUNS": runs},
        )
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(done.stdout)


def header(name: str, found: dict) -> list[str]:
    data, overrides = CASES[name]

    def share(part: dict) -> str:
        return f"{100 * part['value']:.1f} % [{100 * part['low']:.1f}, {100 * part['high']:.1f}]"

    test, probe = found["scores"]["test"]["top1"], found["scores"]["probe"]["test"]["top1"]
    wishes = " ".join([f"backbone={BACKBONE}", f"data.image_size={PIXELS}", *overrides])
    lines = [f"# Measured by benchmarks/recipes.py on {data}, {wishes}:"]
    beside = "" if not found["plan"]["stages"] else f"; the probe alone {share(probe)}"
    lines.append(f"# {share(test)} of {test['n']} test images right{beside}.")
    return lines


def write_header(name: str, lines: list[str]) -> None:
    path = RECIPES / f"{name}.yaml"
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    body = rest[next(i for i, line in enumerate(rest) if not line.startswith("#")) :]
    path.write_text("\n".join([first, *lines, *body]) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    for name in arguments.only:
        lines = header(name, measure(name, arguments.shared))
        write_header(name, lines)
        print("\n".join([name, *lines]), flush=True)


if __name__ == "__main__":
    main()
