"""What to do about uneven classes: every kind of loss on linear heads over cached features of long-tailed sets.

    python benchmarks/imbalance.py [--shared ../shared] [--work benchmarks/imbalance]     # minutes; a table
    python benchmarks/imbalance.py --tuned                                                # the same, fine-tuned

A set is cut so that its classes fall off exponentially from the largest to the smallest (Cui et al., CVPR 2019,
https://arxiv.org/abs/1901.05555, section 5.1), with another order of the classes for every seed, and judged on a
balanced test set. Balanced accuracy weights classes alike; `own` weights their recalls as the training images are
spread, which is the accuracy where images to come are as uneven. `shifted` is the plain head with the log priors taken
from its bias.
"""

import argparse
import os
import statistics
from itertools import product
from pathlib import Path

import advice
import numpy as np
import torch
from torch import nn

from finetune.data.loading import draw_evenly
from finetune.training.losses import log_priors, make_loss

HERE = Path(__file__).resolve().parent
SETS = ("flowers5", "cifar10_20k")
KINDS = ("none", "shifted", "inverse", "effective", "sampler", "logit_adjustment", "focal")
RATIOS = (1, 2, 3, 10, 50)
SEEDS = (0, 1, 2)
LARGEST, BATCH, RATE = 400, 64, 1e-3
TUNED, TEST = {"flowers5": 150, "malaria": 200, "sign_digits": 100}, 60
"""Images of the largest class, by set, and test images per class, where a network is fine-tuned."""


def read_features(name: str, shared: Path, work: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Features (N, D), scaled by those of training, and labels (N,), of training and of test."""
    from finetune.features import survey

    recipe = advice.cell_recipe(name, advice.BACKBONES[0], LARGEST, 0, shared, work, ["train.strategy=probe"])
    seen = survey.look(recipe)
    parts = [(seen.features(role).float(), seen.dataset.labels(role)) for role in ("train", "val", "test")]
    features, labels = (torch.cat([part[k] for part in parts[:2]]) for k in (0, 1))
    mean, std = features.mean(0), features.std()
    return [((features - mean) / std, labels), ((parts[2][0] - mean) / std, parts[2][1])]


def cut_tail(labels: torch.Tensor, ratio: int, seed: int) -> torch.Tensor:
    """Rows of a long tail; nested in that of a smaller ratio."""
    generator = torch.Generator().manual_seed(seed)
    num_classes, most = int(labels.max()) + 1, int(labels.bincount().min())
    order, rows = torch.randperm(num_classes, generator=generator).tolist(), []
    for place, label in enumerate(order):
        members = torch.nonzero(labels == label)[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        rows.append(members[: round(most * ratio ** (-place / (num_classes - 1)))])
    return torch.cat(rows)


def train_head(
    features: torch.Tensor, labels: torch.Tensor, kind: str, epochs: int, decay: float, seed: int
) -> nn.Linear:
    """A linear head from zero by AdamW, with the rate falling linearly."""
    counts = labels.bincount().tolist()
    loss = make_loss("none" if kind == "shifted" else kind, counts)  # type: ignore[arg-type]
    head = nn.Linear(features.shape[1], len(counts))
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=decay)
    steps = epochs * -(-len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        if kind == "sampler":
            order = torch.from_numpy(draw_evenly(labels.numpy(), seed=seed, epoch=epoch))[order]
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            (loss(head(features[rows]), labels[rows]).sum() / len(rows)).backward()
            optimizer.step()
            schedule.step()
    if kind == "shifted":
        with torch.no_grad():
            head.bias -= log_priors(counts).float()
    return head


@torch.inference_mode()
def judge(head: nn.Linear, features: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
    """Per cent right, with classes alike and with classes as in training."""
    is_right = (head(features).argmax(1) == labels).double()
    recalls = torch.stack([is_right[labels == label].mean() for label in range(len(counts))])
    return 100 * float(recalls.mean()), 100 * float(recalls @ (counts / counts.sum()).double())


def compare(name: str, parts: list[tuple[torch.Tensor, torch.Tensor]], ratio: int, epochs: int, decay: float) -> None:
    """Print one row: by kind, balanced and own accuracy, as means over seeds, and the gain of each over `none`."""
    (features, labels), test = parts
    scores: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for seed in SEEDS:
        rows = cut_tail(labels, ratio, seed)
        for kind in KINDS:
            head = train_head(features[rows], labels[rows], kind, epochs, decay, seed)
            scores[kind].append(judge(head, *test, labels[rows].bincount()))
    cells = []
    for kind in KINDS:
        gains = [one[0] - plain[0] for one, plain in zip(scores[kind], scores["none"], strict=True)]
        spread = "" if kind == "none" else f" ({statistics.mean(gains):+.1f} ± {statistics.stdev(gains):.1f})"
        balanced, own = (statistics.mean(score[k] for score in scores[kind]) for k in (0, 1))
        cells.append(f"{balanced:.1f}{spread}, {own:.1f}")
    print(f"| `{name}`, {ratio} | {len(rows)} | {' | '.join(cells)} |", flush=True)


def tail_table(name: str, largest: int, ratio: int, shared: Path, work: Path) -> tuple[Path, dict[str, int]]:
    """A table of a long tail and of even test images, and how many images of each class train."""
    base = advice.cell_table(name, largest, 0, shared, work)
    rows = [line.rsplit(",", 2) for line in base.read_text().splitlines()[1:]]
    names, counts, lines = sorted({row[1] for row in rows}), {}, ["image,label,split"]
    for place, label in enumerate(np.random.default_rng(0).permutation(len(names)).tolist()):
        own = {role: [row for row in rows if row[1:] == [names[label], role]] for role in ("train", "test")}
        few = max(2, round(len(own["train"]) * ratio ** (-place / (len(names) - 1))))
        counts[names[label]] = few
        lines += [",".join(row) for row in (*own["train"][:few], *own["test"][:TEST])]
    path = work / "tails" / f"{name}-{largest}-{ratio}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path, counts


def judge_answers(probabilities: np.ndarray, labels: np.ndarray, share: np.ndarray) -> str:
    """Balanced accuracy, accuracy at the proportions `share` of the classes, and log loss at those."""
    losses = -np.log(probabilities[np.arange(len(labels)), labels].clip(1e-12))
    is_right = probabilities.argmax(1) == labels
    recalls, means = (np.array([one[labels == k].mean() for k in range(len(share))]) for one in (is_right, losses))
    return f"{100 * recalls.mean():.1f}, {100 * recalls @ share:.1f}, {means @ share:.2f}"


def tune(name: str, largest: int, ratio: int, epochs: int, strategy: str, shared: Path, work: Path) -> None:
    """Print one row: probe, probe without its priors, and the fine-tuned network by kind of loss."""
    import finetune as ft

    path, counts = tail_table(name, largest, ratio, shared, work)
    wishes = [f"data.root={path}", "backbone=tiny_resnet18.cifar10", "data.image_size=32", "data.invariances=[hflip]"]
    wishes += ["data.split.calibration=0", "evaluate.calibrate=false", "tracking.enabled=false"]
    wishes += [f"train.strategy={strategy}", f"train.epochs={epochs}"]
    cells: list[str] = []
    for kind in ("none", "logit_adjustment", "inverse"):
        recipe = ft.load_recipe(None, [*wishes, f"train.imbalance.kind={kind}"])
        run = ft.train(recipe, runs=work / "runs", say=lambda text: None)
        arrays, share = np.load(run.file("predictions.npz")), np.array([counts[label] for label in run.plan.classes])
        share, labels = share / share.sum(), arrays["test_labels"]
        if not cells:
            probe = arrays["probe_test_probabilities"].astype(float)
            adjusted = (probe / share) / (probe / share).sum(1, keepdims=True)
            cells = [judge_answers(answers, labels, share) for answers in (probe, adjusted)]
        cells.append(judge_answers(arrays["test_probabilities"].astype(float), labels, share))
    print(f"| `{name}`, {ratio}, {epochs} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=HERE.parents[1] / "shared")
    parser.add_argument("--work", type=Path, default=HERE / "imbalance")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--ratios", type=int, nargs="+", default=RATIOS)
    parser.add_argument("--decay", type=float, default=0.01)
    parser.add_argument("--tuned", action="store_true", help="fine-tune the bundled backbone instead")
    options = parser.parse_args()
    os.environ["FINETUNE_ZOO"] = str(options.shared / "zoo")
    os.environ.setdefault("FINETUNE_CACHE", str(options.work.resolve() / "cache"))
    torch.set_num_threads(1)
    if options.tuned:
        print(
            f"| set, ratio, epochs | probe | adjusted | none | logit_adjustment | inverse |\n|{'---|' * 6}", flush=True
        )
        for name, largest in TUNED.items():
            for ratio, (epochs, strategy) in product((10, 100), ((3, "full"), (10, "partial"))):
                tune(name, largest, ratio, epochs, strategy, options.shared.resolve(), options.work.resolve())
        return
    print(f"| set, ratio | images | {' | '.join(KINDS)} |\n|{'---|' * (len(KINDS) + 2)}", flush=True)
    for name in SETS:
        parts = read_features(name, options.shared.resolve(), options.work.resolve())
        for ratio in options.ratios:
            compare(name, parts, ratio, options.epochs, options.decay)


if __name__ == "__main__":
    main()
