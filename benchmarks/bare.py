"""What the same work costs in plain PyTorch: the other side of every ratio in `speed.py`.

    python benchmarks/bare.py probe FOLDER CARD_FOLDER PIXELS
    python benchmarks/bare.py train FOLDER CARD_FOLDER PIXELS --tuned|--default

`probe` decodes every image below FOLDER and passes it forward once. `train` is the shortest honest loop:
the same images, pixels, batch, augmentation, optimizer and frozen batch-norm statistics as a default
full fine-tuning, either with our process settings and decoded images kept (`--tuned`), or as PyTorch
comes, decoding JPEG in each epoch (`--default`). Each prints one JSON object.
"""

import argparse
import json
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

BATCH, EPOCHS = 64, 2


def load(card_folder: Path) -> tuple[torch.nn.Module, dict]:
    card = yaml.safe_load((card_folder / "card.yaml").read_text())
    model = timm.create_model(card["arch"], num_classes=card["num_classes"], **card["arch_kwargs"])
    model.load_state_dict({k: v.float() for k, v in load_file(card_folder / "weights.safetensors").items()})
    return model, card


class Files(Dataset):
    def __init__(self, paths, labels, transform):
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


def plain_view(card: dict, pixels: int) -> v2.Compose:
    return v2.Compose(
        [
            v2.Resize(int(pixels / card["crop_pct"]), v2.InterpolationMode.BILINEAR),
            v2.CenterCrop(pixels),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(card["mean"], card["std"]),
        ]
    )


def probe(folder: Path, card_folder: Path, pixels: int, workers: int) -> dict:
    model, card = load(card_folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    loader = DataLoader(Files(paths, [0] * len(paths), plain_view(card, pixels)), batch_size=BATCH, num_workers=workers)
    began, rows = time.perf_counter(), []
    model.eval().reset_classifier(0)
    with torch.inference_mode():
        for images, _ in loader:
            rows.append(model(images))
    return {"images": len(paths), "shape": list(torch.cat(rows).shape), "seconds": time.perf_counter() - began}


def train(folder: Path, card_folder: Path, pixels: int, per_class: int, tuned: bool) -> dict:
    if tuned:
        from finetune.process import tune_process

        tune_process()
    model, card = load(card_folder)
    classes = sorted(path.name for path in folder.iterdir())
    pairs = [(p, k) for k, name in enumerate(classes) for p in sorted((folder / name).iterdir())[:per_class]]
    paths, labels = [p for p, _ in pairs], [k for _, k in pairs]
    model.reset_classifier(len(classes))
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    if tuned:
        model.to(memory_format=torch.channels_last)
        batches = tuned_batches(paths, labels, card, pixels)
    else:
        view = v2.Compose(
            [
                v2.RandomResizedCrop(pixels, scale=(0.5, 1.0)),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(card["mean"], card["std"]),
            ]
        )
        batches = DataLoader(Files(paths, labels, view), batch_size=BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    speeds = []
    for epoch in range(EPOCHS):
        if tuned:
            batches.set_epoch(epoch)
        began, count = time.perf_counter(), 0
        for images, targets, *_ in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            count += len(targets)
        speeds.append(count / (time.perf_counter() - began))
    return {"images_per_second": speeds}


def tuned_batches(paths: list, labels: list, card: dict, pixels: int):
    """Decoded images kept in memory, and the same augmentation as the tool's."""
    from finetune.config.card import View
    from finetune.data.augmentation import Augmentation
    from finetune.data.items import Item
    from finetune.data.loading import Batches, ImageStore

    view = View(
        size_pixels=pixels,
        shorter_pixels=int(pixels / card["crop_pct"]),
        interpolation=card["interpolation"],
        mean=tuple(card["mean"]),
        std=tuple(card["std"]),
    )
    items = [Item(name=p.name, label=k, role=None, file=p) for p, k in zip(paths, labels, strict=True)]
    store = ImageStore(items, view, int(4e9))
    for index in range(len(items)):
        store.get(index)
    vary = Augmentation("light", size_pixels=pixels, interpolation=card["interpolation"], invariances=("hflip",))
    return Batches(
        store,
        list(range(len(items))),
        labels,
        batch_size=BATCH,
        augmentation=vary,
        shuffle=True,
        seed=0,
        even=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["probe", "train"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("card", type=Path)
    parser.add_argument("pixels", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--per-class", type=int, default=120)
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--default", action="store_true")
    a = parser.parse_args()
    if a.what == "probe":
        print(json.dumps(probe(a.folder, a.card, a.pixels, a.workers)))
    else:
        print(json.dumps(train(a.folder, a.card, a.pixels, a.per_class, a.tuned)))


if __name__ == "__main__":
    main()
