"""Every recipe key is wired: each value other than the default changes a tiny run, or is refused, or is named as idle.

Formulas have tests of their own; here only that what a recipe says arrives where it is used. A key, or a choice of
one, that is added without an entry fails.
"""

import contextlib
import json
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import draw_shapes
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

import finetune as ft
from finetune import pipeline, preparing
from finetune.config.recipe import Recipe, recipe_keys
from finetune.data import decoding, loading
from finetune.errors import FinetuneError
from finetune.features.viewing import measure_machine
from finetune.planning import matrix
from finetune.tracking.tracker import default_uri
from finetune.training import fit

BASE = (
    "data.root={images} backbone=small_resnet data.image_size=32 data.invariances=[] augment.preset=none "
    "head.init=zero train.strategy=full train.epochs=1 train.batch_size=8 tracking.enabled=false data.split.refit=false"
)


@dataclass(frozen=True)
class Case:
    """A key, a value, what it does to a run, and which other wishes it takes; `says` is part of the answer in words."""

    key: str
    value: str
    does: str
    beside: str = ""
    says: str = ""

    @property
    def wishes(self) -> list[str]:
        return [*self.beside.split(), f"{self.key}={self.value}"]


def of(does: str, *rows: str, beside: str = "") -> list[Case]:
    """Cases that do the same, each written as `key=value`, or `key=value | other wishes`, or `... | ... | words`."""
    cases = []
    for row in rows:
        wish, *rest = (part.strip() for part in row.split("|"))
        key, _, value = wish.partition("=")
        own = rest[0] if rest else ""
        cases.append(Case(key, value, does, f"{beside} {own}".strip(), rest[1] if len(rest) > 1 else ""))
    return cases


WEIGHTS = [
    *of("weights", "backbone=small_vit", "pretrained=false", "seed=1", "data.image_size=48", "data.crop_pct=0.6"),
    *of("weights", "data.interpolation=nearest", "data.interpolation=bicubic"),
    *of("weights", "data.interpolation=bilinear", beside="data.interpolation=nearest"),
    *of("weights", "data.normalize=channel_mean", "data.normalize=channel_mean_std", "data.mean=[0.1,0.2,0.3]"),
    *of("weights", "data.value_range=[0,900]", "data.frame=middle", "data.frame=each", beside="data.root={deep}"),
    *of("weights", "data.std=[0.1,0.2,0.3]", "data.normalize=weights | data.normalize=channel_mean"),
    *of("weights", "data.invariances=[hflip]", "data.invariances=[vflip]", beside="augment.preset=light"),
    *of("weights", "data.invariances=[rot90]", "data.flip_label_pairs=[[disc,square]]", beside="augment.preset=light"),
    *of("weights", "augment.preset=light", "augment.preset=medium", "augment.preset=heavy"),
    *of("weights", "augment.preset=none | augment.preset=light", "augment.crop=scale | augment.preset=light"),
    *of("weights", "augment.domain=document", "augment.domain=medical", beside="augment.preset=medium"),
    *of("weights", "augment.domain=fine", "augment.domain=tiny", beside="augment.preset=medium"),
    *of("weights", "augment.domain=natural", beside="augment.preset=medium augment.domain=tiny"),
    *of("weights", "augment.rotate_degrees=40", "augment.pca_color=0.5", "augment.cutout=0.5"),
    *of("weights", "augment.policy=trivial", "augment.policy=rand", "augment.mixup=1", "augment.cutmix=1"),
    *of("weights", "head.kind=mlp", "head.kind=cosine | head.init=small"),
    *of("weights", "head.hidden=16", "head.activation=tanh", "head.bias=0.1", beside="head.kind=mlp"),
    *of("weights", "head.init=probe", "head.init=small", "head.init=uniform", "head.init=xavier"),
    *of("weights", "head.init=kaiming", "head.init=model", "head.init=zero | head.init=small"),
    *of("weights", "head.dropout=0.5", "head.drop_connect=0.5", "regularization.label_smoothing=0.2"),
    *of("weights", "regularization.stochastic_depth=0.5", "regularization.channel_dropout=0.5"),
    *of("weights", "regularization.l2_sp=1", beside="train.optimizer.lr=0.01"),
    *of("weights", "regularization.fractional_pooling=true", beside="train.reinit=1 data.image_size=96"),
    *of("weights", "train.strategy=probe", "train.strategy=partial", "train.strategy=surgical"),
    *of("weights", "train.strategy=norm_only", "train.strategy=bitfit", "train.strategy=full | train.strategy=partial"),
    *of("weights", "train.strategy=gradual | train.epochs=2", "train.strategy=lora | backbone=small_vit"),
    *of("weights", "train.lora_rank=2", beside="backbone=small_vit train.strategy=lora"),
    *of("weights", "train.depth=1", "train.layers=[layer4]", beside="train.strategy=partial"),
    *of("weights", "train.reinit=1", "train.freezes_first=true", "train.epochs=2", "train.batch_size=4"),
    *of("weights", "train.optimizer.name=sgd", "train.optimizer.name=momentum", "train.optimizer.name=nesterov"),
    *of("weights", "train.optimizer.name=adagrad", "train.optimizer.name=rmsprop", "train.optimizer.name=timm/lion"),
    *of("weights", "train.optimizer.name=adamw | train.optimizer.name=sgd"),
    *of("weights", "train.optimizer.name=lbfgs | train.batch_size=64 train.optimizer.weight_decay=0"),
    *of("weights", "train.optimizer.lr=0.01", "train.optimizer.backbone_lr_ratio=0.01"),
    *of("weights", "train.optimizer.layer_decay=0.5", "train.optimizer.weight_decay=0.5"),
    *of("weights", "train.optimizer.decay=coupled", beside="train.optimizer.name=adam"),
    *of("weights", "train.optimizer.decay=coupled", beside="train.optimizer.name=sgd"),
    *of("weights", "train.optimizer.momentum=0.5", beside="train.optimizer.name=momentum"),
    *of("weights", "train.optimizer.rho=0.5", beside="train.optimizer.name=rmsprop"),
    *of("weights", "train.optimizer.betas=[0.5,0.9]", "train.optimizer.eps=0.1"),
    *of("weights", "train.schedule.name=constant", "train.schedule.name=step", beside="train.epochs=2"),
    *of("weights", "train.schedule.name=multistep", "train.schedule.name=exponential", beside="train.epochs=2"),
    *of("weights", "train.schedule.name=inverse", "train.schedule.name=linear", beside="train.epochs=2"),
    *of("weights", "train.schedule.name=plateau", "train.schedule.name=one_cycle", beside="train.epochs=2"),
    *of("weights", "train.schedule.name=cosine | train.schedule.name=constant train.epochs=2"),
    *of(
        "weights", "train.schedule.name=cyclic", "train.schedule.name=cosine_restarts", beside="train.schedule.cycles=2"
    ),
    *of("weights", "train.schedule.warmup_fraction=0.7", "train.schedule.end=0.5", beside="train.epochs=2"),
    *of(
        "weights",
        "train.schedule.gamma=0.5",
        "train.schedule.every=0.7",
        beside="train.epochs=2 train.schedule.name=step",
    ),
    *of("weights", "train.schedule.milestones=[0.3]", beside="train.epochs=2 train.schedule.name=multistep"),
    *of("weights", "train.schedule.decades=1", beside="train.epochs=2 train.schedule.name=exponential"),
    *of("weights", "train.schedule.cycles=3", beside="train.schedule.name=cyclic train.schedule.cycles=2"),
    *of("weights", "train.schedule.growth=3", beside="train.schedule.name=cosine_restarts train.schedule.cycles=2"),
    *of("weights", "train.averaging.kind=ema", "train.averaging.kind=swa", beside="train.epochs=2"),
    *of("weights", "train.averaging.kind=none", "train.averaging.ema_decay=0.5", beside="train.averaging.kind=ema"),
    *of("weights", "train.averaging.wise_ft=0.5", beside="head.init=probe"),
    *of("weights", "train.averaging.swa_start=0.3", beside="train.epochs=2 train.averaging.kind=swa"),
    *of("weights", "train.averaging.swa_lr=0.1", beside="train.epochs=2 train.averaging.kind=swa"),
    *of("weights", "train.averaging.batch_norm=exact", beside="train.averaging.kind=ema train.batch_norm=train"),
    *of("weights", "train.imbalance.kind=sampler", beside="data.root={uneven} train.imbalance.kind=none"),
    *of("weights", "train.imbalance.kind=none | data.root={uneven} train.imbalance.kind=logit_adjustment"),
    *of("weights", "train.imbalance.kind=inverse", beside="data.root={uneven} train.imbalance.kind=none"),
    *of("weights", "train.imbalance.kind=effective", beside="data.root={uneven} train.imbalance.kind=none"),
    *of("weights", "train.imbalance.kind=focal", beside="data.root={uneven} train.imbalance.kind=none"),
    *of("weights", "train.imbalance.kind=logit_adjustment", beside="data.root={uneven} train.imbalance.kind=none"),
    *of("weights", "train.imbalance.gamma=0.5", beside="train.imbalance.kind=focal"),
    *of("weights", "train.imbalance.beta=0.5", beside="data.root={uneven} train.imbalance.kind=effective"),
    *of("weights", "train.distillation.teacher={teacher}"),
    *of("weights", "train.distillation.temperature=8", beside="train.distillation.teacher={teacher}"),
    *of("weights", "train.distillation.weight=0.3", beside="train.distillation.teacher={teacher}"),
    *of("weights", "train.clip_norm=0.01", beside="train.optimizer.name=sgd"),
    *of("weights", "train.batch_norm=statistics", "train.batch_norm=train"),
    *of("weights", "train.batch_norm=frozen | train.batch_norm=train", "hardware.precision=bf16"),
    *of("weights", "hardware.precision=32 | hardware.precision=bf16", "hardware.micro_batch=3"),
]

UNSTEADY = "train.optimizer.name=sgd train.optimizer.lr=3 train.clip_norm=100 train.epochs=8"
"""A rate so high that epochs differ much."""
WANDERING = f"{UNSTEADY} train.optimizer.lr=1 train.schedule.name=constant"
"""The last of its epochs is not the best."""
WEIGHTS += [
    *of("weights", "train.checkpoint=best", beside=WANDERING),
    *of("weights", "train.checkpoint=settled", "train.checkpoint=last", beside=f"{WANDERING} train.checkpoint=best"),
    *of("curves", "train.patience=1", beside=f"{UNSTEADY} train.checkpoint=best"),
    *of("weights", "train.schedule.patience=1", beside=f"{UNSTEADY} train.schedule.name=plateau"),
    *of(
        "weights",
        "train.schedule.factor=0.9",
        beside=f"{UNSTEADY} train.schedule.name=plateau train.schedule.patience=1",
    ),
    *of("weights", "train.divergence_threshold=1.05", beside=f"{UNSTEADY} train.optimizer.lr=1"),
]

SWAPPED = '{"train":"train","val":"test","calibration":"calibration","test":"val"}'
OTHERS = [
    *of("folder", "name=leaves", "train.averaging.keep_last=1"),
    *of("folder", "train.averaging.snapshots=2", beside="train.schedule.cycles=2"),
    *of("split", "data.root={uneven}", "data.split.val=0.4", "data.split.calibration=0.4", "data.split.test=0.4"),
    *of("split", "data.split.seed=1", "data.max_train_per_class=3"),
    *of("weights", "data.split.refit=true", "data.split.refit=true | backbone=small_vit train.strategy=lora"),
    *of("answers", "data.split.refit=true | train.strategy=probe"),
    *of("split", "data.columns.image=other_image", "data.columns.label=other_label", beside="data.root={table}"),
    *of("split", "data.columns.split=other_split", beside="data.root={table}"),
    *of("split", f"data.splits={SWAPPED} | data.root={{divided}}"),
    *of("curves", "train.monitor=balanced | data.root={uneven} train.monitor=loss"),
    *of("curves", "train.monitor=loss", beside="data.root={uneven}"),
    *of("answers", "train.strategy=probe", "evaluate.views=five", "evaluate.average=logit | evaluate.views=five"),
    *of("answers", "data.image_size=48", "data.crop_pct=0.6", beside="train.strategy=probe"),
    *of("answers", "data.interpolation=nearest", "data.mean=[0.1,0.2,0.3]", beside="train.strategy=probe"),
    *of("answers", "evaluate.calibrate=false | data.root={many} data.split.calibration=0.6"),
    *of("scores", "evaluate.coverage=0.6", "evaluate.mc_samples=3 | head.dropout=0.5"),
]

REFUSED = [
    *of("refused", "data.columns.label=leaf | | but", "data.columns.image=leaf | | holds class folders"),
    *of("refused", 'data.splits={"train":"leaves"} | | leaves is no folder'),
    *of("refused", "data.on_bad_image=fail | data.root={broken} | cannot be read"),
    *of("refused", "data.normalize=recipe | | data.mean and data.std are not given"),
    *of("refused", "regularization.fractional_pooling=true | | is for tops drawn anew"),
    *of("refused", "regularization.fractional_pooling=true | train.reinit=1 | maps of 3 x 3 or more"),
    *of("refused", "evaluate.mc_samples=3 | | the head drops nothing"),
    *of("refused", "hardware.precision=fp16 | | needs a GPU", "hardware.devices=cuda | | torch sees no GPU here"),
    *of("refused", "hardware.micro_batch=4 | train.batch_norm=train | statistics from all 8 images of a step"),
    *of("refused", "hardware.micro_batch=4 | train.batch_norm=statistics | train.batch_norm to frozen"),
    *of("refused", "train.optimizer.decay=coupled | | adamw decouples it by definition"),
    *of("refused", "data.split.refit=true | train.schedule.name=plateau | a refit has no val"),
    *of("refused", "train.averaging.wise_ft=0.5 | | does not begin from the probe"),
    *of("refused", "train.averaging.wise_ft=0.5 | head.init=probe train.batch_norm=train | cannot be mixed"),
    *of("refused", "train.averaging.wise_ft=0.5 | train.reinit=1 | throws part of the start away"),
    *of("refused", "train.schedule.cycles=3 | train.averaging.snapshots=2 | keep the first"),
]

IDLE = [
    *of("idle", "head.hidden=16", "head.activation=tanh", "head.bias=0.1", "augment.crop=scale"),
    *of("idle", "augment.domain=medical", "data.invariances=[hflip]", "data.flip_label_pairs=[[disc,square]]"),
    *of("idle", "data.value_range=[0,900]", "data.frame=middle"),
    *of("idle", "train.prefer=speed", "train.prefer=accuracy"),
    *of("idle", "train.lora_rank=2", "train.patience=1", "train.optimizer.momentum=0.5", "train.optimizer.rho=0.5"),
    *of("idle", "train.optimizer.betas=[0.5,0.9]", "train.optimizer.eps=0.1", beside="train.optimizer.name=sgd"),
    *of("idle", "train.optimizer.decay=coupled | train.optimizer.name=sgd train.optimizer.weight_decay=0"),
    *of("idle", "train.freezes_first=true | train.strategy=partial train.depth=1"),
    *of("idle", "train.batch_norm=train | backbone=small_vit"),
    *of("idle", "train.schedule.gamma=0.5", "train.schedule.every=0.6", "train.schedule.milestones=[0.3]"),
    *of("idle", "train.schedule.decades=1", "train.schedule.cycles=2", "train.schedule.growth=3"),
    *of("idle", "train.schedule.patience=1", "train.schedule.factor=0.9"),
    *of("idle", "train.schedule.warmup_fraction=0.7", beside="train.schedule.name=one_cycle"),
    *of("idle", "train.schedule.end=0.5", beside="train.schedule.name=constant"),
    *of("idle", "train.averaging.ema_decay=0.5", "train.averaging.swa_start=0.3", "train.averaging.swa_lr=0.1"),
    *of("idle", "train.averaging.batch_norm=exact", "train.averaging.batch_norm=exact | train.averaging.kind=ema"),
    *of("idle", "train.imbalance.gamma=0.5", "train.imbalance.beta=0.5"),
    *of("idle", "train.distillation.temperature=8", "train.distillation.weight=0.3"),
    *of("idle", "evaluate.average=logit", "evaluate.coverage=0.6 | data.split.calibration=0"),
    *of("idle", "tracking.uri=http://127.0.0.1:9", "tracking.experiment=trees"),
    *of("idle", "data.split.val=0.2", "data.split.calibration=0.2", beside="data.root={divided}"),
    *of("idle", "data.split.test=0.2", "data.split.seed=1", beside="data.root={divided}"),
    *of("idle", "train.clip_norm=0.01", "train.optimizer.backbone_lr_ratio=0.01", "train.optimizer.layer_decay=0.5",
        beside="train.optimizer.name=lbfgs train.optimizer.weight_decay=0 train.batch_size=64"),
    *of("idle", "augment.mixup=1", "head.dropout=0.5", "regularization.l2_sp=1", "train.epochs=2",
        "train.optimizer.lr=0.01", "hardware.workers=1", "hardware.image_cache_gb=0", "hardware.micro_batch=4",
        beside="train.strategy=probe"),
]  # fmt: skip

ELSEWHERE = {
    "hardware.devices=cpu": "test_the_device_is_taken_that_is_asked_for",
    "hardware.devices=mps": "test_the_device_is_taken_that_is_asked_for",
    "hardware.workers=1": "test_workers_and_kept_images_change_the_work_and_not_the_weights",
    "hardware.image_cache_gb=0": "test_workers_and_kept_images_change_the_work_and_not_the_weights",
    "train.prefer=accuracy": "test_what_is_preferred_changes_the_advice",
    "train.prefer=speed": "test_what_is_preferred_changes_the_advice",
    "tracking.enabled=true": "test_tracking_is_begun_as_the_recipe_says",
    "tracking.uri=http://127.0.0.1:9": "test_tracking_is_begun_as_the_recipe_says",
    "tracking.experiment=trees": "test_tracking_is_begun_as_the_recipe_says",
}
"""What no weights and no answers can show, and the test here that shows it."""
CASES = [*WEIGHTS, *OTHERS, *REFUSED]
GROUPS = sorted({case.beside for case in IDLE})


class Trained(Exception):
    """Raised where judging begins, in runs of which only the weights count."""


class Place:
    """Images, backbones and a cache for all runs, and the runs that were made already."""

    def __init__(self, folder: Path) -> None:
        self.runs, self._done = folder / "runs", dict[tuple[str, ...], Path]()
        images = draw_shapes(folder / "images", per_class=14, pixels=36)
        uneven, divided, broken = (folder / name for name in ("uneven", "divided", "broken"))
        for number, file in enumerate(sorted(images.rglob("*.png"))):
            role = ("train", "train", "val", "calibration", "test")[number % 5]
            rare = file.parent.name == "disc" or file.stem < "06"
            for copy in (divided / role, broken, *([uneven] if rare else [])):
                (copy / file.parent.name).mkdir(parents=True, exist_ok=True)
                (copy / file.parent.name / file.name).write_bytes(file.read_bytes())
        (broken / "disc" / "half.png").write_bytes(b"\x89PNG")
        many = draw_shapes(folder / "many", per_class=64, pixels=36)
        deep = draw_pages(folder / "deep", images)
        table = write_table(folder / "table.csv", images)
        zoo = folder / "zoo"
        write_card(zoo / "small_resnet", "test_resnet", pixels=64)
        write_card(zoo / "small_vit", "test_vit", pixels=32, img_size=32)
        self.names = {
            "images": images,
            "uneven": uneven,
            "divided": divided,
            "broken": broken,
            "many": many,
            "deep": deep,
            "table": table,
        }
        self.environment = {"FINETUNE_CACHE": str(folder / "cache"), "FINETUNE_ZOO": str(zoo)}

    def recipe(self, wishes: list[str]) -> Recipe:
        text = " ".join([BASE, *wishes])
        if "{teacher}" in text and "teacher" not in self.names:
            self.names["teacher"] = self.run([], is_judged=True)
        for name, path in self.names.items():
            text = text.replace("{" + name + "}", str(path))
        return ft.load_recipe(None, text.split())

    def run(self, wishes: list[str], *, is_judged: bool = False) -> Path:
        """The run of `wishes`, made once."""
        key = (*wishes, str(is_judged))
        if key not in self._done:
            self._done[key] = self.run_anew(wishes, is_judged=is_judged)
        return self._done[key]

    def run_anew(self, wishes: list[str], *, is_judged: bool) -> Path:
        recipe = self.recipe(wishes)
        before = set(self.runs.iterdir()) if self.runs.exists() else set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "write_report", lambda *rest, **more: "no page")
            if not is_judged:
                patch.setattr(pipeline, "evaluate_run", _stop)
            with contextlib.suppress(Trained):
                pipeline.train(recipe, runs=self.runs, say=quiet)
        (made,) = set(self.runs.iterdir()) - before
        return made


def _stop(*rest: object) -> None:
    raise Trained


def quiet(text: str) -> None:
    """Nobody listens."""


def write_table(path: Path, images: Path) -> Path:
    """A table that has two columns for images, for labels and for splits."""
    files, roles = sorted(images.rglob("*.png")), ("train", "train", "val", "test", "calibration")
    names = [(file, file.parent.name, roles[number % 5]) for number, file in enumerate(files)]
    others = [*names[1:], names[0]]
    rows = [",".join(map(str, (*own, *other))) for own, other in zip(names, others, strict=True)]
    path.write_text("\n".join(["image,label,split,other_image,other_label,other_split", *rows]))
    return path


def draw_pages(folder: Path, images: Path) -> Path:
    """Each image as a file of three pages of 12 bits in 16: dark, itself, bright."""
    for file in images.rglob("*.png"):
        grey = np.asarray(Image.open(file).convert("L"), dtype=np.uint16) * 16
        first, *rest = (Image.fromarray(grey // 2 ** (2 - page)) for page in range(3))
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        first.save(folder / file.parent.name / f"{file.stem}.tif", save_all=True, append_images=rest)
    return folder


def write_card(folder: Path, arch: str, *, pixels: int, **arch_kwargs: object) -> None:
    """A card with random weights of a network that is small enough to train in a blink."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    save_file(timm.create_model(arch, num_classes=3, **arch_kwargs).state_dict(), folder / "weights.safetensors")
    fields = {"name": folder.name, "arch": arch, "arch_kwargs": arch_kwargs, "num_classes": 3, "crop_pct": 1.0}
    fields |= {"input_size": [3, pixels, pixels], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
    (folder / "card.yaml").write_text(yaml.safe_dump(fields | {"weights": {"file": "weights.safetensors"}}))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def _own_cache(place, monkeypatch):
    """One cache for all runs here, small backbones, and no GPU."""
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def weights_of(run):
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(ft.Run(run).final_weights()).items()}


def answers_of(run):
    with np.load(run / "predictions.npz") as stored:
        return {name: stored[name].tobytes() for name in stored.files}


def curves_of(run):
    rows = (run / "curves.csv").read_text().splitlines()
    return [row for row in rows if "images_per_second" not in row]


LOOK = {
    "weights": weights_of,
    "answers": answers_of,
    "curves": curves_of,
    "scores": lambda run: json.loads((run / "scores.json").read_text()),
    "split": lambda run: ft.Run(run).plan.split_digest,
    "folder": lambda run: (run.name.split("-")[0], sorted(str(file.relative_to(run)) for file in run.rglob("*"))),
}
"""By what a case does, where it shows."""


def name_of(case):
    return f"{case.key}={case.value}" + (f" with {case.beside}" if case.beside else "")


ALWAYS = (
    "augment.",
    "data.",
    "evaluate.",
    "head.",
    "regularization.",
    "train.averaging.batch_norm",
    "train.imbalance.",
    "train.lora_rank",
    "train.schedule.patience",
    "train.divergence_threshold",
)
"""Beginnings of the keys whose first case runs in the default tests: those that could once be ignored unnoticed."""


def first_of_each_key(cases):
    """Parameters: of each key that begins as `ALWAYS` says the first case, and all others marked slow."""
    first = {case.key: case for case in reversed(cases) if case.key.startswith(ALWAYS)}
    return [pytest.param(case, marks=[] if first.get(case.key) is case else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", first_of_each_key([*WEIGHTS, *OTHERS]), ids=name_of)
def test_a_key_changes_the_run(case, place):
    is_judged = case.does in ("answers", "scores")
    without, run = (place.run(wishes, is_judged=is_judged) for wishes in (case.beside.split(), case.wishes))
    assert LOOK[case.does](run) != LOOK[case.does](without)


def test_what_is_preferred_changes_the_advice(place, monkeypatch):
    monkeypatch.setattr(matrix, "GAINS", {"partial": [2.0] * 24, "full": [2.01] * 24})
    monkeypatch.setattr(matrix, "COST", {"probe": 0.0, "partial": 1.0, "full": 1.2})
    chosen = {}
    for prefer in ("accuracy", "balanced", "speed"):
        _, plan = preparing.plan(place.recipe(["train.strategy=null", f"train.prefer={prefer}"]), say=quiet)
        chosen[prefer] = plan.train.strategy
        assert plan.advice.prefer == prefer and prefer in plan.advice.why
    assert chosen == {"accuracy": "full", "balanced": "partial", "speed": "probe"}


VARIED = "augment.preset=heavy augment.mixup=1 head.dropout=0.5 train.strategy=partial"


@pytest.mark.parametrize(
    "beside", ["", VARIED, pytest.param(f"{VARIED} hardware.micro_batch=3", marks=pytest.mark.slow)]
)
def test_a_run_that_is_repeated_is_the_same_so_that_a_difference_means_something(beside, place):
    once, again = (place.run_anew(beside.split(), is_judged=True) for _ in range(2))
    for look in ("weights", "answers", "curves", "scores", "split"):
        assert LOOK[look](once) == LOOK[look](again), look


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_a_value_that_makes_no_sense_is_refused(case, place):
    preparing.plan(place.recipe(case.beside.split()), say=quiet)
    with pytest.raises(FinetuneError) as fault:
        place.run(case.wishes)
    assert case.says in str(fault.value)


def idle_of(beside):
    return {case.key: case.value for case in IDLE if case.beside == beside}


def with_idle_keys(beside):
    return [*beside.split(), *(f"{key}={value}" for key, value in idle_of(beside).items())]


@pytest.mark.parametrize("beside", GROUPS)
def test_keys_that_nothing_reads_are_named_in_the_plan(beside, place):
    _, plan = preparing.plan(place.recipe(with_idle_keys(beside)), say=quiet)
    named = {reason.key for reason in plan.reasons if reason.why.startswith("inactive: ")}
    base = {wish.partition("=")[0] for wish in BASE.split()}
    assert named - base == set(idle_of(beside)) - base


@pytest.mark.parametrize("beside", [one if not one else pytest.param(one, marks=pytest.mark.slow) for one in GROUPS])
def test_keys_that_nothing_reads_change_nothing(beside, place):
    without = place.run(beside.split(), is_judged=True)
    run = place.run(with_idle_keys(beside), is_judged=True)
    for look in ("weights", "answers", "curves"):
        assert LOOK[look](run) == LOOK[look](without), look


def test_the_device_is_taken_that_is_asked_for(place, monkeypatch):
    facts, _ = preparing.plan(place.recipe([]), say=quiet)
    for wish, has, device in (("auto", "cuda", "cuda"), ("cpu", "cuda", "cpu"), ("mps", "mps", "mps")):
        facts = facts.model_copy(update={"machine": facts.machine.model_copy(update={"device": has})})
        assert ft.make_plan(place.recipe([f"hardware.devices={wish}"]), facts).hardware.devices == device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert measure_machine("cpu").device == "cpu"


def test_workers_and_kept_images_change_the_work_and_not_the_weights(place, monkeypatch):
    workers, decoded = [], []

    def open_loader(*rest, **more):
        workers.append(more["num_workers"])
        return torch.utils.data.DataLoader(*rest, **more)

    def read(*rest, **more):
        decoded.append(rest)
        return decoding.decode_sizes(*rest, **more)

    monkeypatch.setattr(loading, "DataLoader", open_loader)
    monkeypatch.setattr(loading, "decode_sizes", read)
    plain = weights_of(place.run_anew([], is_judged=False))
    before = len(decoded)
    assert set(workers) == {0}
    assert weights_of(place.run_anew(["hardware.image_cache_gb=0"], is_judged=False)) == plain
    assert len(decoded) - before > 1.5 * before
    workers.clear()
    assert weights_of(place.run_anew(["hardware.workers=1"], is_judged=False)) == plain
    assert set(workers) == {1}


def test_statistics_of_batch_norm_move_by_the_share_that_the_steps_of_an_epoch_ask_for(place, monkeypatch):
    steps, plain = [], weights_of(place.run(["train.batch_norm=train"]))
    monkeypatch.setattr(fit, "momentum_for", lambda asked: steps.append(asked) or 0.5)
    moved = weights_of(place.run_anew(["train.batch_norm=train"], is_judged=False))
    assert steps == [-(-sum(ft.survey(place.recipe([])).counts["train"]) // 8)]
    assert any("running_mean" in name and moved[name] != plain[name] for name in plain)


def test_tracking_is_begun_as_the_recipe_says(place, monkeypatch):
    begun = []

    class Recorder:
        def __init__(self, *rest, **more):
            begun.append((more["uri"], more["experiment"]))

        def start(self):
            """Nothing is sent."""

        notify = start

        def close(self, *rest):
            """Nothing was sent."""

    monkeypatch.setattr(pipeline, "Tracker", Recorder)
    place.run_anew([], is_judged=False)
    assert not begun
    place.run_anew(["tracking.enabled=true"], is_judged=False)
    place.run_anew(["tracking.enabled=true", "tracking.uri=http://127.0.0.1:9"], is_judged=False)
    place.run_anew(["tracking.enabled=true", "tracking.experiment=trees"], is_judged=False)
    beside = default_uri(place.runs)
    assert begun == [(beside, "images"), ("http://127.0.0.1:9", "images"), (beside, "trees")]


def test_every_key_has_an_entry():
    named = {case.key for case in (*CASES, *IDLE)} | {wish.partition("=")[0] for wish in ELSEWHERE}
    assert named == set(recipe_keys())
    effective = {case.key for case in WEIGHTS + OTHERS} | {wish.partition("=")[0] for wish in ELSEWHERE}
    assert named - effective == {"data.on_bad_image"}  # nothing is idle or refused in every case


def test_every_choice_of_every_key_has_an_entry():
    values = {wish for wish in ELSEWHERE} | {f"{case.key}={case.value.strip('[]')}" for case in CASES}
    missing = [wish for wish in choices(Recipe) if wish not in values]
    assert not missing


def choices(model: type[BaseModel], prefix: str = "") -> list[str]:
    """`key=choice` for every word that a key may hold, but for its default."""
    found = []
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found += choices(info.annotation, f"{prefix}{name}.")
            continue
        words = [word for word in literals(info.annotation) if word != info.default]
        found += [f"{prefix}{name}={word}" for word in words]
    return found


def literals(annotation: object) -> list[object]:
    """Every word of every `Literal` in a type."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [word for part in typing.get_args(annotation) for word in literals(part)]


def test_the_choices_are_found():
    found = choices(Recipe)
    assert {"head.kind=mlp", "data.invariances=rot90", "train.schedule.name=cosine_restarts"} <= set(found)
    assert len(found) > 60


def test_every_test_that_is_named_here_is_here():
    assert set(ELSEWHERE.values()) <= set(globals())
