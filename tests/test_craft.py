"""The options of a training, each from a recipe to a judged run; what a piece does alone stands in its own file."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL, start
from torch import nn

import finetune as ft
from finetune.data.augmentation import Augmentation
from finetune.data.normalization import fit_color_basis
from finetune.errors import RecipeError, RunError
from finetune.features.survey import look
from finetune.inference.loading import load_final
from finetune.inference.predict import predict_probabilities
from finetune.models.heads import PROBE_SOFTENING
from finetune.models.regularization import FractionalMaxPool
from finetune.planning.lr_schedules import rate_factor
from finetune.planning.planner import make_plan
from finetune.training import setup
from finetune.training.snapshots import read_members


def curve(run, name):
    rows = [line.split(",") for line in run.file("curves.csv").read_text().splitlines()[1:]]
    return [float(value) for _, _, _, own, value in rows if own == name]


def moved(run):
    """Names of the tensors in which the first and the last state of the network differ."""
    plan = run.plan
    recipe = ft.load_recipe(run.file("recipe.yaml"))
    from finetune.config.backbone_names import read_zoo
    from finetune.models.backbones import load_backbone

    before = load_backbone(plan.backbone, zoo=read_zoo(), pretrained=recipe.pretrained).state_dict()
    after = load_file(run.final_weights())
    return {name for name, value in before.items() if not torch.equal(value, after[f"backbone.{name}"])}


def measured_as(monkeypatch, means, *, spread):
    """Val says these mean losses of the start and each epoch, whatever it is shown; images differ by `spread`."""
    from finetune.training import checkpoints

    told, own = iter(enumerate(means)), checkpoints.measure_loss

    def measure(*args, **kwargs):
        found, (number, mean) = own(*args, **kwargs), next(told)
        noise = torch.randn(len(found.losses), generator=torch.Generator().manual_seed(number))
        losses = mean + spread * (noise - noise.mean())
        return dataclasses.replace(found, loss=mean, chosen_by=mean, losses=losses.double(), top1=0.9)

    monkeypatch.setattr(checkpoints, "measure_loss", measure)


@pytest.mark.technique("T179")
@pytest.mark.parametrize(
    ("keep", "means", "spread", "kept"),
    [
        ("settled", [1.0, 0.6, 0.50, 0.52], 0.3, 3),  # what the second epoch has over the third, noise has too
        ("settled", [1.0, 0.6, 0.50, 0.52], 1e-4, 2),
        ("settled", [0.1, 0.9, 0.8, 0.7], 1e-4, 0),
        ("settled", [1.0, math.nan, 0.5, math.nan], 0.3, 2),
        ("best", [1.0, 0.6, 0.50, 0.52], 0.3, 2),
        ("last", [1.0, 0.6, 0.50, 0.52], 1e-4, 3),
    ],
)
@pytest.mark.slow
def test_the_last_epoch_is_kept_unless_an_earlier_one_was_clearly_better(
    shapes, tmp_path, monkeypatch, keep, means, spread, kept
):
    from finetune.training.module import Finetuning

    monkeypatch.setattr(Finetuning, "refuse_epoch", lambda *args: None)
    measured_as(monkeypatch, means, spread=spread)
    said = []
    wishes = ["train.strategy=full", "train.epochs=3", "train.patience=3", f"train.checkpoint={keep}"]
    start(shapes, tmp_path, *wishes, say=said.append)
    (verdict,) = [line for line in said if " epochs, kept " in line]
    assert ("the start" if kept == 0 else f"kept epoch {kept} ") in verdict


def test_a_resumed_run_knows_what_val_said_of_the_epoch_it_had_kept(shapes, tmp_path, monkeypatch):
    measured_as(monkeypatch, [1.0, 0.6, 0.50, 0.52, 0.52], spread=1e-4)  # the third epoch twice
    said = []

    def stop(text):
        if "epoch 3/3" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(shapes, tmp_path, "train.strategy=full", "train.epochs=3", "train.checkpoint=settled", say=stop)
    (folder,) = (tmp_path / "runs").iterdir()
    ft.resume(folder, say=said.append)
    assert any("goes on after epoch 2" in line for line in said)
    assert any("3 epochs, kept epoch 2 " in line for line in said)


def test_an_epoch_before_the_rate_has_fallen_is_no_settled_one(shapes, tmp_path, monkeypatch):
    measured_as(monkeypatch, [1.0, 0.5, 0.51, 0.52], spread=0.3)
    said = []
    wishes = ["train.strategy=full", "train.epochs=9", "train.patience=2", "train.checkpoint=settled"]
    start(shapes, tmp_path, *wishes, say=said.append)
    assert any(line.startswith("stage 1 (full): 3 epochs, kept epoch 1 ") for line in said)


@pytest.mark.parametrize(
    "wishes",
    [
        ["train.strategy=full", "head.kind=mlp", "head.hidden=16", "head.activation=gelu", "head.dropout=0.2"],
        ["train.strategy=full", "head.kind=cosine", "augment.mixup=0.2", "augment.cutmix=1"],
        ["train.strategy=full", "regularization.stochastic_depth=0.2", "regularization.channel_dropout=0.1"],
        ["train.strategy=partial", "regularization.l2_sp=0.01", "regularization.label_smoothing=0.1"],
        ["train.strategy=full", "train.optimizer.name=nesterov", "train.schedule.name=one_cycle"],
        ["train.strategy=full", "train.optimizer.name=timm/lamb", "train.schedule.name=plateau"],
        ["train.strategy=full", "train.imbalance.kind=sampler", "train.monitor=balanced"],
        ["train.strategy=full", "augment.policy=trivial", "augment.pca_color=0.1", "augment.crop=scale"],
    ],
    ids=lambda wishes: wishes[1].partition(".")[2],
)
@pytest.mark.slow
def test_every_option_runs_to_its_end_and_predicts_what_it_was_judged_by(shapes, tmp_path, wishes):
    run = start(shapes, tmp_path, *wishes)
    assert run.read_json("scores.json")["test"]["top1"]["value"] > 0.5  # of three classes
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    again = load_final(run)
    with torch.inference_mode():
        assert torch.equal(again(images), again(images))


@pytest.mark.technique("T132")
@pytest.mark.slow
def test_regions_that_move_in_training_are_in_the_network_that_is_shipped_and_still(shapes, tmp_path):
    wishes = ["data.image_size=160", "regularization.fractional_pooling=true"]
    with pytest.raises(RecipeError, match=r"fractional_pooling is for tops drawn anew; set train\.reinit"):
        start(shapes, tmp_path, *wishes, "train.strategy=full")
    run = start(shapes, tmp_path, *wishes, "train.strategy=partial", "train.reinit=1", "train.epochs=1")
    network, images = load_final(run), torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    assert any(isinstance(piece, FractionalMaxPool) for piece in network.modules())
    with torch.inference_mode():
        assert torch.equal(network(images), network(images))
    seen = look(ft.load_recipe(run.file("recipe.yaml")))
    with np.load(run.file("predictions.npz")) as stored:
        said = predict_probabilities(network, seen.dataset.store, seen.dataset.indices("test"), run.plan, "center")
        np.testing.assert_allclose(stored["test_probabilities"], said.numpy(), atol=1e-6)


@pytest.mark.slow
def test_a_recipe_that_uses_every_option_is_checked_and_is_planned(shapes, tmp_path):
    text = f"""
name: all
data: {{root: {shapes}, image_size: 96, invariances: [hflip]}}
augment: {{preset: heavy, domain: fine, crop: scale, rotate_degrees: 10, pca_color: 0.1, policy: rand, cutout: 0.2,
          mixup: 0.2, cutmix: 1.0}}
head: {{kind: mlp, hidden: 32, activation: leaky_relu, init: xavier, bias: 0.01, dropout: 0.5, drop_connect: 0.2}}
regularization: {{label_smoothing: 0.1, stochastic_depth: 0.1, channel_dropout: 0.1, fractional_pooling: true,
                 l2_sp: 0.01}}
train:
  strategy: gradual
  reinit: 1
  freezes_first: true
  epochs: 4
  batch_size: 16
  optimizer: {{name: adam, lr: 0.001, backbone_lr_ratio: 0.5, layer_decay: 0.8, weight_decay: 0.01, decay: coupled,
              betas: [0.9, 0.99], eps: 1.0e-7}}
  schedule: {{name: cyclic, warmup_fraction: 0.1, end: 0.01}}
  averaging: {{kind: ema, ema_decay: 0.9, snapshots: 2, keep_last: 2, batch_norm: exact}}
  imbalance: {{kind: effective, beta: 0.99}}
  patience: 4
  checkpoint: best
  monitor: balanced
  clip_norm: 5.0
  divergence_threshold: 4.0
  batch_norm: train
evaluate: {{views: ten, mc_samples: 3}}
"""
    path = tmp_path / "all.yaml"
    path.write_text(text)
    from typer.testing import CliRunner

    from finetune.cli import app

    checked = CliRunner().invoke(app, ["recipes", "check", str(path)])
    assert checked.exit_code == 0, checked.output
    run = ft.train(
        ft.load_recipe(path, ["tracking.enabled=false", "data.split.refit=false"]),
        runs=tmp_path / "runs",
        say=lambda text: None,
    )
    names = [member.name for member in read_members(run.file("snapshots"))]
    assert names == ["cycle-1", "cycle-2", "last-1", "last-2"]
    scores = run.read_json("scores.json")
    assert scores["test"]["top1"]["n"] > 0 and scores["draws"]["n"] == 3


@pytest.mark.slow
def test_gradual_training_opens_one_stage_of_the_backbone_after_the_other(shapes, tmp_path):
    run = start(shapes, tmp_path, "train.strategy=gradual", "train.epochs=7", "train.checkpoint=last")
    stages = run.plan.stages
    total = max(stage.trainable_stages for stage in stages)
    assert [stage.trainable_stages for stage in stages] == [*range(1, len(stages)), total]
    assert sum(stage.epochs for stage in stages) == 7
    first = load_file(run.stage_folder(0) / "weights.safetensors")
    second = load_file(run.stage_folder(1) / "weights.safetensors")
    changed = {name for name, value in first.items() if not torch.equal(value, second[name])}
    lowest = load_final(run).backbone
    opened = {lowest.stage_of[name.removeprefix("backbone.")] for name in changed if name.startswith("backbone.")}
    assert opened == {len(lowest.stages) - 2, len(lowest.stages) - 1}


@pytest.mark.parametrize(("strategy", "is_one"), [("norm_only", "norm"), ("bitfit", "bias")])
def test_norms_and_biases_move_alone(shapes, tmp_path, strategy, is_one):
    run = start(shapes, tmp_path, f"train.strategy={strategy}")
    names = moved(run)
    assert names
    backbone = load_final(run).backbone
    for name in names:
        owner = backbone.get_submodule(name.rpartition(".")[0])
        assert name.endswith(".bias") or (is_one == "norm" and isinstance(owner, nn.modules.batchnorm._BatchNorm))


def test_surgery_trains_the_stage_with_the_largest_gradients_for_its_weights(shapes, tmp_path):
    run = start(shapes, tmp_path, "train.strategy=surgical", "train.checkpoint=last")
    ratios = run.read_json("facts.json")["gradients"]
    stage = max(ratios, key=ratios.get)
    backbone = load_final(run).backbone
    assert {backbone.stages[backbone.stage_of[name]] for name in moved(run)} == {stage}


@pytest.mark.technique("T012")
def test_fresh_stages_have_their_own_statistics_and_lower_ones_stay(shapes, tmp_path):
    run = start(shapes, tmp_path, "train.strategy=partial", "train.depth=2", "train.reinit=1", "train.epochs=4")
    backbone = load_final(run).backbone
    top = len(backbone.stages) - 1
    assert {backbone.stage_of[name] for name in moved(run)} == {top - 1, top}
    stage = run.plan.stages[0]
    assert (stage.fresh_stages, stage.batch_norm) == (1, "train")
    assert run.plan.head.init == "zero"


@pytest.mark.slow
@pytest.mark.technique("T161")
def test_an_average_is_judged_and_shipped_and_the_raw_weights_are_shown_beside_it(shapes, tmp_path):
    wishes = ["train.strategy=full", "train.checkpoint=last", "train.averaging.wise_ft=1", "seed=3"]
    plain = start(shapes, tmp_path / "plain", *wishes)
    run = start(shapes, tmp_path / "ema", *wishes, "train.averaging.kind=ema", "train.averaging.ema_decay=0.8")
    assert curve(run, "val/raw_loss") == pytest.approx(curve(plain, "val/loss")[1:], rel=1e-6)  # training is the same
    assert curve(run, "val/loss")[1:] != curve(run, "val/raw_loss")
    raw, averaged = load_file(plain.final_weights()), load_file(run.final_weights())
    assert not torch.equal(raw["head.linear.weight"], averaged["head.linear.weight"])


@pytest.mark.slow
@pytest.mark.technique("T159")
@pytest.mark.technique("T160")
def test_snapshots_are_taken_where_the_rate_has_fallen_and_epochs_are_whole_cycles(shapes, tmp_path):
    run = start(shapes, tmp_path, "train.strategy=full", "train.epochs=5", "train.averaging.snapshots=3")
    stage = run.plan.stages[0]
    assert (stage.epochs, stage.schedule.name, stage.schedule.cycles) == (6, "cyclic", 3)
    members = read_members(run.file("snapshots"))
    assert [(member.name, member.facts["epoch"]) for member in members] == [
        ("cycle-1", 2),
        ("cycle-2", 4),
        ("cycle-3", 6),
    ]
    losses = dict(enumerate(curve(run, "val/loss")))  # 0 is the start
    assert [member.facts["val_loss"] for member in members] == [losses[2], losses[4], losses[6]]
    last, restart = (rate_factor(stage.schedule, step, epochs=6, steps_per_epoch=10) for step in (19, 20))
    assert last < 0.1 < restart


def test_the_last_epochs_are_kept_where_asked(shapes, tmp_path):
    run = start(shapes, tmp_path, "train.strategy=full", "train.checkpoint=last", "train.averaging.keep_last=2")
    assert [member.name for member in read_members(run.file("snapshots"))] == ["last-2", "last-3"]


@pytest.mark.slow
def test_lbfgs_lowers_the_loss_where_nothing_is_random_and_is_refused_elsewhere(shapes, tmp_path):
    wishes = ["train.strategy=partial", "train.optimizer.name=lbfgs", "data.max_train_per_class=8"]
    with pytest.raises(RecipeError, match=r"lbfgs, which needs the same loss .* augment.preset must be none"):
        start(shapes, tmp_path, *wishes)
    run = start(shapes, tmp_path, *wishes, "augment.preset=none", "train.batch_size=24")
    losses = curve(run, "train/loss")
    assert losses[-1] < losses[0]


@pytest.mark.technique("T082")
@pytest.mark.technique("T081")
def test_a_training_that_explodes_goes_back_once_and_then_ends_with_advice(shapes, tmp_path):
    said = []
    wishes = ["train.strategy=full", "train.optimizer.name=sgd", "train.optimizer.lr=10", "train.clip_norm=1e9"]
    with pytest.raises(RunError, match=r"diverged again.*train.optimizer.lr"):
        start(shapes, tmp_path, *wishes, "train.optimizer.backbone_lr_ratio=1", "train.epochs=12", say=said.append)
    assert any("diverged" in line and "going back, with" in line for line in said)


@pytest.mark.technique("T081")
@pytest.mark.parametrize(("window", "begins_anew"), [(1000, True), (0, False)])
@pytest.mark.slow
def test_a_state_written_just_before_a_divergence_is_not_trusted(shapes, tmp_path, monkeypatch, window, begins_anew):
    """Seen on few images, one step per epoch: the weights were spoilt before the loss could show it."""
    from finetune.training import fit
    from finetune.training.module import DivergenceError, Finetuning

    def refuse(module, loss):
        if module.trainer.current_epoch == 2 and module.slowdown == 1:
            raise DivergenceError("as asked")

    monkeypatch.setattr(Finetuning, "refuse_epoch", refuse)
    monkeypatch.setattr(fit, "WINDOW", window)
    said, members = [], []

    def say(line):
        said.append(line)
        if "  start  " in line:
            (folder,) = (tmp_path / "runs").iterdir()
            members.append(len(read_members(folder / "snapshots")))

    wishes = ["train.strategy=full", "train.epochs=5", "train.checkpoint=last", "train.averaging.keep_last=2"]
    run = start(shapes, tmp_path, *wishes, say=say)
    assert members == [0] * (1 + begins_anew)  # none of the attempt that was given up
    assert any("goes on after epoch" in line for line in said) != begins_anew
    assert len(curve(run, "val/loss")) == 1 + 5


def test_views_that_cannot_be_taken_are_refused_before_training(shapes, tmp_path):
    said = []
    with pytest.raises(RecipeError):
        start(shapes, tmp_path, "train.strategy=full", "evaluate.views=center@32/64", say=said.append)
    assert not any("epoch" in line for line in said)


def test_keys_that_nothing_reads_are_said_to_be_inactive(shapes):
    from finetune.preparing import plan

    wishes = ["train.strategy=full", "train.averaging.swa_lr=0.3", "head.activation=gelu", "train.imbalance.gamma=1"]
    recipe = ft.load_recipe(None, [f"data.root={shapes}", *SMALL, *wishes])
    _, made = plan(recipe, say=lambda text: None)
    idle = {reason.key for reason in made.reasons if reason.why.startswith("inactive")}
    assert idle == {"train.averaging.swa_lr", "head.activation", "train.imbalance.gamma"}


def test_a_users_own_view_is_drawn_and_its_absence_stops_a_resume(shapes, tmp_path, monkeypatch):
    seen = []

    def darken(pixels, random):
        seen.append(pixels.shape)
        return (pixels * 0.5).astype("uint8")

    run = start(shapes, tmp_path, "train.strategy=full", "train.epochs=1", vary=darken)
    assert seen
    run.final_weights().unlink()
    (run.stage_folder(0) / "last.ckpt").unlink()
    run.file("scores.json").unlink()
    with pytest.raises(RunError, match=r"begun with .*darken.*gets none now"):
        ft.resume(run.path)


def test_uneven_classes_change_loss_and_choice(shapes, tmp_path):
    import shutil

    few = tmp_path / "uneven"
    shutil.copytree(shapes, few)
    for path in sorted((few / "disc").iterdir())[6:]:
        path.unlink()
    said = []
    recipe = ft.load_recipe(None, [f"data.root={few}", *SMALL, "train.strategy=full"])
    run = ft.train(recipe, runs=tmp_path / "runs", say=said.append)
    plan = run.plan
    assert (plan.train.imbalance.kind, plan.train.monitor) == ("inverse", "balanced")
    assert curve(run, "val/balanced_top1")
    assert curve(run, "train/loss")[0] < math.log(3)


def test_what_training_sees_is_drawn(shapes, tmp_path):
    from PIL import Image

    from finetune.preparing import show_images

    recipe = ft.load_recipe(None, [f"data.root={shapes}", *SMALL, "train.strategy=full", "augment.preset=heavy"])
    sheet = show_images(recipe, tmp_path / "sheet.png", say=lambda text: None)
    with Image.open(sheet) as image:
        assert min(image.size) > 200
    assert Augmentation("heavy", size_pixels=32, interpolation="bilinear", invariances=()).describe()


@pytest.mark.parametrize(
    "wishes",
    [
        [
            "train.averaging.kind=ema",
            "train.schedule.name=plateau",
            "train.schedule.patience=1",
            "augment.mixup=0.2",
            "train.checkpoint=settled",
        ],
        pytest.param(
            ["train.averaging.snapshots=2", "regularization.l2_sp=0.01", "train.batch_norm=train"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["train.averaging.kind=swa", "train.averaging.swa_start=0.3", "train.batch_norm=statistics"],
            marks=pytest.mark.slow,
        ),
        ["train.strategy=gradual", "train.optimizer.name=nesterov", "train.imbalance.kind=sampler"],
        pytest.param(["head.dropout=0.5"], marks=pytest.mark.slow),
    ],
    ids=["ema", "snapshots", "swa", "gradual", "dropout"],
)
def test_an_interrupted_training_ends_in_the_same_weights_whatever_its_craft(shapes, tmp_path, wishes):
    wishes = ["train.strategy=full", "train.epochs=4", "train.checkpoint=last", *wishes]
    whole = start(shapes, tmp_path / "whole", *wishes)

    def stop(text):
        if "epoch 2/4" in text or text.startswith("2-gradual  epoch 1/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(shapes, tmp_path / "cut", *wishes, say=stop)
    (folder,) = (tmp_path / "cut" / "runs").iterdir()
    cut = ft.resume(folder, say=lambda text: None)
    first, second = load_file(whole.final_weights()), load_file(cut.final_weights())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert curve(whole, "val/loss") == curve(cut, "val/loss")
    assert [m.facts for m in read_members(whole.file("snapshots"))] == [
        m.facts for m in read_members(cut.file("snapshots"))
    ]


def test_gradients_are_clipped_to_the_length_that_is_planned(shapes, tmp_path):
    wishes = ["train.strategy=full", "train.epochs=1", "train.checkpoint=last", "train.optimizer.weight_decay=0"]
    wishes += ["train.optimizer.name=sgd", "train.optimizer.lr=0.01"]
    run = start(shapes, tmp_path, *wishes, "train.clip_norm=1e-7")
    head = load_file(run.final_weights())["head.linear.weight"]
    begun = PROBE_SOFTENING * load_file(run.file("probe.safetensors"))["weight"]
    assert curve(run, "gradient_norm")[0] > 1e-3  # of what comes before clipping
    assert (head - begun).norm() < 1e-5


@pytest.mark.slow
def test_a_mean_of_weights_begins_where_it_is_planned_to(shapes, tmp_path):
    wishes = ["train.strategy=full", "train.checkpoint=last", "train.averaging.kind=swa", "train.averaging.keep_last=1"]
    run = start(shapes, tmp_path, *wishes, "train.averaging.swa_start=0.89")
    (last,) = read_members(run.file("snapshots"))
    raw, shipped = load_file(last.path), load_file(run.final_weights())
    steps = int([row for row in run.file("curves.csv").read_text().splitlines()][-1].split(",")[2])
    assert round(0.89 * steps) == steps - 1  # so the mean is one of the last step alone
    assert all(torch.equal(raw[name], shipped[name]) for name in raw)


def test_principal_colours_are_those_of_training_images_alone(shapes, monkeypatch):
    seen = look(ft.load_recipe(None, [f"data.root={shapes}", *SMALL]))
    plan = make_plan(ft.load_recipe(None, ["train.strategy=full", "augment.pca_color=0.1"]), seen.facts)
    shown = []

    def fit(store, rows, **rest):
        shown.extend(rows)
        return fit_color_basis(store, rows, **rest)

    monkeypatch.setattr(setup, "fit_color_basis", fit)
    assert setup.make_augmentation(plan, seen.dataset) is not None
    assert {seen.dataset.roles[index] for index in shown} == {"train"} and len(shown) == len(
        seen.dataset.indices("train")
    )
