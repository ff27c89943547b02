"""Distillation: the loss by hand, a teacher that stays still, and students of real tiny ensembles."""

import copy
import shutil

import numpy as np
import pytest
import torch
import yaml
from made_classifiers import STAGE, ShortOfMemory, TinyBackbone, tiny_classifier
from safetensors.torch import load_file, save_file
from torch import nn

import finetune as ft
from finetune.config.card import View
from finetune.config.decided import Rule
from finetune.config.imbalance import KIND
from finetune.config.plan import read_plan
from finetune.data.loading import normalize
from finetune.ensembling import ensemble as combine
from finetune.errors import BackboneError, RecipeError, RunError
from finetune.inference.loading import load_final
from finetune.inference.teacher import load_teacher
from finetune.pipeline import evaluate
from finetune.preparing import plan, show_images
from finetune.reporting.text import plan_text, scores_text
from finetune.runs.folder import RunFolder
from finetune.runs.teacher import inherit_imbalance, read_teacher
from finetune.training.distillation import Distillation, Teacher, make_distillation, soft_losses
from finetune.training.losses import log_priors, make_loss
from finetune.training.mixup import Mixing
from finetune.training.module import Finetuning, Step
from finetune.training.optimization import make_optimizer

SMALL = [
    "data.image_size=32",
    "train.batch_size=16",
    "train.epochs=2",
    "tracking.enabled=false",
    "data.split.refit=false",
    "train.checkpoint=last",
]
FULL = ["train.strategy=full", "data.split.seed=0", "data.invariances=[hflip]", "augment.preset=light"]
VIEW = View(size_pixels=8, shorter_pixels=8, interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def quiet(text):
    """Nobody listens."""


def start(shapes, runs, *wishes, say=quiet):
    return ft.train(ft.load_recipe(None, [f"data.root={shapes}", *SMALL, *FULL, *wishes]), runs=runs, say=say)


def said(logits, generator_seed=0):
    return 4 * torch.randn(*logits, generator=torch.Generator().manual_seed(generator_seed))


@pytest.fixture(scope="module")
def pool(shapes, tmp_path_factory):
    """Two restarts on the same images, and their average."""
    runs = tmp_path_factory.mktemp("pool")
    members = [start(shapes, runs, f"seed={seed}", "train.batch_norm=train") for seed in (1, 2)]
    return *members, combine([member.path for member in members], runs=runs, say=quiet)


@pytest.fixture(scope="module")
def student(shapes, pool, tmp_path_factory):
    """A student of the average, with mixed images."""
    return start(shapes, tmp_path_factory.mktemp("student"), *taught(pool[2]), "augment.mixup=0.2")


def taught(teacher, **rest):
    return [f"train.distillation.{key}={value}" for key, value in {"teacher": teacher.path, **rest}.items()]


def test_the_soft_loss_is_the_divergence_by_hand_times_the_square_of_the_temperature():
    ours, theirs = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    p, q = 1 / (1 + np.exp(2 / 4)), 1 / (1 + np.exp(-1 / 4))  # of the first class: the teacher's, the student's
    wanted = 4**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert float(soft_losses(ours, theirs, 4.0)) == pytest.approx(wanted, rel=1e-5)


def test_the_mean_of_both_terms_is_weighted_as_asked():
    logits, theirs, losses = said((5, 3)), said((5, 3), 1), torch.arange(5.0)
    mixed = Distillation(teacher=lambda images: theirs, temperature=2.0, weight=0.9)(losses, logits, torch.empty(5))
    torch.testing.assert_close(mixed, 0.1 * losses + 0.9 * soft_losses(logits, theirs, 2.0))


@pytest.mark.technique("T162")
def test_a_student_that_says_what_its_teacher_says_has_no_soft_gradient():
    logits = said((6, 4)).double().requires_grad_()
    losses = soft_losses(logits, logits.detach() + 7, 3.0)  # a constant in all logits says nothing
    losses.sum().backward()
    assert float(losses.detach().abs().max()) < 1e-12
    assert float(logits.grad.abs().max()) < 1e-12
    other = soft_losses(logits, said((6, 4), 1).double(), 3.0)
    assert float(other.detach().min()) > 0


def test_at_high_temperature_the_gradient_is_that_of_matching_logits():
    """Hinton et al. 2015, section 2.1: (z - v) / K for centred logits; without T^2 it would vanish."""
    logits, theirs = said((6, 4)).double().requires_grad_(), said((6, 4), 1).double()
    soft_losses(logits, theirs, 1e4).sum().backward()
    ours, wanted = logits.detach(), theirs - theirs.mean(1, keepdim=True)
    torch.testing.assert_close(logits.grad, (ours - ours.mean(1, keepdim=True) - wanted) / 4, rtol=1e-2, atol=1e-2)


def test_the_soft_gradient_is_the_temperature_times_the_difference_of_soft_answers():
    for temperature in (1.0, 2.0, 5.0):
        logits, theirs = said((6, 4)).double().requires_grad_(), said((6, 4), 1).double()
        soft_losses(logits, theirs, temperature).sum().backward()
        gap = (logits.detach() / temperature).softmax(1) - (theirs / temperature).softmax(1)
        torch.testing.assert_close(logits.grad, temperature * gap)


def test_answers_to_other_classes_or_images_are_refused():
    with pytest.raises(ValueError, match="must match"):
        soft_losses(torch.zeros(4, 3), torch.zeros(1, 3), 2.0)


def tiny_teacher():
    torch.manual_seed(7)
    network = TinyBackbone()
    network.norm.running_mean.normal_()
    return nn.Sequential(network, nn.Dropout(0.5), nn.Linear(4, 3))


def module_of(classifier, distillation, *, mixing=None, loss=None):
    optimizer = make_optimizer(classifier, STAGE, Rule(name="sgd", weight_decay=0.0))
    step = Step(
        loss=loss or make_loss("none", [7, 6, 6]),
        factor=lambda step: 1.0,
        clip_norm=1e9,
        seed=0,
        mixing=mixing,
        distillation=distillation,
    )
    module = Finetuning(classifier, optimizer, step, warn=quiet)
    module.manual_backward = lambda loss: loss.backward()
    return module


def gradients_of(distillation, labels, images, **rest):
    classifier = tiny_classifier()
    inner = ShortOfMemory(classifier, 5) if rest.pop("is_short", False) else classifier
    module_of(inner, distillation, **rest)._accumulate(images, labels)
    return [parameter.grad for parameter in classifier.parameters() if parameter.grad is not None]


def are_same(ours, theirs):
    return len(ours) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def batch(seed=0):
    return torch.randn(19, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(19) % 3


def test_weight_0_is_the_ordinary_training_bit_for_bit_and_weight_1_ignores_labels():
    images, labels = batch()
    teacher = Teacher(tiny_teacher(), VIEW, VIEW)
    none, all_of_it, half = (Distillation(teacher=teacher, temperature=2.0, weight=weight) for weight in (0, 1, 0.5))
    assert are_same(gradients_of(none, labels, images), gradients_of(None, labels, images))
    shuffled = labels.flip(0)
    assert not torch.equal(shuffled, labels)
    assert are_same(gradients_of(all_of_it, labels, images), gradients_of(all_of_it, shuffled, images))
    assert not are_same(gradients_of(half, labels, images), gradients_of(half, shuffled, images))


def test_the_soft_term_compares_logits_as_they_are_shipped_whatever_the_loss_adds_to_them():
    images, labels = batch()
    distillation = Distillation(teacher=Teacher(tiny_teacher(), VIEW, VIEW), temperature=2.0, weight=1.0)
    adjusted = make_loss("logit_adjustment", [17, 1, 1])
    assert float(log_priors([17, 1, 1]).std()) > 1
    assert are_same(
        gradients_of(distillation, labels, images, loss=adjusted), gradients_of(distillation, labels, images)
    )


def test_pieces_of_a_batch_have_the_gradient_of_the_whole():
    images, labels = batch()
    distillation = Distillation(teacher=Teacher(tiny_teacher(), VIEW, VIEW), temperature=2.0, weight=0.9)
    whole = gradients_of(distillation, labels, images)
    for ours, theirs in zip(gradients_of(distillation, labels, images, is_short=True), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_teacher_sees_the_very_pixels_of_the_student_mixed():
    images, labels = batch()
    teacher_saw, student_saw = [], []
    classifier = tiny_classifier()
    classifier.register_forward_pre_hook(lambda module, inputs: student_saw.append(inputs[0].clone()))

    def teacher(pixels):
        teacher_saw.append(pixels.clone())
        return torch.zeros(len(pixels), 3)

    distillation = Distillation(teacher=teacher, temperature=2.0, weight=0.9)
    module = module_of(classifier, distillation, mixing=Mixing(1.0, 1.0, 3))
    module._descend = lambda images, targets: (*module._accumulate(images, targets), 0.0)
    module.training_step((images, labels, labels), 0)
    assert torch.equal(teacher_saw[0], student_saw[0])
    assert not torch.equal(teacher_saw[0], images)


def test_a_teacher_stays_in_eval_mode_moves_nothing_and_wants_no_gradient():
    network = tiny_teacher()
    teacher = Teacher(network, VIEW, VIEW)
    before = copy.deepcopy(teacher.state_dict())
    nn.ModuleList([teacher]).train()
    images, labels = batch()
    gradients_of(Distillation(teacher=teacher, temperature=2.0, weight=0.9), labels, images)
    assert not any(piece.training for piece in teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert torch.equal(teacher(images), teacher(images))  # dropout is off
    assert not teacher(images.requires_grad_()).requires_grad


def test_a_teacher_of_another_mean_and_deviation_is_given_its_own():
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    other = View(size_pixels=8, shorter_pixels=8, interpolation="bilinear", mean=(0.1, 0.5, 0.9), std=(1.0, 0.5, 0.1))
    network = tiny_teacher().eval()
    wanted, given = network(normalize(pixels, other)), normalize(pixels, VIEW)
    torch.testing.assert_close(Teacher(network, other, VIEW)(given), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(Teacher(network, VIEW, VIEW)(given), wanted, atol=1e-2)


def test_a_plan_and_a_teacher_that_do_not_fit_are_our_fault(pool, student):
    with pytest.raises(ValueError, match="the one given is NoneType"):
        make_distillation(student.plan, None)
    with pytest.raises(ValueError, match="teacher is None"):
        make_distillation(pool[0].plan, nn.Identity())


@pytest.mark.technique("T162")
def test_a_student_of_an_ensemble_is_one_network_and_is_judged_beside_it(pool, student):
    teacher, scores = pool[2], student.read_json("scores.json")
    assert student.plan.train.distillation.teacher == str(teacher.path)
    assert set(load_file(student.final_weights())) == set(load_file(pool[0].final_weights()))
    found, stored = scores["teacher"], np.load(teacher.file("predictions.npz"))
    assert (found["run"], found["networks"]) == (str(teacher.path), 2)
    right = stored["test_probabilities"].argmax(1) == stored["test_labels"]
    assert found["test"]["top1"] == teacher.read_json("scores.json")["test"]["top1"]
    own = np.load(student.file("predictions.npz"))
    pair = found["paired"]["test"]
    ours = own["test_probabilities"].argmax(1) == own["test_labels"]
    assert pair["n"] == len(right)
    assert pair["difference"] == pytest.approx(ours.mean() - right.mean())
    assert pair["low"] <= pair["difference"] <= pair["high"]
    assert "final minus teacher on test" in scores_text(student.scores)
    assert ", for 1 pass in place of 2" in scores_text(student.scores)
    assert "views are compared" not in scores_text(student.scores)
    page = student.file("report.html").read_text(encoding="utf-8")
    assert "Against its teacher, image by image" in page
    assert ", for 1 pass per image in place of 2;" in page
    assert "Loss (train: labels and teacher)" in page
    assert "Loss (train" not in pool[0].file("report.html").read_text(encoding="utf-8")
    assert any(flag.startswith("train.distillation.teacher") for flag in scores["chosen_by_val"])


@pytest.mark.slow
def test_passes_are_views_times_networks_on_both_sides_and_views_that_differ_are_noted(shapes, pool, tmp_path):
    teacher = RunFolder(shutil.copytree(pool[0].path, tmp_path / "teacher"))
    evaluate(teacher.path, views="ten", say=quiet)
    run = start(shapes, tmp_path / "runs", *taught(teacher), "train.epochs=1")
    alike = "image in place of"
    text, page = scores_text(run.scores), run.file("report.html").read_text(encoding="utf-8")
    assert ", for 1 pass in place of 10" in text and alike in page
    assert "judged in ten views and its student in center, so the views are compared" in " ".join(text.split())
    assert "judged in ten views and its student in center" in page
    evaluate(teacher.path, views="center", say=quiet)
    shutil.rmtree(teacher.path)  # what it said, and in which views, is kept
    scores = evaluate(run.path, views="ten", say=quiet)
    assert (scores.teacher.views, scores.teacher.passes, scores.teacher.student_passes) == (
        "ten", 10, 10,
    )  # fmt: skip
    assert "in place of" not in scores_text(scores) and scores.teacher.views_note is None
    assert alike not in run.file("report.html").read_text(encoding="utf-8")
    assert ", for 5 passes in place of 10" in scores_text(evaluate(run.path, views="five", say=quiet))


def test_the_plan_says_who_teaches_and_at_what_price(student):
    (reason,) = (reason for reason in student.plan.reasons if reason.key == "train.distillation.teacher")
    assert reason.why.startswith("an average of 2 networks teaches: 90 % of the loss is its word at temperature 2")
    assert "on top of every training step" in reason.why
    assert reason.value in plan_text(student.plan)
    assert reason.value in student.file("report.html").read_text(encoding="utf-8")


def test_a_plan_from_before_there_were_teachers_can_be_read_and_has_none(pool, tmp_path):
    written = yaml.safe_load(pool[0].file("plan.yaml").read_text())
    assert written["train"].pop("distillation")["teacher"] is None
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(written))
    assert read_plan(tmp_path / "plan.yaml") == pool[0].plan


@pytest.mark.slow
def test_the_teachers_files_are_as_they_were_and_a_student_is_closer_to_it_than_a_run_of_its_own(
    shapes, pool, student, tmp_path
):
    alone = start(shapes, tmp_path, "augment.mixup=0.2")
    teacher = load_teacher(student.plan)
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)).mul(4).sub(2)
    with torch.inference_mode():
        gaps = [float(soft_losses(load_final(run)(images), teacher(images), 2.0).mean()) for run in (student, alone)]
    assert gaps[0] < gaps[1]
    assert (
        read_teacher(str(pool[2].path)).weights_digest == student.read_json("facts.json")["teacher"]["weights_digest"]
    )


@pytest.mark.slow
def test_weight_0_ends_in_the_weights_of_a_run_without_a_teacher(shapes, pool, tmp_path):
    alone = start(shapes, tmp_path / "alone", "head.dropout=0.2", "train.averaging.wise_ft=1")
    beside = start(shapes, tmp_path / "beside", "head.dropout=0.2", *taught(pool[0], weight=0))
    ours, theirs = load_file(alone.final_weights()), load_file(beside.final_weights())
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    "wishes",
    [
        ["train.strategy=gradual", "train.epochs=4"],
        pytest.param(
            ["train.optimizer.name=lbfgs", "augment.preset=none", "train.batch_size=64"], marks=pytest.mark.slow
        ),
        ["hardware.precision=bf16"],
        ["data.normalize=channel_mean_std", "train.averaging.kind=ema"],
        ["pretrained=false"],
    ],
    ids=lambda wishes: wishes[0].partition("=")[2],
)
@pytest.mark.slow
def test_whatever_trains_can_be_taught(shapes, pool, tmp_path, wishes):
    short = [*wishes, *([] if "train.epochs=4" in wishes else ["train.epochs=1"])]
    run = start(shapes, tmp_path / "taught", *taught(pool[2]), *short)
    alone = load_file(start(shapes, tmp_path / "alone", *short).final_weights())
    assert run.read_json("scores.json")["teacher"]["paired"]["test"]["n"] > 0
    assert any(not torch.equal(value, alone[name]) for name, value in load_file(run.final_weights()).items())
    if wishes[0].startswith("data.normalize"):
        assert run.plan.view.mean != pool[2].plan.view.mean


def stop_after_an_epoch(shapes, runs, *wishes):
    def stop(text):
        if "epoch 1/" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(shapes, runs, *wishes, say=stop)
    (folder,) = runs.iterdir()
    assert not RunFolder(folder).final_weights().exists()
    return RunFolder(folder)


@pytest.mark.slow
def test_an_interrupted_student_ends_in_the_same_weights_from_any_folder(shapes, pool, student, tmp_path, monkeypatch):
    monkeypatch.chdir(pool[2].path.parent)
    near = taught(RunFolder(pool[2].path.relative_to(pool[2].path.parent)))
    run = stop_after_an_epoch(shapes, tmp_path / "runs", *near, "augment.mixup=0.2")
    monkeypatch.chdir(tmp_path)
    assert ft.load_recipe(run.file("recipe.yaml")).train.distillation.teacher == str(pool[2].path)
    ft.resume(run.path, say=quiet)
    ours, theirs = load_file(run.final_weights()), load_file(student.final_weights())
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.slow
def test_a_teacher_that_has_changed_or_is_gone_stops_a_resume(shapes, pool, tmp_path):
    teacher = RunFolder(shutil.copytree(pool[2].path, tmp_path / "teacher"))
    run = stop_after_an_epoch(shapes, tmp_path / "runs", *taught(teacher))
    path = teacher.file("members/2/stages/1-full/weights.safetensors")
    state = load_file(path)
    state["head.linear.bias"] += 1
    save_file(state, path)
    with pytest.raises(RunError, match=r"teacher has changed since the plan was made .* Put it back"):
        ft.resume(run.path, say=quiet)
    shutil.rmtree(teacher.path)
    with pytest.raises(RunError, match=r"teacher is gone, and has not taught to the end\. Put it back"):
        ft.resume(run.path, say=quiet)
    shutil.copytree(pool[2].path, teacher.path)
    ft.resume(run.path, say=quiet)
    shutil.rmtree(teacher.path)
    before = run.scores.teacher
    assert evaluate(run.path, say=quiet).teacher == before  # its answers are kept beside the student's
    run.file("predictions.npz").unlink()
    scores = evaluate(run.path, say=quiet)
    assert "not at hand" in scores.teacher.note
    assert scores.teacher.note in scores_text(scores)


def refusal(shapes, tmp_path, *wishes):
    with pytest.raises((RecipeError, RunError)) as caught:
        start(shapes, tmp_path / "runs", *wishes)
    runs = list((tmp_path / "runs").iterdir()) if (tmp_path / "runs").exists() else []
    assert not any((run / "plan.yaml").exists() for run in runs)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wish", "wanted"),
    [
        ("data.split.seed=5", "was trained on another split of the images"),
        ("data.max_train_per_class=5", "no score would be honest"),
        ("data.image_size=48", r"Set data.image_size=32."),
        ("data.crop_pct=0.7", "(crop_pct 0.7). Set data.crop_pct="),
        ("train.strategy=probe", "strategy probe trains nothing that could be taught"),
        ("train.distillation.teacher=/no/such/run", "train.distillation.teacher: /no/such/run is no folder"),
    ],
    ids=lambda value: value.partition("=")[0] if "=" in value else "",
)
def test_a_teacher_that_cannot_teach_here_is_refused_before_training(shapes, pool, tmp_path, wish, wanted):
    assert wanted in refusal(shapes, tmp_path, *taught(pool[0]), wish)


@pytest.mark.slow
def test_a_teacher_of_other_classes_is_refused(shapes, pool, tmp_path):
    fewer = tmp_path / "fewer"
    for name in ("disc", "stripes"):
        shutil.copytree(shapes / name, fewer / name)
    assert "knows other classes, or in another order (disc, square, stripes" in refusal(
        fewer, tmp_path, *taught(pool[0])
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("stages/1-full/weights.safetensors", "is not trained to its end"), ("predictions.npz", "is not judged yet")],
)
def test_an_unfinished_teacher_is_refused_and_leaves_no_folder(shapes, pool, tmp_path, name, wanted):
    teacher = RunFolder(shutil.copytree(pool[0].path, tmp_path / "teacher"))
    teacher.file(name).unlink()
    assert wanted in refusal(shapes, tmp_path, *taught(teacher))
    assert not (tmp_path / "runs").exists()


def test_a_broken_test_image_is_found_by_a_plan_as_by_a_training(shapes, tmp_path):
    images = tmp_path / "images"
    for path in sorted(shapes.rglob("*.png")):
        role = ("test", "val", "train", "train")[int(path.stem) % 4]
        target = images / role / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    broken = images / "test" / "disc" / "00.png"
    broken.write_bytes(broken.read_bytes()[:200])
    teacher = start(images, tmp_path / "runs", "train.epochs=1")
    recipe = ft.load_recipe(None, [f"data.root={images}", *SMALL, *FULL, *taught(teacher)])
    facts, decided = plan(recipe, say=quiet)
    assert [one.name for one in facts.bad_images] == ["test/disc/00.png"]
    assert decided.split_digest == teacher.plan.split_digest
    assert show_images(recipe, tmp_path / "views.png", say=quiet).exists()
    alone = ft.load_recipe(None, [f"data.root={images}", *SMALL, *FULL])
    assert not plan(alone, say=quiet)[0].bad_images  # without a teacher no test image is opened


@pytest.mark.parametrize("folder", [".", "members/2"])
def test_a_teacher_whose_backbone_is_not_at_hand_is_refused_before_images_are_looked_at(
    shapes, pool, tmp_path, monkeypatch, folder
):
    monkeypatch.setattr("finetune.preparing.look", None)
    teacher = RunFolder(shutil.copytree(pool[0 if folder == "." else 2].path, tmp_path / "teacher"))
    changed(RunFolder(teacher.file(folder)), backbone="lost_card").file(
        "card.yaml"
    ).unlink()  # as older versions left it
    with pytest.raises(BackboneError, match=r"train\.distillation\.teacher: .*'lost_card' is neither a card"):
        start(shapes, tmp_path / "runs", *taught(teacher))
    assert not (tmp_path / "runs").exists()


def changed(run, **parts):
    """The run with other parts of its plan."""
    run.write_text("plan.yaml", run.plan.model_copy(update=parts).to_yaml())
    return run


@pytest.mark.parametrize("folder", [".", "members/1"])
def test_another_backbone_head_or_view_of_any_network_is_another_teacher(pool, tmp_path, folder):
    teacher = RunFolder(shutil.copytree(pool[2].path, tmp_path / "teacher"))
    one = RunFolder(teacher.file(folder))
    was = one.plan
    digests = {read_teacher(str(pool[2].path)).weights_digest, read_teacher(str(teacher.path)).weights_digest}
    assert len(digests) == 1
    others = [{"backbone": "another"}, {"head": was.head.model_copy(update={"activation": "gelu"})}]
    if folder == ".":  # members with views of their own are no teacher at all
        others.append({"data": was.data.model_copy(update={"mean": (0.1, 0.2, 0.3)})})
    for parts in others:
        changed(one, **{"backbone": was.backbone, "head": was.head, "data": was.data, **parts})
        digests.add(read_teacher(str(teacher.path)).weights_digest)
    assert len(digests) == 1 + len(others)


def test_a_pilot_spends_no_second_where_the_teacher_is_wrong(shapes, pool, monkeypatch):
    monkeypatch.setattr("finetune.preparing.run_pilot", None)
    wishes = [*SMALL, *FULL, *taught(pool[0]), "train.strategy=null", "data.split.seed=5"]
    with pytest.raises(RecipeError, match="was trained on another split"):
        plan(ft.load_recipe(None, [f"data.root={shapes}", *wishes]), say=quiet, pilot_seconds=60)


def balanced(run, kind, **rest):
    train = run.plan.train
    imbalance = train.imbalance.model_copy(update={"kind": kind})
    return changed(run, train=train.model_copy(update={"imbalance": imbalance}), **rest)


def test_a_probe_was_never_balanced_and_members_that_differ_are_not_followed(pool, tmp_path):
    teacher = RunFolder(shutil.copytree(pool[2].path, tmp_path / "teacher"))
    for number in (1, 2):
        balanced(RunFolder(teacher.file(f"members/{number}")), "logit_adjustment")
    known = read_teacher(str(teacher.path))
    # the plan of the whole, which says none, counts for nothing
    assert inherit_imbalance(known, [9, 9])[0] == "logit_adjustment"
    second = RunFolder(teacher.file("members/2"))
    shutil.copy(pool[1].file("probe.safetensors"), second.path)
    balanced(second, "logit_adjustment", stages=())
    known = read_teacher(str(teacher.path))
    assert known.imbalances == ("logit_adjustment", "none")
    kind, why = inherit_imbalance(known, [9, 9])
    assert kind == "none" and why.endswith(
        "its teacher's networks differ in this (logit_adjustment, none), so it sets no example"
    )
    assert inherit_imbalance(known, [99, 9])[0] == KIND
    assert inherit_imbalance(None, [9, 9])[0] == "none"


def test_an_advised_probe_is_refused_where_a_teacher_is_named(shapes, pool, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.planning.planner.advise", lambda facts, prefer: pool[0].plan.advice.model_copy(
        update={"strategy": "probe"}
    ))  # fmt: skip
    wishes = [*SMALL, *FULL, *taught(pool[0]), "train.strategy=null"]
    with pytest.raises(RecipeError, match="needs something that trains, but the advice is probe"):
        plan(ft.load_recipe(None, [f"data.root={shapes}", *wishes]), say=quiet)


def test_without_a_teacher_its_keys_are_said_to_be_inactive_and_with_one_its_balance_is_taken(shapes, pool):
    def reasons(*wishes):
        recipe = ft.load_recipe(None, [f"data.root={shapes}", *SMALL, *FULL, *wishes])
        return {reason.key: reason for reason in plan(recipe, say=quiet)[1].reasons}

    idle = reasons("train.distillation.weight=0.5")["train.distillation.weight"]
    assert idle.why == "inactive: it is read only with train.distillation.teacher"
    found = reasons(*taught(pool[0], weight=0.5))
    assert "one network teaches: 50 %" in found["train.distillation.teacher"].why
    assert "train.distillation.weight" not in found
    assert "as its teacher was trained" in found["train.imbalance.kind"].why
