"""A plan that is trained: the very run that it came from, another one where a value was changed; what is refused."""

import hashlib
import shutil

import pytest
import torch
import yaml
from conftest import draw_shapes
from torch.utils.data import TensorDataset

import finetune as ft
from finetune.errors import BackboneError, DataError, RecipeError, RunError
from finetune.planning.plan_faults import PLAN_FAULTS, refuse_misfit
from finetune.runs.folder import FILES, RunFolder

SMALL = ["data.image_size=32", "train.batch_size=16", "train.epochs=2", "tracking.enabled=false"]
KINDS = {
    "probe": ["train.strategy=probe"],
    "partial": ["train.strategy=partial", "data.split.refit=false"],
    "members": [
        "train.strategy=full", "train.epochs=4", "train.averaging.snapshots=2", "train.averaging.kind=ema",
        "train.batch_norm=train", "data.normalize=channel_mean_std",
    ],
    "refit": ["train.strategy=gradual", "head.dropout=0.2"],
    "random": ["pretrained=false"],
    "surgical": ["train.strategy=surgical", "seed=3", "regularization.l2_sp=0.01"],
}  # fmt: skip
SLOW = ("random", "surgical")


def quiet(text):
    """Nobody listens."""


def start(images, runs, *wishes):
    return ft.train(ft.load_recipe(None, [f"data.root={images}", *SMALL, *wishes]), runs=runs, say=quiet)


def digests(run):
    """Of all weights and answers."""
    paths = [*run.path.rglob("*.safetensors"), run.file("predictions.npz"), run.file("scores.json")]
    return {str(path.relative_to(run.path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


@pytest.fixture(scope="module")
def made(shapes, tmp_path_factory):
    """Runs of recipes, made when they are asked for."""
    runs, folder = {}, tmp_path_factory.mktemp("made")

    def run_of(kind):
        if kind not in runs:
            runs[kind] = start(shapes, folder, *KINDS[kind])
        return runs[kind]

    return run_of


@pytest.fixture
def edited(made, tmp_path):
    """A copy of the plan of a run, with a value changed."""

    def copy(kind, *keys, value):
        plan = yaml.safe_load(made(kind).file("plan.yaml").read_text())
        inner = plan
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path = tmp_path / "edited.yaml"
        path.write_text(yaml.safe_dump(plan, sort_keys=False))
        return path

    return copy


@pytest.mark.parametrize("kind", [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in KINDS])
def test_a_plan_makes_the_very_run_that_it_came_from(made, kind, tmp_path):
    first = made(kind)
    again = ft.train(first.file("plan.yaml"), runs=tmp_path, say=quiet)
    assert again.path.parent == tmp_path
    assert again.file("plan.yaml").read_bytes() == first.file("plan.yaml").read_bytes()
    assert digests(again) == digests(first)


def test_a_plan_in_hand_is_trained_like_its_file(made, tmp_path):
    again = ft.train(made("probe").plan, runs=tmp_path, say=quiet)
    assert digests(again) == digests(made("probe"))
    _, plan = ft.plan(made("probe").file("recipe.yaml"), say=quiet)
    assert digests(ft.train(plan, runs=tmp_path, say=quiet)) == digests(made("probe"))


@pytest.mark.slow
def test_a_run_of_a_plan_holds_no_recipe_and_goes_on_predicts_and_is_judged(made, shapes, tmp_path):
    run = ft.train(made("partial").plan, runs=tmp_path, say=quiet)
    assert set(FILES) - {path.name for path in run.path.iterdir()} == {"recipe.yaml", "tracking.json"}
    before = digests(run)
    for name in ("scores.json", "predictions.npz", "stages/1-partial/weights.safetensors", "model.safetensors"):
        run.file(name).unlink()
    run.file("card.yaml").unlink()
    assert digests(ft.resume(run.path, say=quiet)) == before
    assert ft.evaluate(run.path, say=quiet) == made("partial").scores
    assert len(ft.predict(run.path, shapes)) > 0
    with pytest.raises(RunError, match=r"holds no recipe that train.epochs=3 could be laid over. Change a copy"):
        ft.resume(run.path, ["train.epochs=3"], say=quiet)
    child = start(shapes, tmp_path, "train.strategy=probe", f"backbone={run.path}")  # a run like any other
    assert child.plan.backbone == str(run.path)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["run folder", "  classes"], ids=["before", "after"])
def test_a_run_of_a_plan_that_is_stopped_before_or_after_the_survey_goes_on(made, tmp_path, words):
    def stop(text):
        if words in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ft.train(made("partial").plan, runs=tmp_path, say=stop)
    (folder,) = tmp_path.iterdir()
    assert RunFolder(folder).has_begun == (words != "run folder")
    assert digests(ft.resume(folder, say=quiet)) == digests(made("partial"))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("stages", 0, "lr_head"), 0.01),
        (("stages", 0, "epochs"), 1),
        (("train", "batch_size"), 8),
        pytest.param(("seed",), 1, marks=pytest.mark.slow),
        pytest.param(("stages", 0, "lr_backbone"), 0.002, marks=pytest.mark.slow),
        pytest.param(("stages", 0, "batch_norm"), "train", marks=pytest.mark.slow),
        pytest.param(("stages", 0, "trainable_stages"), 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_changed_value_changes_the_weights_and_stands_in_the_new_plan(made, edited, keys, value, tmp_path):
    run = ft.train(edited("partial", *keys, value=value), runs=tmp_path / "runs", say=quiet)
    found = yaml.safe_load(run.file("plan.yaml").read_text())
    for key in keys:
        found = found[key]
    assert found == value
    name = "stages/1-partial/weights.safetensors"
    assert digests(run)[name] != digests(made("partial"))[name]


MISFITS = {
    "backbone": (("backbone",), "tiny_resnet19", BackboneError, "tiny_resnet18"),
    "weights": (("weights_digest",), "0" * 64, RecipeError, r"plan: weights_digest is 000000000000, but tiny_resnet18"),
    "split": (
        ("split_digest",),
        "0" * 64,
        RecipeError,
        r"plan: split_digest is 000000000000, but the images in .*have",
    ),
    "division": (("data", "split", "val"), 0.3, RecipeError, r"plan: split_digest is .* divided as data.split says"),
    "nowhere": (("data", "root"), "/nowhere", DataError, r"data.root: /nowhere does not exist"),
    "key": (("stages", 0, "rate"), 0.1, RecipeError, r"edited.yaml, line \d+: stages.0.rate is no key of a plan"),
    "value": (("stages", 0, "epochs"), "many", RecipeError, r"line \d+: stages.0.epochs: .*integer.*, got 'many'"),
    "device": (("hardware", "devices"), "cuda", RecipeError, r"hardware.devices is cuda, but torch sees no GPU here"),
    "precision": (("hardware", "precision"), "fp16", RecipeError, r"hardware.precision is fp16, which"),
    "open": (("data", "image_size"), None, RecipeError, r"line \d+: data.image_size: .*integer, got None"),
    "layer": (("stages", 0, "layers"), ["layer9"], RecipeError, r"'layer9' is neither. Nearest: layer"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_plan_that_does_not_fit_is_refused_and_leaves_no_folder(edited, kind, tmp_path):
    keys, value, error, told = MISFITS[kind]
    with pytest.raises(error, match=told):
        ft.train(edited("partial", *keys, value=value), runs=tmp_path / "runs", say=quiet)
    assert not [*(tmp_path / "runs").glob("*")]


def test_other_images_are_refused(edited, tmp_path):
    others = draw_shapes(tmp_path / "others", per_class=20)
    with pytest.raises(RecipeError, match=r"plan: split_digest is .*, but the images in .*others"):
        ft.train(edited("probe", "data", "root", value=str(others)), runs=tmp_path / "runs", say=quiet)


def test_nothing_is_laid_over_a_plan_and_a_plan_is_no_recipe(made):
    path = made("probe").file("plan.yaml")
    with pytest.raises(RecipeError, match=r"plan.yaml is a plan, in which everything is decided, so seed=1 cannot"):
        ft.train(path, ["seed=1"], say=quiet)
    with pytest.raises(RecipeError, match=r"is a plan, in which everything is decided, and no recipe. `finetune train"):
        ft.load_recipe(path)


def test_images_that_have_moved_are_found_where_the_file_says(made, edited, shapes, tmp_path):
    there = shutil.copytree(shapes, tmp_path / "there")
    again = ft.train(edited("probe", "data", "root", value=str(there)), runs=tmp_path / "runs", say=quiet)
    assert digests(again) == digests(made("probe"))


def test_images_that_were_handed_in_are_handed_in_again(tmp_path):
    images = TensorDataset(torch.randint(0, 255, (40, 3, 32, 32), dtype=torch.uint8), torch.arange(40) % 2)
    first = ft.train(None, [*SMALL, "train.strategy=probe", "name=held"], dataset=images, runs=tmp_path, say=quiet)
    again = ft.train(first.file("plan.yaml"), dataset=images, runs=tmp_path, say=quiet)
    assert digests(again) == digests(first)
    with pytest.raises(
        RunError, match=r"TensorDataset .* for dataset \(the images\), and gets none now. Hand in the same"
    ):
        ft.train(first.plan, runs=tmp_path, say=quiet)


CONTRADICTIONS = {
    "split_digest is": {"split_digest": "x"},
    "weights_digest is": {"weights_digest": "x"},
    "classes are": {"classes": ("a", "b", "c")},
    "data.image_size is": {"data": {"image_size": 33}},
    "train.strategy is": {"stages": ()},
    "trainable_stages or": {"stage": {"trainable_stages": 99}},
    "epochs are no whole cycles": {"stage": {"epochs": 3, "schedule": {"name": "cyclic", "cycles": 2}}},
    "stages on images labelled": {"first": {"epochs": 5}},
    "data.split.refit is": {"data": {"split": {"refit": False}}},
}


def changed(plan, change):
    """The plan with values changed, all stages alike but where only the first is meant."""
    plain = plan.model_dump(mode="json")
    stages = [{**stage, **change.get("stage", {})} for stage in plain["stages"]]
    if "first" in change:
        stages[0] |= change["first"]
    for name, value in change.items():
        if isinstance(value, dict) and name in plain:
            plain[name] |= {k: {**plain[name][k], **v} if isinstance(v, dict) else v for k, v in value.items()}
        elif name in plain:
            plain[name] = value
    return type(plan).model_validate({**plain, "stages": change.get("stages", stages)})


def test_every_contradiction_of_a_plan_is_told(made):
    run = made("refit")
    refuse_misfit(run.plan, run.facts)
    assert len(CONTRADICTIONS) == len(PLAN_FAULTS)
    for row, (told, change) in zip(PLAN_FAULTS, CONTRADICTIONS.items(), strict=True):
        plan = changed(run.plan, change)
        assert row.is_so(plan, run.facts), told
        with pytest.raises(RecipeError, match=told):
            refuse_misfit(plan, run.facts)
