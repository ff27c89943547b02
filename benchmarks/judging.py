"""A worked example of judging on `flowers5`: the commands, and what they print, for docs/judging.md.

    python benchmarks/judging.py [--shared ../shared]     # some minutes; writes results/judging.md

One run with three snapshots at 64 px, judged in one view and in ten, its members averaged, both compared, and new
images predicted with sets.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
WISHES = ["backbone=mobilenetv2_100.imagenet_keras", "data.image_size=64", "data.invariances=[hflip]",
          "train.strategy=full", "train.epochs=6", "train.averaging.snapshots=3", "tracking.enabled=false"]  # fmt: skip


def show(words: list[str], env: dict[str, str]) -> tuple[str, str]:
    """The command as a reader would type it with what it printed, and standard output as it was."""
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *words], capture_output=True, text=True, check=False, env=env
    )
    if done.returncode not in (0, 1):
        sys.exit(done.stderr)
    return done.stdout, done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    shared = parser.parse_args().shared.resolve()
    data = shared / "data" / "flowers5"
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "FINETUNE_ZOO": str(shared / "zoo"), "FINETUNE_RUNS": folder}
        blocks = []

        def clean(text: str) -> str:
            return re.sub(r"-20\d{6}-\d{6}", "", text.replace(f"{folder}/", "runs/").replace(str(data), "flowers5"))

        def block(words: list[str], out: str, *, lines: int | None = None) -> None:
            shown = clean(out).rstrip().splitlines()
            cut = [*shown[:lines], "..."] if lines and len(shown) > lines else shown
            command = re.sub(r"(?m)[ \t]+$", "", "finetune " + " ".join(clean(word) for word in words))
            blocks.append("```\n$ " + command + "\n" + "\n".join(cut) + "\n```")

        words = ["train", str(data), *WISHES]
        _, err = show(words, env)
        run = next(Path(folder).glob("flowers5-*"))
        scores = err[err.index("Scores (") : err.index("report:")]
        block(words, scores)
        for more in (["evaluate", str(run), "--views", "ten"], ["ensemble", str(run), "--members", "snapshots"]):
            block(more, show(more, env)[0])
        joined = next(path for path in Path(folder).iterdir() if path.name.startswith("flowers5_average"))
        more = ["compare", str(run), str(joined)]
        block(more, show(more, env)[0])
        images = data / "test" / "roses"
        more = ["predict", str(run), str(images), "--sets", "0.9", "--top", "2"]
        block(more, show(more, env)[0], lines=6)
    (HERE / "results" / "judging.md").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    print("\n\n".join(blocks))


if __name__ == "__main__":
    main()
