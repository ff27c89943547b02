"""Write the measured parts of README.md and advice.md: output of the demo and of a plan, recipes, speed, sets, matrix.

    finetune demo 2> demo.txt
    FINETUNE_ZOO=../shared/zoo finetune plan ../shared/data/sign_digits backbone=mobilenetv2_100.imagenet_keras \
        data.image_size=96 > plan.txt
    FINETUNE_ZOO=../shared/zoo finetune zoo rank ../shared/data/ants_bees data.image_size=96 > rank.txt
    python docs/readme.py demo.txt plan.txt rank.txt

Without files these three stay as they are. A table that was not measured is an error, and no promise in its place.
What stands between `<!-- NAME -->` and `<!-- /NAME -->` is replaced by what was measured; nothing is typed by hand.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("craft", "ablation", "refit", "snapshots", "imbalance", "imbalance-tuned", "overhead", "ships", "memory")
"""Of `training.md`."""
KEPT_EPOCHS = 3
"""Epochs shown at either end of the demo's training."""


def demo(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("make")]
    lines = [re.sub(r"in \S+/(demo/digits)", r"in ~/.cache/finetune/\1", line) for line in lines]
    epochs = [number for number, line in enumerate(lines) if re.search(r"  epoch \d+/", line)]
    cut = epochs[KEPT_EPOCHS:-KEPT_EPOCHS]
    if cut:
        lines[cut[0] : cut[-1] + 1] = [f"  ... {len(cut)} more epochs ..."]
    return "```\n" + "\n".join(lines).strip() + "\n```"


def recipes() -> str:
    rows = ["| recipe | for | measured |", "|---|---|---|"]
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        comments = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        where = re.search(r"on (\w+), (.*):", comments[1]) if len(comments) > 2 else None
        assert where is not None, f"{path.name} was not measured: python benchmarks/recipes.py"
        rest = [word for word in where[2].split() if "max_train" in word]
        note = "".join(f", {word.split('=')[1]} training images per class" for word in rest)
        rows.append(f"| `{path.stem}` | {comments[0]} | {where[1]}{note}: {comments[2]} |")
    return "\n".join(rows)


def speed() -> str:
    """A row per part that was measured; a part that was not is not told."""
    path = ROOT / "benchmarks" / "results" / "speed.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = ["| what | measured | beside |", "|---|---|---|"]
    if start := found.get("start"):
        rows.append(
            f"| `--help`, `recipes list`, `zoo list` | {start['--help']:.2f}, {start['recipes list']:.2f}, "
            f"{start['zoo list']:.2f} s | `import finetune` adds {start['import finetune']:.3f} s |"
        )
    if probe := found.get("probe"):
        bare = min(probe["bare"], probe["bare_two_workers"])
        rows.append(
            f"| probe run on 3,670 photographs at 128 px, cold | {probe['cold']:.1f} s | "
            f"{bare:.1f} s to decode and pass forward once in plain PyTorch |"
        )
        rows.append(f"| the same, features cached | {probe['warm']:.1f} s | |")
    if train := found.get("train"):
        rows.append(
            f"| full fine-tuning, images/s | {train['finetune']:.0f} | {train['over_tuned']:.2f} x a bare loop "
            f"with our process settings, {train['over_default']:.1f} x one with PyTorch's defaults |"
        )
    rows += looking()
    assert len(rows) > 2, "no speed was measured: python benchmarks/plans.py"
    return "\n".join(rows)


def looking() -> list[str]:
    """Rows of what a plan costs, for the table of speeds."""
    path = ROOT / "benchmarks" / "results" / "plans.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = []
    if plans := found.get("plan"):
        cold = ", ".join(f"`{name}` {row['cold']:.0f} s" for name, row in plans.items())
        warm = max(row["warm"] for row in plans.values())
        rows.append(f"| `plan` at 96 px, nothing cached | {cold} | again: at most {warm:.1f} s |")
    if extract := found.get("extract"):
        rows.append(
            f"| features of every depth, decoded images at 96 px | {extract['extraction']:.0f} images/s | "
            f"{extract['ratio']:.2f} x the bare network's forward pass |"
        )
    if forecasts := found.get("forecast"):
        parts, taken = (
            ", ".join(f"{row['strategy']} {row[key]:.0f} s" for row in forecasts) for key in ("foretold", "taken")
        )
        rows.append(f"| 6 epochs of `malaria` at 96 px, as a plan foretold | {parts} | taken: {taken} |")
    return rows


def plan(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = [re.sub(r"in \S+/(sign_digits)", r"in \1", line) for line in lines]
    kept = [number for number, line in enumerate(lines) if line.startswith("Plan")]
    settings = [number for number, line in enumerate(lines) if line.startswith("  data.image_size =")]
    last = next(number for number, line in enumerate(lines) if line.startswith("  stage "))
    assert kept and settings
    shown = [*lines[: settings[0]], "  ... the other settings, each with its reason ...", *lines[last:]]
    return "```\n" + "\n".join(shown).strip() + "\n```"


def result(name: str) -> str:
    """What a benchmark left, as it is; and at which version, for not every version is measured anew."""
    path = ROOT / "benchmarks" / "results" / f"{name}.md"
    said = ["git", "log", "-1", "--format=%h (%cs)", "--", str(path)]
    version = subprocess.run(said, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert version, f"{path} is not committed yet, so no version can be told"
    return f"{path.read_text(encoding='utf-8').strip()}\n\nMeasured with version {version}."


def rank(path: Path) -> str:
    """The table of a ranking, what the first and the last source classifier say, and why one is chosen."""
    blocks = path.read_text(encoding="utf-8").strip().split("\n\n")
    said = next(block for block in blocks if block.startswith("What their source classifiers"))
    entries = re.findall(r"^  \S.*(?:\n    .*)*", said, re.M)
    shown = [*blocks[:2], "  ...", f"{said.splitlines()[0]}\n{entries[0]}\n  ...", blocks[-1]]
    command = "$ FINETUNE_ZOO=../shared/zoo finetune zoo rank ../shared/data/ants_bees data.image_size=96"
    return "```\n" + command + "\n" + "\n".join(shown) + "\n```"


def main() -> None:
    parts = {"recipes": recipes(), "speed": speed(), "sets": result("sets")}
    for name, make, path in zip(("demo", "plan", "rank"), (demo, plan, rank), sys.argv[1:], strict=False):
        parts[name] = make(Path(path))
    write(ROOT / "README.md", parts)
    write(ROOT / "docs" / "advice.md", {name: result(name) for name in ("matrix", "many", "curve", "choice")})
    write(
        ROOT / "docs" / "training.md",
        {name: result(name) for name in TABLES},
    )
    write(ROOT / "docs" / "judging.md", {name: result(name) for name in ("judging", "views")})


def write(readme: Path, parts: dict[str, str]) -> None:
    """Replace what stands between the marks of each part."""
    text = readme.read_text(encoding="utf-8")
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        assert pattern.search(text), name
        text = pattern.sub(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
