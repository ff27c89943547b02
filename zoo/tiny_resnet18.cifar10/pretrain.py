"""Pretrain the bundled backbone: a slim ResNet-18 on 20,000 CIFAR-10 images.

    python zoo/tiny_resnet18.cifar10/pretrain.py --data ../shared/data/cifar10_20k

Writes `weights.safetensors` (float16), `classes.txt` and `card.yaml` beside this file. About 20
seconds per epoch on two cores, and resumable: the state after each epoch is kept in `--state`.
Images of 32 px are drawn at 64 px, so that timm's ImageNet stem (stride 4) leaves 16 x 16 positions.
"""

import argparse
import ctypes
import hashlib
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
ARCH, ARCH_KWARGS = "resnet18", {"channels": [24, 48, 96, 128]}
SIZE_PIXELS, BATCH, PEAK_LR, WEIGHT_DECAY, SMOOTHING, MIXUP = 64, 128, 0.1, 5e-4, 0.1, 0.2


def read_split(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images (N, 3, 32, 32) as uint8, labels (N,), and the class names of the schema metadata."""
    images, labels, names = [], [], []
    for path in sorted(folder.glob(f"{split}-*.parquet")):
        table = pq.read_table(path)
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
        labels += table["label"].to_pylist()
        for record in table["image"].to_pylist():
            with Image.open(io.BytesIO(record["bytes"])) as image:
                images.append(np.asarray(image.convert("RGB")))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), names


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random scale, shift, rotation, flip, brightness, grey and cutout; (B, 3, 32, 32) to (B, 3, 64, 64)."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    angle, scale = uniform(-0.2, 0.2), uniform(0.7, 1.05)
    mirror = 1 - 2 * (torch.rand(len(images), generator=generator) < 0.5).float()
    matrix = torch.stack(
        [
            torch.stack([scale * angle.cos() * mirror, -scale * angle.sin(), uniform(-0.25, 0.25)], 1),
            torch.stack([scale * angle.sin() * mirror, scale * angle.cos(), uniform(-0.25, 0.25)], 1),
        ],
        1,
    )  # (B, 2, 3)
    grid = F.affine_grid(matrix, [len(images), 3, SIZE_PIXELS, SIZE_PIXELS], align_corners=False)
    drawn = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    drawn = drawn * uniform(0.7, 1.3)[:, None, None, None] + uniform(-0.3, 0.3)[:, None, None, None]
    grey = (torch.rand(len(images), generator=generator) < 0.1)[:, None, None, None]
    drawn = torch.where(grey, drawn.mean(1, keepdim=True), drawn)
    axis = torch.arange(SIZE_PIXELS)
    row, column = uniform(0, SIZE_PIXELS)[:, None], uniform(0, SIZE_PIXELS)[:, None]
    half = SIZE_PIXELS / 8
    hole = ((axis - row).abs() < half)[:, None, :, None] & ((axis - column).abs() < half)[:, None, None, :]
    return drawn.masked_fill(hole, 0.0).contiguous(memory_format=torch.channels_last)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 %, then cosine to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return PEAK_LR * (step + 1) / warm
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of (N, 3, 32, 32) normalised images classified right, upsampled to 64 px."""
    model.eval()
    hits = 0
    with torch.inference_mode():
        for start in range(0, len(images), 250):
            batch = F.interpolate(images[start : start + 250], size=SIZE_PIXELS, mode="bilinear", align_corners=False)
            hits += int((model(batch).argmax(1) == labels[start : start + 250]).sum())
    return hits / len(images)


def write_card(
    model: torch.nn.Module,
    names: list[str],
    mean: list[float],
    std: list[float],
    top1: float,
    num_test: int,
    epochs: int,
) -> None:
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    state = {name: value.contiguous() for name, value in state.items()}
    save_file(state, HERE / "weights.safetensors")
    (HERE / "weights.safetensors").chmod(0o644)
    (HERE / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    digest = hashlib.sha256((HERE / "weights.safetensors").read_bytes()).hexdigest()
    card = {
        "name": HERE.name,
        "arch": ARCH,
        "arch_kwargs": ARCH_KWARGS,
        "num_classes": len(names),
        "classes": "classes.txt",
        "pretrained_on": "CIFAR-10, 20,000 training images",
        "input_size": [3, SIZE_PIXELS, SIZE_PIXELS],
        "mean": mean,
        "std": std,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "params_m": round(sum(p.numel() for p in model.parameters()) / 1e6, 3),
        "source": {
            "project": "finetune",
            "file": "pretrain.py",
            "licence": "Apache-2.0",
            "note": f"trained from random weights for {epochs} epochs by the script beside this card",
        },
        "sha256": digest,
        "weights": {"file": "weights.safetensors", "dtype": "float16"},
        "measured": {
            "images": f"the {num_test} test images of cifar10_20k, float16 weights",
            "top1": round(100 * top1, 2),
        },
    }
    (HERE / "card.yaml").write_text(yaml.safe_dump(card, sort_keys=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the CIFAR-10 parquet shards")
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--state", type=Path, default=Path("pretrain.ckpt"), help="where to keep the resumable state")
    arguments = parser.parse_args()
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: keep freed activations instead of paying page faults
    libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_images, train_labels, names = read_split(arguments.data, "train")
    test_images, test_labels, _ = read_split(arguments.data, "test")
    pixels = train_images.double().div(255).transpose(0, 1).flatten(1)  # (3, N * 32 * 32)
    mean, std = [round(v, 4) for v in pixels.mean(1).tolist()], [round(v, 4) for v in pixels.std(1).tolist()]
    shift, scale = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    model = timm.create_model(ARCH, num_classes=len(names), **ARCH_KWARGS).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=PEAK_LR,
        momentum=0.9,
        nesterov=True,
    )
    steps_per_epoch = len(train_images) // BATCH
    first = 0
    if arguments.state.exists():
        state = torch.load(arguments.state, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"] + 1
    for epoch in range(first, arguments.epochs):
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(train_images), generator=generator)
        model.train()
        began, total = time.time(), 0.0
        for step in range(steps_per_epoch):
            rows = order[step * BATCH : (step + 1) * BATCH]
            labels = F.one_hot(train_labels[rows], len(names)).float()
            images = augment((train_images[rows].float() / 255 - shift) / scale, generator)
            share = np.random.default_rng([epoch, step]).beta(MIXUP, MIXUP)
            images, labels = (
                share * images + (1 - share) * images.flip(0),
                share * labels + (1 - share) * labels.flip(0),
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * steps_per_epoch + step, arguments.epochs * steps_per_epoch)
            with torch.autocast(device, torch.bfloat16):
                logits = model(images.to(device))
            loss = F.cross_entropy(logits.float(), labels.to(device), label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, arguments.state)
        line = f"epoch {epoch + 1}/{arguments.epochs} loss {total / steps_per_epoch:.4f} {time.time() - began:.0f} s"
        print(line, flush=True)
    model = model.half().float().cpu()  # what is written is what is measured
    top1 = accuracy(model, (test_images.float() / 255 - shift) / scale, test_labels)
    print(f"test accuracy {100 * top1:.2f} % of {len(test_labels)}")
    write_card(model, names, mean, std, top1, len(test_labels), arguments.epochs)


if __name__ == "__main__":
    main()
