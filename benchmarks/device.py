"""What the tool does on a GPU: whether the main job runs there, how fast, and cells of the native grid.

    python benchmarks/device.py --shared SHARED --out OUT [--commit HASH] [--dry] [--only jobs speed] [--seconds 360]

One short script for a bare machine. `--dry` runs the same on a CPU, smaller. JSON lines are written to OUT/device.jsonl
as they come, the most valuable first; a part that fails writes its fault and the next part goes on.

1. jobs: `finetune train` on photographs in bf16, fp16 and 32 bits; killed and resumed; out of memory on a full card.
2. speed: images per second of full fine-tuning and of extraction, in the tool and in a bare loop over images that
   already lie on the card, at 224 px; and the share of an epoch spent waiting for data.
Cells of the grid are a script of their own, `grid.py`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
NETWORKS = ("resnet50", "convnext_tiny", "vit_small_patch16_224")


class Notes:
    """Lines of results; also printed."""

    def __init__(self, path: Path, **common: object) -> None:
        self.path, self.common = path, common

    def add(self, **values: object) -> None:
        line = json.dumps({**self.common, **values}, default=str)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def finetune(words: list[str], env: dict[str, str], limit: float = 240.0) -> tuple[int, str, float]:
    """Exit code, what was said, and seconds of one command."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "finetune", *words], env=env, capture_output=True, text=True,
                          timeout=limit, check=False)  # fmt: skip
    return done.returncode, done.stderr + done.stdout, time.perf_counter() - began


def newest(runs: Path) -> Path:
    return max((path for path in runs.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)


def scores_of(run: Path) -> dict[str, float]:
    found = json.loads((run / "scores.json").read_text())
    return {"test": found["test"]["top1"]["value"], "log_loss": found["test"]["log_loss"]["value"],
            "probe": found["probe"]["test"]["top1"]["value"]}  # fmt: skip


def wish(images: Path, size: int, epochs: int, *more: str) -> list[str]:
    return ["train", str(images), "backbone=mobilenetv2_100.imagenet_keras", f"data.image_size={size}",
            "train.strategy=partial", f"train.epochs={epochs}", "tracking.enabled=false", *more]  # fmt: skip


def jobs(images: Path, out: Path, notes: Notes, env: dict[str, str], dry: bool) -> None:
    """The default job in every precision, then killed and resumed."""
    size, epochs = (64, 2) if dry else (224, 8)
    done: dict[str, Path] = {}
    for precision in ("auto", "auto", "32") if dry else ("bf16", "bf16", "fp16", "32"):
        code, said, seconds = finetune(wish(images, size, epochs, f"hardware.precision={precision}"), env)
        if code:
            notes.add(part="job", precision=precision, exit=code, said=said[-1500:])
            continue
        run = newest(out / "runs")
        plan = next(line for line in (run / "plan.yaml").read_text().splitlines() if line.startswith("  precision:"))
        notes.add(
            part="job", precision=precision, exit=0, seconds=round(seconds, 1), plan=plan.strip(), **scores_of(run)
        )
        if precision in done:
            notes.add(part="repeat", precision=precision, same_weights=_same_weights(done[precision], run))
        done[precision] = run
    _killed(images, out, notes, env, size, epochs, next(iter(done.values()), None))


def _killed(
    images: Path, out: Path, notes: Notes, env: dict[str, str], size: int, epochs: int, whole: Path | None
) -> None:
    words = wish(images, size, epochs, "hardware.precision=" + ("auto" if epochs == 2 else "bf16"))
    process = subprocess.Popen([sys.executable, "-m", "finetune", *words], env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "epoch 1/" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    run = newest(out / "runs")
    code, said, seconds = finetune(["resume", str(run)], env)
    found = scores_of(run) if not code else {}
    same = _same_weights(whole, run) if whole is not None and not code else None
    notes.add(part="killed and resumed", exit=code, seconds=round(seconds, 1), same_weights=same, **found,
              **({"said": said[-1500:]} if code else {}))  # fmt: skip


def _same_weights(one: Path, other: Path) -> dict[str, float | bool]:
    import torch
    from safetensors.torch import load_file

    first, second = (load_file(next(run.glob("stages/*/weights.safetensors"))) for run in (one, other))
    gap = max(float((first[key].float() - second[key].float()).abs().max()) for key in first)
    return {"bitwise": all(torch.equal(first[key], second[key]) for key in first), "largest_difference": gap}


def full_card(images: Path, out: Path, notes: Notes, env: dict[str, str]) -> None:
    """Another process holds nearly all of the card; a batch that would need more must be cut, not fail."""
    hold = ("import sys, time, torch; free, _ = torch.cuda.mem_get_info(); "
            "kept = torch.empty(int(free - float(sys.argv[1])), dtype=torch.uint8, device='cuda'); "
            "print('held', flush=True); time.sleep(200)")  # fmt: skip
    for left in (5.5e9, 3.0e9):
        holder = subprocess.Popen([sys.executable, "-c", hold, str(left)], stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        holder.stdout.readline()
        words = wish(images, 224, 2, "train.batch_size=256", "hardware.precision=32", "train.strategy=full")
        code, said, seconds = finetune(words, env)
        holder.kill()
        holder.wait()
        cut = [line for line in said.splitlines() if "out of memory" in line.lower()]
        notes.add(part="full card", left_gb=left / 1e9, exit=code, cut=cut[:6], seconds=round(seconds, 1),
                  **({"said": said[-1500:]} if code else scores_of(newest(out / "runs"))))  # fmt: skip


def draw_images(folder: Path, count: int, side: int) -> None:
    """Drawn JPEG photographs of two classes, once."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for index in range(count):
        name = "ab"[index % 2]
        small = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        path = folder / name / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


def speed(out: Path, notes: Notes, env: dict[str, str], dry: bool) -> None:
    """Ours through the front door, and a bare loop over resident tensors, network by network."""
    count, epochs = (64, 2) if dry else (2048, 3)
    networks = ("test_resnet",) if dry else NETWORKS
    images = out / "drawn"
    draw_images(images, count, 256)
    for network in networks:
        bare = bare_speed(network, dry)
        words = ["train", str(images), f"backbone={network}", "pretrained=false", f"train.epochs={epochs}",
                 "train.checkpoint=last", "tracking.enabled=false", "data.split.val=0.05", "data.split.test=0.05",
                 "data.split.calibration=0", "data.invariances=[]"]  # fmt: skip
        code, said, seconds = finetune(words, env)
        if code:
            notes.add(part="speed", network=network, exit=code, said=said[-1500:], **bare)
            continue
        import csv

        with (newest(out / "runs") / "curves.csv").open() as file:
            ours = [float(row["value"]) for row in csv.DictReader(file) if row["name"] == "images_per_second"]
        notes.add(part="speed", network=network, train_images_per_second=[round(one) for one in ours],
                  seconds=round(seconds, 1), of_bare=round(max(ours) / bare["bare_train"], 3), **bare)  # fmt: skip


def bare_speed(network: str, dry: bool) -> dict[str, float]:
    """Images per second of a bare training step and a bare forward pass over tensors that lie on the device."""
    import timm
    import torch
    import torch.nn.functional as F

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(network, num_classes=2).to(device, memory_format=torch.channels_last)
    size = model.default_cfg.get("input_size", (3, 224, 224))[-1]
    batch = 16 if dry else 64
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def look() -> None:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            model(images)

    rates = {}
    for name, work, mode in (("bare_train", step, True), ("bare_forward", look, False)):
        model.train(mode)
        times = 2 if dry else 30
        for warm in (True, False):
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(max(1, times // 3) if warm else times):
                work()
            if device == "cuda":
                torch.cuda.synchronize()
            rates[name] = round(batch * times / (time.perf_counter() - began), 1)
    return rates


def extraction(images: Path, out: Path, notes: Notes, env: dict[str, str], dry: bool) -> None:
    """Extraction of every depth's features, nothing cached, beside the bare forward pass; decoding is in it."""
    for network in ("test_resnet",) if dry else ("resnet50", "vit_small_patch16_224"):
        shutil.rmtree(out / "cache", ignore_errors=True)
        code = (
            "import sys, time, json, finetune as ft\n"
            "from finetune.data.sources import open_source\n"
            "from finetune.features import survey\n"
            "import finetune.models.backbones as b\n"
            "recipe = ft.load_recipe(sys.argv[1], [f'backbone={sys.argv[2]}', 'pretrained=false'])\n"
            "work = survey._Survey(recipe, lambda *a: None, survey.ROLES)\n"
            "data, view = work.dataset, work.dataset.store.view\n"
            "from finetune.features.cache import FeatureCache\n"
            "from finetune.features.extraction import extract\n"
            "for turn in (0, 1):\n"
            "    began = time.perf_counter()\n"
            "    cache = FeatureCache(str(turn) + work.backbone.digest[1:], view.digest, work.compute.precision)\n"
            "    found = extract(data.items, data.digests, range(len(data.digests)), view,\n"
            "        backbone=work._freeze, cache=cache, store=None, compute=work.compute,\n"
            "        progress=lambda *a: None)\n"
            "    seconds = time.perf_counter() - began\n"
            "print(json.dumps({'images': found.misses, 'seconds': seconds, 'rate': found.misses / seconds,\n"
            "    'precision': work.compute.precision, 'device': work.compute.device}))\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(images), network], env=env, capture_output=True,
                              text=True, timeout=200, check=False)  # fmt: skip
        found = json.loads(done.stdout) if not done.returncode else {"said": done.stderr[-1500:]}
        notes.add(part="extraction", network=network, **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--images", default="flowers5", help="set of the jobs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--only", nargs="+", default=["jobs", "full_card", "speed", "extraction"])
    arguments = parser.parse_args()
    import torch

    out = arguments.out.resolve()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "FINETUNE_ZOO": str(arguments.shared.resolve() / "zoo"), "FINETUNE_RUNS": str(out / "runs"),
           "FINETUNE_CACHE": str(out / "cache"),
           "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}  # fmt: skip
    has_gpu = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if has_gpu else "cpu"
    notes = Notes(out / "device.jsonl", card=card, commit=arguments.commit, torch=torch.__version__)
    images = arguments.shared.resolve() / "data" / arguments.images
    parts = {
        "jobs": lambda: jobs(images, out, notes, env, arguments.dry),
        "full_card": lambda: (
            full_card(images, out, notes, env) if has_gpu else notes.add(part="full card", said="no GPU")
        ),
        "speed": lambda: speed(out, notes, env, arguments.dry),
        "extraction": lambda: extraction(out / "drawn", out, notes, env, arguments.dry),
    }  # fmt: skip
    for name in arguments.only:
        began = time.perf_counter()
        try:
            parts[name]()
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError, StopIteration, KeyError) as fault:
            notes.add(part=name, fault=f"{type(fault).__name__}: {fault}", where=traceback.format_exc()[-800:])
        notes.add(part=f"{name}, in all", seconds=round(time.perf_counter() - began, 1))


if __name__ == "__main__":
    main()
