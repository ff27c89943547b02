"""A finished run is a beginning: its weights in other runs, its folder on other machines, its images elsewhere."""

import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import finetune as ft
from finetune.config.backbone_names import read_zoo, short_name
from finetune.config.card import read_card
from finetune.errors import BackboneError, RecipeError, RunError
from finetune.inference.loading import load_final
from finetune.models.backbones import load_backbone
from finetune.preparing import plan
from finetune.runs.folder import RunFolder
from finetune.runs.resume import another_wish, record_root

SMALL = [
    "data.image_size=32",
    "train.batch_size=16",
    "train.epochs=2",
    "tracking.enabled=false",
    "data.split.refit=false",
]


def quiet(text):
    """Nobody listens."""


def start(images, runs, *wishes):
    return ft.train(ft.load_recipe(None, [f"data.root={images}", *SMALL, *wishes]), runs=runs, say=quiet)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where the runs of these tests are."""
    return tmp_path_factory.mktemp("going-on") / "runs"


@pytest.fixture(scope="module")
def first(shapes, runs):
    """A full fine-tuning of an averaged network, for others to begin from."""
    return start(shapes, runs, "train.strategy=full", "train.averaging.kind=ema", "train.checkpoint=last")


@pytest.fixture(scope="module")
def others(shapes, tmp_path_factory):
    """Two of the classes of the first run under other names."""
    folder = tmp_path_factory.mktemp("others")
    for old, new in (("disc", "round"), ("stripes", "lines")):
        shutil.copytree(shapes / old, folder / new)
    return folder


@pytest.fixture(scope="module")
def child(first, others, runs):
    """A run of other classes that begins from the first; of another seed, so its split is another."""
    return start(others, runs, f"backbone={first.path}", "train.strategy=full", "seed=1")


@pytest.fixture
def no_zoo(monkeypatch, tmp_path):
    """A machine without a single backbone."""
    monkeypatch.setattr("finetune.config.backbone_names.zoo_folders", lambda: [])
    monkeypatch.setattr("finetune.config.backbone_names.shipped", lambda name: tmp_path / "nothing")
    assert not read_zoo()


def features_of(run):
    return {name.removeprefix("backbone.model."): t for name, t in load_file(run.file("model.safetensors")).items()}


def test_the_model_of_a_run_is_the_kept_one_and_its_card_tells_the_network_and_the_view(first):
    kept, whole = load_file(first.final_weights()), load_file(first.file("model.safetensors"))
    assert kept.keys() == whole.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in kept.items())
    card = read_card(first.file("card.yaml"))
    assert (card.arch, dict(card.arch_kwargs)) == (first.plan.arch, first.plan.arch_kwargs)
    assert card.classes == first.plan.classes == tuple(first.file("classes.txt").read_text().split())
    assert card.view() == first.plan.view


def test_a_run_begins_from_the_kept_weights_of_another_whose_classes_are_others(first, child):
    backbone = load_backbone(str(first.path), zoo={})
    mine = features_of(first)
    assert all(torch.equal(mine[name], tensor) for name, tensor in backbone.model.state_dict().items())
    assert child.plan.weights_digest == backbone.digest
    assert child.plan.backbone == str(first.path)
    assert yaml.safe_load(child.file("recipe.yaml").read_text())["backbone"] == str(first.path)
    assert child.plan.classes == ("lines", "round")


def test_where_weights_come_from_is_carried_on_with_their_licence(first, child):
    bundled = read_zoo()[first.plan.backbone]
    facts = child.read_json("facts.json")["backbone"]
    num = sum(first.read_json("facts.json")["counts"]["train"])
    assert facts["pretrained_on"] == (
        f"{bundled.pretrained_on}, then {num} images of 3 classes (disc, square, stripes)"
    )
    assert facts["licence"] == bundled.licence
    assert "of 2 classes (lines, round)" in read_card(child.file("card.yaml")).pretrained_on


def test_the_folder_of_a_run_begun_from_a_run_is_called_after_the_network(first, child):
    assert short_name(str(first.path)) == first.plan.arch
    assert child.path.name.startswith("others")
    assert first.plan.arch in child.path.name


@pytest.mark.slow
def test_test_images_that_the_weights_have_seen_are_told_also_over_a_run_between(shapes, first, child):
    same = ft.survey(ft.load_recipe(str(shapes), [*SMALL, f"backbone={first.path}", "train.strategy=probe"]))
    assert not [line for line in same.warnings if "were seen" in line]  # same seed, same split
    for run in (first, child):
        wishes = [*SMALL, f"backbone={run.path}", "train.strategy=probe", "seed=2"]
        facts = ft.survey(ft.load_recipe(str(shapes), wishes))
        (line,) = [line for line in facts.warnings if "were seen" in line]
        assert f"of {sum(facts.counts['test'])} test images" in line
        assert str(run.path) in line
    assert [line for line in child.read_json("facts.json")["warnings"] if "were seen" in line]


@pytest.mark.slow
def test_a_probe_leaves_its_backbone_as_it_was_and_has_shown_it_nothing(shapes, first, runs):
    probe = start(shapes, runs, f"backbone={first.path}", "train.strategy=probe")
    card = read_card(probe.file("card.yaml"))
    assert card.pretrained_on == read_card(first.file("card.yaml")).pretrained_on
    assert load_backbone(str(probe.path), zoo={}).digest == probe.plan.weights_digest
    assert "head.linear.weight" in load_file(probe.file("model.safetensors"))


@pytest.mark.parametrize("wish", ["train.strategy=probe", "train.strategy=full"])
def test_a_run_predicts_with_its_folder_alone(shapes, tmp_path, no_zoo_later, wish):
    run = start(shapes, tmp_path / "runs", wish, "train.epochs=1")
    image = sorted((shapes / "disc").iterdir())[0]
    before = ft.predict(run, [image])
    alone = RunFolder(run.path.rename(tmp_path / "alone"))
    no_zoo_later()
    assert ft.predict(alone, [image]) == before
    shutil.rmtree(alone.path / "stages", ignore_errors=True)
    assert ft.predict(alone, [image]) == before


@pytest.fixture
def no_zoo_later(request):
    """Takes the zoo away when called."""
    return lambda: request.getfixturevalue("no_zoo")


def test_a_run_begins_from_a_run_where_there_is_no_zoo(others, first, no_zoo):
    wishes = [*SMALL, f"backbone={first.path}", "train.strategy=probe"]
    facts, _ = plan(ft.load_recipe(str(others), wishes), say=quiet)
    assert facts.backbone.name == str(first.path)


def test_a_run_is_named_by_its_folder_among_the_runs(first, others, monkeypatch):
    monkeypatch.setenv("FINETUNE_RUNS", str(first.path.parent))
    wishes = [*SMALL, f"backbone={first.path.name}", "train.strategy=probe"]
    facts, _ = plan(ft.load_recipe(str(others), wishes), say=quiet)
    assert facts.backbone.name == str(first.path)


def test_a_run_of_an_older_version_says_which_card_it_needs_and_is_made_whole_by_evaluate(
    shapes, first, tmp_path, request
):
    old = RunFolder(shutil.copytree(first.path, tmp_path / "old"))
    for name in ("card.yaml", "classes.txt", "model.safetensors", "seen.npz"):
        old.file(name).unlink()
    with pytest.raises(BackboneError, match=r"older version, without a card. `finetune evaluate .*old` gives it one"):
        load_backbone(str(old.path), zoo={})
    assert load_final(old) is not None  # its card is at hand
    ft.evaluate(old.path, say=quiet)
    assert old.file("model.safetensors").read_bytes() == first.file("model.safetensors").read_bytes()
    old.file("card.yaml").unlink()
    request.getfixturevalue("no_zoo")
    with pytest.raises(BackboneError, match=r"made by an older version, with tiny_resnet18.cifar10, whose card is"):
        load_final(old)


def test_what_no_training_can_begin_from_is_refused_by_what_it_is(shapes, first, tmp_path):
    average, half = (RunFolder(shutil.copytree(first.path, tmp_path / name)) for name in ("average", "half"))
    for run in (average, half):
        run.file("card.yaml").unlink()
    average.write_json("ensemble.json", {})
    half.file("scores.json").unlink()
    for run, words in ((average, "averages several networks"), (half, "not trained to its end. `finetune resume")):
        with pytest.raises(BackboneError, match=words):
            start(shapes, tmp_path / "runs", f"backbone={run.path}")
    with pytest.raises(BackboneError, match=r"holds no card.yaml, so it is neither"):
        start(shapes, tmp_path / "runs", f"backbone={shapes}")
    with pytest.raises(BackboneError, match=r"is not there. .*Nearest: half"):
        start(shapes, tmp_path / "runs", f"backbone={tmp_path}/hal")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_more_epochs_of_a_finished_run_are_another_run_from_its_weights(first):
    before, lines = sorted(path.name for path in first.path.iterdir()), []
    again = ft.resume(first.path, ["train.epochs=3"], say=lines.append)
    assert again.path.parent == first.path.parent
    assert again.path != first.path
    assert "this is another run" in lines[0]
    old, new = (yaml.safe_load(run.file("recipe.yaml").read_text()) for run in (first, again))
    assert new == {**old, "backbone": str(first.path), "train": {**old["train"], "epochs": 3}}
    assert again.plan.split_digest == first.plan.split_digest
    assert again.plan.stages[0].epochs == 3
    assert not [line for line in again.read_json("facts.json")["warnings"] if "were seen" in line]
    assert sorted(path.name for path in first.path.iterdir()) == before


def test_what_began_from_nothing_goes_on_from_what_it_became(first, tmp_path):
    run = RunFolder(shutil.copytree(first.path, tmp_path / "control"))
    recipe = yaml.safe_load(run.file("recipe.yaml").read_text())
    wish = {**recipe, "pretrained": False, "head": {"init": "zero"}, "train": {**recipe["train"], "reinit": 1}}
    run.write_text("recipe.yaml", yaml.safe_dump(wish))
    found = another_wish(run, ["train.epochs=3"])
    assert (found.pretrained, found.head.init, found.train.reinit, found.train.epochs) == (True, None, 0, 3)
    assert another_wish(run, ["head.init=zero"]).head.init == "zero"


def test_the_plan_of_an_unfinished_run_does_not_change_on_the_way(first, tmp_path):
    run = RunFolder(shutil.copytree(first.path, tmp_path / "half"))
    run.file("scores.json").unlink()
    with pytest.raises(RunError, match=r"is not finished, and its plan cannot change .*train.epochs=9` starts anew"):
        ft.resume(run.path, ["train.epochs=9"], say=quiet)


def test_images_that_have_moved_are_named_and_found_by_their_content(shapes, first, tmp_path):
    run = RunFolder(shutil.copytree(first.path, tmp_path / "run"))
    where = [f"data.root={tmp_path / 'there'}"]
    gone, there = shutil.copytree(shapes, tmp_path / "gone"), tmp_path / "there"
    record_root(run, str(gone))
    gone.rename(there)
    for walk in (ft.resume, ft.evaluate):
        with pytest.raises(RunError, match=r"gone is not there, .*`finetune resume .*run data.root=FOLDER` makes sure"):
            walk(run.path, say=quiet)
    run.file("scores.json").unlink()  # it was stopped before it was judged
    assert ft.resume(run.path, where, say=quiet).path == run.path
    assert run.read_json("scores.json") == first.read_json("scores.json")
    assert run.plan.data.root == str(there)
    assert yaml.safe_load(run.file("recipe.yaml").read_text())["data"]["root"] == str(there)
    assert ft.evaluate(run.path, views="five", say=quiet).views == "five"


@pytest.mark.slow
def test_other_images_are_not_taken_for_those_that_have_moved(others, first, tmp_path):
    run = RunFolder(shutil.copytree(first.path, tmp_path / "run"))
    plan_before = run.file("plan.yaml").read_bytes()
    with pytest.raises(RunError, match="the images have changed since the plan was made"):
        ft.resume(run.path, [f"data.root={others}"], say=quiet)
    assert run.file("plan.yaml").read_bytes() == plan_before
    assert str(others) not in run.file("recipe.yaml").read_text()


def test_a_run_given_as_images_is_told_for_what_it_is(first):
    with pytest.raises(RecipeError, match=r"holds a run, no images. `finetune resume .*backbone="):
        ft.load_recipe(str(first.path))


def test_a_run_is_added_to_the_zoo_with_what_its_card_names(first, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_ZOO", str(tmp_path))
    card = ft.zoo.add_card(first.path)
    assert sorted(path.name for path in (tmp_path / first.path.name).iterdir()) == [
        "card.yaml",
        "classes.txt",
        "model.safetensors",
        "seen.npz",
    ]
    assert load_backbone(card.name, zoo=read_zoo()).digest == load_backbone(str(first.path), zoo={}).digest
    assert ft.zoo.card_fault(card) is None


def test_a_run_without_a_card_is_not_added_to_the_zoo(first, tmp_path):
    run = RunFolder(shutil.copytree(first.path, tmp_path / "half"))
    for name in ("card.yaml", "scores.json"):
        run.file(name).unlink()
    with pytest.raises(BackboneError, match="is a run that is not trained to its end"):
        ft.zoo.add_card(run.path)


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "torchvision/shufflenet_v2_x0_5"])
def test_the_network_that_a_card_names_is_built_again(name):
    backbone = load_backbone(name, zoo={}, pretrained=False)
    arch, options = backbone.network
    card = replace(backbone.card, name="again", arch=arch, arch_kwargs=options)
    again = load_backbone("again", zoo={"again": card}, pretrained=False)
    shapes = [{key: t.shape for key, t in one.model.state_dict().items()} for one in (backbone, again)]
    assert shapes[0] == shapes[1]
    assert again.network == (arch, options)
