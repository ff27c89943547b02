"""What to do about uneven classes: every kind of loss on linear heads over cached features of long-tailed sets.

    python benchmarks/imbalance.py [--shared ../shared] [--work benchmarks/imbalance]     # minutes; a table

A set is cut so that its classes fall off exponentially from the largest to the smallest (Cui et al., CVPR 2019,
https://arxiv.org/abs/1901.05555, section 5.1), with another order of the classes for every seed, and judged on a
balanced test set. Balanced accuracy weights classes alike; `own` weights their recalls as the training images are
spread, which is the accuracy where images to come are as uneven. `shifted` is the plain head with the log priors taken
from its bias.
"""

import argparse
import os
import statistics
from pathlib import Path

import advice
import torch
from torch import nn

from finetune.data.loading import draw_evenly
from finetune.training.losses import log_priors, make_loss

HERE = Path(__file__).resolve().parent
SETS = ("flowers5", "cifar10_20k")
KINDS = ("none", "shifted", "inverse", "effective", "sampler", "logits", "focal")
RATIOS = (1, 2, 3, 10, 50)
SEEDS = (0, 1, 2)
LARGEST, BATCH, RATE = 400, 64, 1e-3


def read_features(name: str, shared: Path, work: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Features (N, D), scaled by those of training, and labels (N,), of training and of test."""
    from finetune.features import survey

    recipe = advice.cell_recipe(name, advice.BACKBONES[0], LARGEST, 0, shared, work, ["train.strategy=probe"])
    seen = survey.look(recipe)
    parts = [(seen.stacked(role).float(), seen.labels(role)) for role in ("train", "val", "test")]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=HERE.parents[1] / "shared")
    parser.add_argument("--work", type=Path, default=HERE / "imbalance")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--ratios", type=int, nargs="+", default=RATIOS)
    parser.add_argument("--decay", type=float, default=0.01)
    options = parser.parse_args()
    os.environ["FINETUNE_ZOO"] = str(options.shared / "zoo")
    os.environ.setdefault("FINETUNE_CACHE", str(options.work.resolve() / "cache"))
    torch.set_num_threads(1)
    print(f"| set, ratio | images | {' | '.join(KINDS)} |\n|{'---|' * (len(KINDS) + 2)}", flush=True)
    for name in SETS:
        parts = read_features(name, options.shared.resolve(), options.work.resolve())
        for ratio in options.ratios:
            compare(name, parts, ratio, options.epochs, options.decay)


if __name__ == "__main__":
    main()
