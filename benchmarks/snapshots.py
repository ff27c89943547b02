"""Snapshot ensembles against the control that is usually forgotten: the same budget without cycles.

    python benchmarks/snapshots.py run [--shared ../shared]     # some 15 minutes on one thread; resumable
    python benchmarks/snapshots.py table                        # seconds; writes results/snapshots.md

`cycles` trains in five cosine cycles of three epochs and averages the predictions of its last m snapshots. `control`
trains the same fifteen epochs on one cosine and averages those of its last m epochs; its first member is the plain run.
Full fine-tuning from the probe, everything else as the planner decides it, 64 px, at most 100 labelled images per
class, the same test images.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

from rows import append_row, read_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "snapshots.csv"
BACKBONE, PIXELS = "mobilenetv2_100.imagenet_keras", 64
SETS, SEEDS, MEMBERS, EPOCHS = ("sign_digits", "flowers5"), (0, 1, 2), 5, 15
VARIANTS = {
    "cycles": [f"train.averaging.snapshots={MEMBERS}"],
    "control": [f"train.averaging.keep_last={MEMBERS}"],
}
FIELDS = ("set", "seed", "variant", "members", "top1", "log_loss", "mean_top1", "num_test", "commit")


def judge(run, seen) -> list[dict]:
    """Scores of the average over the last m members, for every m."""
    import torch
    import torch.nn.functional as F

    from finetune.inference.loading import load_final
    from finetune.inference.predict import predict_probabilities
    from finetune.training.snapshots import load_member, read_members

    classifier, labels = load_final(run), seen.dataset.labels("test")
    plan = run.plan
    classifier.freeze(plan.stages[-1].trainable_stages, batch_norm=plan.stages[-1].batch_norm)
    parts = []
    for member in read_members(run.file("snapshots")):
        load_member(classifier, member)
        parts.append(
            predict_probabilities(classifier, seen.dataset.store, seen.dataset.indices("test"), plan, "center")
        )
    rows = []
    for count in range(1, len(parts) + 1):
        average = torch.stack(parts[-count:]).mean(0)
        single = [float((part.argmax(1) == labels).double().mean()) for part in parts[-count:]]
        rows.append(
            {
                "members": count,
                "top1": float((average.argmax(1) == labels).double().mean()),
                "log_loss": float(F.nll_loss(average.clamp(min=1e-12).log(), labels)),
                "mean_top1": statistics.mean(single),
                "num_test": len(labels),
            }
        )
    return rows


def run_all(shared: Path, work: Path) -> None:
    import torch

    import finetune as ft
    from finetune.features.survey import look

    torch.set_num_threads(1)
    os.environ |= {"FINETUNE_ZOO": str(shared / "zoo"), "FINETUNE_CACHE": str(work / "cache")}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
    )
    for seed in SEEDS:
        for name in SETS:
            for variant, wishes in VARIANTS.items():
                if any((r["set"], r["seed"], r["variant"]) == (name, str(seed), variant) for r in read_rows(RESULTS)):
                    continue
                common = [f"data.root={shared / 'data' / name}", f"backbone={BACKBONE}", f"data.image_size={PIXELS}"]
                common += [
                    "data.max_train_per_class=100",
                    f"seed={seed}",
                    "train.strategy=full",
                    f"train.epochs={EPOCHS}",
                    "train.checkpoint=last",
                ]
                recipe = ft.load_recipe(None, [*common, "tracking.enabled=false", *wishes])
                run = ft.train(recipe, runs=work / "runs", say=lambda text: None)
                rows = judge(run, look(recipe))
                for row in rows:
                    shown = {key: f"{row[key]:.4f}" for key in ("top1", "log_loss", "mean_top1")}
                    append_row(RESULTS, FIELDS, {**row, **shown, "set": name, "seed": seed, "variant": variant,
                            "commit": commit.stdout.strip()})  # fmt: skip
                print(json.dumps({"set": name, "seed": seed, "variant": variant,
                                  "top1": [round(row["top1"], 4) for row in rows]}), flush=True)  # fmt: skip
                shutil.rmtree(run.path)


def table() -> str:
    found: defaultdict[tuple[str, str, int], list[dict[str, str]]] = defaultdict(list)
    for row in read_rows(RESULTS):
        found[row["set"], row["variant"], int(row["members"])].append(row)

    def cell(name: str, variant: str, count: int) -> str:
        rows = found[name, variant, count]
        if not rows:
            return ""
        top1 = [100 * float(row["top1"]) for row in rows]
        spread = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
        return f"{statistics.mean(top1):.1f}{spread} ({statistics.mean(float(r['log_loss']) for r in rows):.3f})"

    columns = [(name, variant) for name in SETS for variant in VARIANTS]
    lines = [f"| members | {' | '.join(f'`{name}`, {variant}' for name, variant in columns)} |",
             "|---" * (len(columns) + 1) + "|"]  # fmt: skip
    for count in range(1, MEMBERS + 1):
        lines.append(f"| {count} | {' | '.join(cell(name, variant, count) for name, variant in columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--work", type=Path, default=HERE / "snapshots")
    arguments = parser.parse_args()
    if arguments.what == "run":
        run_all(arguments.shared.resolve(), arguments.work.resolve())
    text = table()
    RESULTS.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
