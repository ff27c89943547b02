"""The craft of training, by default and piece by piece: against a plain probe and a plain fine-tuning, and with each
default switched off in turn.

    python benchmarks/craft.py run [--shared ../shared] [--only default plain ...]    # resumable; appends rows
    python benchmarks/craft.py ablate [--shared ../shared]                            # resumable; appends rows
    python benchmarks/craft.py table                                                  # seconds; writes results/craft.md

`default` sets nothing but data, backbone and image size: the advisor decides. `plain` is what a good script does
without any of this package's decisions: the network as it is, batch norm and all, a fresh linear head, AdamW at 1e-3
on one cycle of four epochs, light random crops, the last weights. It is given our decoded images and our batches, so
that no second is lost to a slower loader. Every other row is `default` with one thing changed; `ablate` runs these at
64 px and at most 50 labelled images per class, `run` at full size. Cost is processor time of the whole job, from files
to scores. One thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections import Counter, defaultdict
from pathlib import Path

from rows import append_row, read_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "craft.csv"
SMALL_RESULTS = HERE / "results" / "ablation.csv"
SMALL = ["data.image_size=64", "data.max_train_per_class=50", "train.strategy=partial"]
BACKBONE = "mobilenetv2_100.imagenet_keras"
PIXELS = {"ants_bees": 128, "flowers5": 128, "sign_digits": 96, "malaria": 96}
SEEDS = (0, 1, 2)
ALONE = "0"
"""The seed whose runs cost is taken from; they are made with nothing else on the machine, which slows some more."""
PLAIN_EPOCHS, PLAIN_RATE = 4, 1e-3
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "plain": [],
    "2.5 times the budget": ["budget=20000"],
    "head from zero": ["head.init=zero"],
    "same rate everywhere": ["train.optimizer.backbone_lr_ratio=1"],
    "batch norm trains": ["train.batch_norm=train"],
    "batch norm trains, same rate everywhere": ["train.batch_norm=train", "train.optimizer.backbone_lr_ratio=1"],
    "any orientation": ["data.invariances=[hflip,vflip,rot90]"],
    "no augmentation": ["augment.preset=none"],
    "constant rate": ["train.schedule.name=constant"],
    "no warm-up": ["train.schedule.warmup_fraction=0"],
    "no weight decay": ["train.optimizer.weight_decay=0"],
    "moving average": ["train.averaging.kind=ema"],
    "label smoothing 0.1": ["regularization.label_smoothing=0.1"],
    "mixup 0.2": ["augment.mixup=0.2"],
    "layer decay 0.65, top at full rate": ["train.optimizer.layer_decay=0.65", "train.optimizer.backbone_lr_ratio=1"],
}
LARGE = ("plain", "2.5 times the budget", "any orientation")
"""Not for `ablate`: a small job trains for as many epochs as any may already, and only cells have no up."""
FIELDS = ("set", "seed", "variant", "strategy", "images", "top1", "log_loss", "num_test", "cpu_seconds", "commit")


def recipe_for(name: str, seed: int, shared: Path, more: list[str]):
    import finetune as ft

    wishes = [f"data.root={shared / 'data' / name}", f"backbone={BACKBONE}", f"data.image_size={PIXELS[name]}"]
    return ft.load_recipe(None, [*wishes, f"seed={seed}", "tracking.enabled=false", *more])


def look_first(name: str, seed: int, shared: Path, more: list[str]) -> None:
    """Fill the caches, so that no job pays alone for what several share."""
    import finetune as ft

    ft.survey(recipe_for(name, seed, shared, [word for word in more if not word.startswith("budget=")]))


def run_plain(name: str, seed: int, shared: Path) -> dict:
    """A bare loop over the training images of the same split."""
    import torch
    import torch.nn.functional as F

    from finetune.data.augmentation import Augmentation
    from finetune.data.items import ROLES
    from finetune.data.loading import Batches
    from finetune.features.survey import _Survey

    seen = _Survey(recipe_for(name, seed, shared, []), lambda *rest: None, ROLES)
    seen._divide(looks=False)  # decodes, as every script must; extracts nothing
    store, view = seen.dataset.store, seen.dataset.store.view
    rows = {role: seen.dataset.indices(role) for role in ("train", "test")}
    labels = {role: seen.dataset.labels(role).tolist() for role in rows}
    vary = Augmentation("light", size_pixels=view.size_pixels, interpolation=view.interpolation, invariances=())
    train = Batches(store, rows["train"], labels["train"], batch_size=64, augmentation=vary, shuffle=True,
                    seed=seed, even=True)  # fmt: skip
    test = Batches(store, rows["test"], labels["test"], batch_size=64, augmentation=None, shuffle=False, seed=seed)
    torch.manual_seed(seed)
    head = torch.nn.Linear(seen.backbone.num_features, len(seen.dataset.classes))
    model = torch.nn.Sequential(seen.backbone, head).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PLAIN_RATE)
    steps = PLAIN_EPOCHS * len(train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PLAIN_RATE, total_steps=steps)
    for epoch in range(PLAIN_EPOCHS):
        train.set_epoch(epoch)
        for images, wanted, _ in train:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), wanted).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.inference_mode():
        pairs = [(model(images), wanted) for images, wanted, _ in test]
    logits, wanted = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
    return {
        "strategy": "full",
        "images": PLAIN_EPOCHS * len(train) * 64,
        "top1": float((logits.argmax(1) == wanted).double().mean()),
        "log_loss": float(F.cross_entropy(logits, wanted)),
        "num_test": len(wanted),
    }


def run_ours(name: str, seed: int, shared: Path, work: Path, more: list[str]) -> list[tuple[str, dict]]:
    """The job as a user runs it; its result and, of the same job, the probe's."""
    import finetune as ft
    from finetune.planning import stages

    own = stages.BUDGETS["cpu"]
    budget = next((int(word.partition("=")[2]) for word in more if word.startswith("budget=")), own)
    stages.BUDGETS["cpu"] = budget
    more = [word for word in more if not word.startswith("budget=")]
    run = ft.train(recipe_for(name, seed, shared, more), runs=work / "runs", say=lambda text: None)
    stages.BUDGETS["cpu"] = own
    scores, plan = run.read_json("scores.json"), run.plan
    images = sum(stage.epochs for stage in plan.stages) * sum(run.read_json("facts.json")["counts"]["train"])
    found = []
    for label, part in (("ours", scores["test"]), ("probe", scores["probe"]["test"])):
        found.append(
            (
                label,
                {
                    "strategy": str(plan.train.strategy) if label == "ours" else "probe",
                    "images": images if label == "ours" else 0,
                    "top1": part["top1"]["value"],
                    "log_loss": part["log_loss"]["value"],
                    "num_test": part["top1"]["n"],
                },
            )
        )
    return found


def run_ours_or_tell(name: str, seed: int, shared: Path, work: Path, more: list[str]) -> list[tuple[str, dict]]:
    """The same; a training that was stopped because it diverged is a result, too."""
    from finetune.errors import RunError

    try:
        return run_ours(name, seed, shared, work, more)
    except RunError as fault:
        if "diverged again" not in str(fault):
            raise
    return [("ours", {"strategy": "diverged", "images": 0, "top1": 0.0, "log_loss": 0.0, "num_test": 0})]


def run_all(shared: Path, work: Path, only: list[str], sets: list[str], results: Path) -> None:
    import torch

    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True
    )
    for seed in SEEDS:
        for variant in only:
            for name in sets:
                if any((r["set"], r["seed"], r["variant"]) == (name, str(seed), variant) for r in read_rows(results)):
                    continue
                # a whole job pays for its own survey; the small ones of a set and seed share theirs
                is_small, own = results == SMALL_RESULTS, "small" if results == SMALL_RESULTS else str(time.time_ns())
                os.environ["FINETUNE_CACHE"] = str(work / "caches" / f"{name}-{seed}-{own}")
                more = VARIANTS[variant] + (SMALL if is_small else [])
                if is_small:
                    look_first(name, seed, shared, more)
                began = time.process_time()
                if variant == "plain":
                    found = [("ours", run_plain(name, seed, shared))]
                else:
                    found = run_ours_or_tell(name, seed, shared, work, more)
                spent = time.process_time() - began
                common = {"set": name, "seed": seed, "commit": commit.stdout.strip()}
                for label, row in found:
                    if label == "probe" and variant != "default":
                        continue
                    seconds = f"{spent if label == 'ours' else 0:.1f}"
                    shown = {"top1": f"{row['top1']:.4f}", "log_loss": f"{row['log_loss']:.4f}", "cpu_seconds": seconds}
                    append_row(
                        results, FIELDS, {**row, **common, **shown, "variant": variant if label == "ours" else "probe"}
                    )
                print(json.dumps({"set": name, "seed": seed, "variant": variant, "top1": found[0][1]["top1"],
                                  "cpu_seconds": round(spent, 1)}), flush=True)  # fmt: skip


def table(results: Path) -> str:
    """Mean over seeds by set and variant, and the difference from the default on the same seeds."""
    values: dict[tuple[str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    diverged: Counter[tuple[str, str]] = Counter()
    for row in read_rows(results):
        if row["strategy"] == "diverged":
            diverged[row["variant"], row["set"]] += 1
        else:
            values[row["variant"], row["set"]][row["seed"]] = row
    variants = list(dict.fromkeys(variant for variant, _ in values))
    beside = "plain" if "plain" in variants else "default"
    sets = " | ".join(f"`{name}`" for name in PIXELS)
    lines = [f"| | {sets} | mean | against default | log loss | cost, of {beside} |", "|---" * (len(PIXELS) + 5) + "|"]
    for variant in variants:
        cells, notes, gaps, losses, costs, plains = [], [], [], [], 0.0, 0.0
        for name in PIXELS:
            own, base = values[variant, name], values["default", name]
            seeds = sorted(set(own) & set(base))
            top1 = [100 * float(own[seed]["top1"]) for seed in seeds]
            cells.append(f"{statistics.mean(top1):.1f}" if top1 else "")
            if lost := diverged[variant, name]:
                notes.append(f"`{name}` diverged in {lost} of {lost + len(top1)} runs")
            gaps += [100 * (float(own[s]["top1"]) - float(base[s]["top1"])) for s in seeds]
            losses += [float(own[s]["log_loss"]) for s in seeds]
            plain = values["plain", name] or base
            timed = [s for s in seeds if s in plain and s == ALONE]
            costs += sum(float(own[s]["cpu_seconds"]) for s in timed)
            plains += sum(float(plain[s]["cpu_seconds"]) for s in timed)
        if not gaps:
            continue
        mean = statistics.mean(float(cell) for cell in cells if cell)
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
        against = "" if variant == "default" else f"{statistics.mean(gaps):+.1f} ± {1.96 * error:.1f}"
        cost = f"{costs / plains:.2f}" if plains and variant != "probe" else ""
        name = f"{variant} ({'; '.join(notes)})" if notes else variant
        lines.append(f"| {name} | {' | '.join(cells)} | {mean:.1f} | {against} | {statistics.mean(losses):.3f} | "
                     f"{cost} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "ablate", "table"])
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--work", type=Path, default=HERE / "craft")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--sets", nargs="+", choices=list(PIXELS), default=list(PIXELS))
    arguments = parser.parse_args()
    shared, work = arguments.shared.resolve(), arguments.work.resolve()
    if arguments.what != "table":
        os.environ["FINETUNE_ZOO"] = str(shared / "zoo")
        if arguments.what == "run":
            run_all(shared, work, arguments.only or ["default", "plain"], arguments.sets, RESULTS)
        else:
            variants = arguments.only or [name for name in VARIANTS if name not in LARGE]
            run_all(shared, work, variants, arguments.sets, SMALL_RESULTS)
    for results in (RESULTS, SMALL_RESULTS):
        if results.exists():
            text = table(results)
            results.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
            print(text, end="\n\n")


if __name__ == "__main__":
    main()
