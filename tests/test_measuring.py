"""Measuring: kept until anything it depends on changes, blind to file names, and careful about mirror images."""

import shutil

import numpy as np
import pytest
import torch
from conftest import draw_shapes
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save_file

import finetune as ft
from finetune.config.backbone_names import cache_folder
from finetune.features import flip_test, measuring, survey
from finetune.features.survey import look

SMALL = ["data.image_size=32", "tracking.enabled=false", "data.split.refit=false"]
PROBE, FULL = "train.strategy=probe", "train.strategy=full"
COMPUTING = (
    "cross_validate", "fit_probe", "knn_predict", "look_at_all", "measure_chirality", "measure_control",
    "measure_curve", "measure_profile", "measure_response", "measure_shift", "sweep_probe",
)  # fmt: skip


def facts_of(folder, *wishes):
    return ft.survey(ft.load_recipe(str(folder), [*SMALL, *wishes]))


def found_in(facts):
    """What was measured, but for what a clock says."""
    return {
        name: getattr(facts, name) for name in ("probe", "knn", "learning_curve", "profile", "similarity", "chirality")
    }


def stored():
    return sorted((cache_folder() / "findings").glob("*.safetensors"))


@pytest.fixture
def few(tmp_path):
    """Ten images of each of three classes, of its own for every test: some change them."""
    return draw_shapes(tmp_path / "few", per_class=10)


@pytest.fixture
def untimed(monkeypatch):
    """No training steps are timed: seconds that these tests do not look at."""
    monkeypatch.setattr(measuring, "time_training", lambda *args, **kwargs: (0.0, ()))


def forbid(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("this was measured before")

    for name in COMPUTING:
        monkeypatch.setattr(measuring, name, refuse)


def test_a_second_look_measures_nothing(few, monkeypatch):
    first = look(ft.load_recipe(str(few), SMALL))
    assert all(value is not None for value in found_in(first.facts).values())
    assert len(stored()) == 1
    with monkeypatch.context() as patch:
        forbid(patch)
        again = look(ft.load_recipe(str(few), SMALL))
        with pytest.raises(AssertionError, match="this was measured before"):
            look(ft.load_recipe(str(few), [*SMALL, "seed=1"]))
    assert found_in(again.facts) == found_in(first.facts)
    assert again.facts.timing == first.facts.timing
    assert torch.equal(again.probe.weight, first.probe.weight)
    assert again.probe.weight.dtype == torch.float64
    assert torch.equal(again.probe.bias, first.probe.bias)
    for name in ("l2", "objective", "gradient_norm", "iterations"):
        assert getattr(again.probe, name) == getattr(first.probe, name)


@pytest.mark.usefixtures("untimed")
@pytest.mark.slow
def test_whatever_the_findings_depend_on_gives_findings_of_their_own(few, monkeypatch):
    facts_of(few, PROBE)
    assert len(stored()) == 1
    for number, wish in enumerate(
        ("seed=1", "data.image_size=40", "data.split.val=0.4", FULL, "train.strategy=null"), 2
    ):
        facts_of(few, PROBE, wish)
        assert len(stored()) == number, wish
    facts_of(few, PROBE)
    assert len(stored()) == 6  # and what is as before is found
    shutil.move(few / "disc" / "03.png", few / "square" / "03b.png")  # one image is now called a square
    facts_of(few, PROBE)
    assert len(stored()) == 7
    plain = survey.load_backbone

    def load_other(name, **options):
        backbone = plain(name, **options)
        with torch.no_grad():
            next(backbone.parameters()).mul_(1.01)
        return backbone

    monkeypatch.setattr(survey, "load_backbone", load_other)
    facts_of(few, PROBE)
    assert len(stored()) == 8


def test_another_seed_is_measured_anew_even_where_every_role_is_given(few, tmp_path):
    """The folds of cross-validation follow the seed, whatever the split."""
    for path in few.glob("*/*.png"):
        role = ("train", "train", "train", "val", "test")[int(path.stem) % 5]
        target = tmp_path / "given" / role / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    given = [PROBE, "data.split.calibration=0"]
    one, other = (facts_of(tmp_path / "given", *given, f"seed={seed}") for seed in (0, 1))
    assert one.split_digest == other.split_digest
    assert len(stored()) == 2


def cut(data):
    return data[: len(data) // 2]


@pytest.mark.parametrize("damage", [cut, lambda data: b"", lambda data: b"\xff" * 400], ids=["cut", "empty", "noise"])
def test_damaged_findings_are_measured_again(few, damage):
    first = facts_of(few, PROBE)
    (path,) = stored()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert found_in(facts_of(few, PROBE)) == found_in(first)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "metadata", [None, {"other": "x"}, {"findings": "{"}, {"findings": '{"unheard": 1}'}],
    ids=["none", "other", "cut", "of another version"],
)  # fmt: skip
def test_findings_that_cannot_be_understood_are_measured_again(few, metadata):
    first = facts_of(few, PROBE)
    (path,) = stored()
    save_file(load_file(path), path, metadata=metadata)
    assert found_in(facts_of(few, PROBE)) == found_in(first)


@pytest.mark.parametrize(("surplus", "chosen_by"), [(0, "val"), (1, "cross-validation")])
@pytest.mark.usefixtures("untimed")
def test_where_val_is_small_cross_validation_chooses_and_judges(few, monkeypatch, surplus, chosen_by):
    num_val = 3 * 3  # a quarter of ten, rounded up, of each class
    monkeypatch.setattr(measuring, "LEAST_VAL", num_val + surplus)
    facts = facts_of(few, "data.split.val=0.25")
    assert facts.probe.val.n == num_val
    assert facts.probe.chosen_by == facts.profile.judged == chosen_by
    judges = num_val if chosen_by == "val" else sum(facts.counts["train"])
    assert {row.probe.n for row in facts.profile.depths} == {judges}
    assert {row.ridge.n for row in facts.profile.depths} == {sum(facts.counts["train"])}


def test_what_no_choice_needs_is_not_measured(few, monkeypatch):
    for name in ("measure_profile", "measure_control", "measure_chirality", "look_at_all", "measure_shift"):
        monkeypatch.setattr(measuring, name, None)  # to call it would fail
    facts = facts_of(few, PROBE)
    assert facts.probe is not None
    assert facts.knn is not None
    assert facts.profile is None
    assert facts.chirality is None
    assert facts.similarity is None or (facts.similarity.control is None and facts.similarity.shift == ())


def test_a_probe_that_cannot_see_all_images_sees_some_of_each_class_and_the_facts_say_so(few, monkeypatch):
    whole = facts_of(few, PROBE)
    monkeypatch.setattr(measuring, "PROBE_BYTES", 4 * 128 * 12)  # of 128 features
    monkeypatch.setattr(survey, "PROBE_BYTES", 4 * 128 * 12)
    seen = look(ft.load_recipe(str(few), [*SMALL, PROBE]))
    facts = seen.facts
    num_train = sum(facts.counts["train"])
    assert whole.probe.train.n == num_train > 12 == facts.probe.train.n
    assert seen.probe.weight.abs().sum(1).min() > 0  # no class was forgotten
    (told,) = set(facts.warnings) - set(whole.warnings)
    assert told.startswith(f"the probe was solved on 12 of {num_train} training images, drawn class by class")


def test_a_named_strategy_is_told_the_similarity_too(few, monkeypatch):
    advised = facts_of(few).similarity
    for name in ("measure_profile", "measure_control"):
        monkeypatch.setattr(measuring, name, None)
    named = facts_of(few, FULL).similarity
    assert (named.value, named.low, named.high) == (advised.value, advised.low, advised.high)
    assert named.shift == advised.shift
    assert named.control is None


@pytest.mark.parametrize("most", [12, 1000], ids=["of samples", "of all"])
@pytest.mark.usefixtures("untimed")
@pytest.mark.slow
def test_neither_names_nor_order_of_files_matter(tmp_path, monkeypatch, most):
    """Classes that cannot be told apart, so that any other sample or fold would be another number."""
    for name in ("PROFILE_IMAGES", "CONTROL_IMAGES", "SHIFT_IMAGES", "MIRROR_IMAGES", "RESPONSE_IMAGES"):
        monkeypatch.setattr(measuring, name, most)
    monkeypatch.setattr(flip_test, "LEAST_IMAGES", 10)
    random = np.random.default_rng(0)
    for name in ("one", "other"):
        for turn in ("plain", "turned"):
            (tmp_path / turn / name).mkdir(parents=True)
        for number in range(25):
            image = Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((32, 32))
            image.save(tmp_path / "plain" / name / f"{number:02}.png")
            image.save(tmp_path / "turned" / name / f"{99 - number}.png")  # the last comes first
    found = []
    for turn in ("plain", "turned"):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / f"cache of {turn}"))
        found.append(found_in(facts_of(tmp_path / turn)))
        assert len(stored()) == 1
    first, second = found
    assert first["probe"].chosen_by == "cross-validation"
    assert first["chirality"].share is not None
    for name, value in first.items():
        assert_same(value.model_dump(), second[name].model_dump(), name)


def assert_same(one, other, where):
    """The same to six digits: sums in another order round differently."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}.{number}")
    else:
        assert one == (pytest.approx(other, rel=1e-5, abs=1e-6) if isinstance(one, float) else other), where


def draw_arrows(folder, per_class, names):
    """Arrows to the right under the first name, to the left under the second: each other's mirror images."""
    random = np.random.default_rng(0)
    for turn, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            image = Image.fromarray(random.integers(0, 90, (40, 40, 3), dtype=np.uint8))
            brush, colour = ImageDraw.Draw(image), tuple(int(v) for v in random.integers(120, 255, 3))
            x, y, length = (int(v) for v in (random.integers(6, 12), random.integers(12, 28), random.integers(14, 20)))
            brush.line((x, y, x + length, y), fill=colour, width=3)
            brush.polygon((x + length, y - 8, x + length, y + 8, x + length + 8, y), fill=colour)
            (ImageOps.mirror(image) if turn else image).save(folder / name / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def arrows(tmp_path_factory):
    return draw_arrows(tmp_path_factory.mktemp("arrows") / "twins", 100, ("a", "b"))


@pytest.mark.technique("T147")
def test_classes_that_are_each_others_mirror_image_are_never_called_safe(arrows):
    found = facts_of(arrows, FULL).chirality
    assert found.sided == ()  # their names say nothing
    assert found.share.low < 0.5 < found.share.high  # and together they are symmetric
    assert found.lost.low > 0.5  # but the probe takes one for the other
    assert found.is_safe is False


@pytest.mark.technique("T147")
def test_classes_named_as_mirror_images_are_unsafe_whatever_the_images_show(tmp_path):
    both = mirror_half(draw_shapes(tmp_path / "shapes", per_class=12), tmp_path / "both")
    (both / "disc").rename(both / "left_x")
    (both / "square").rename(both / "right_x")
    found = facts_of(both, FULL).chirality
    assert found.sided == (("left_x", "right_x"),)
    assert found.is_safe is False


@pytest.mark.technique("T147")
def test_new_names_for_the_same_images_are_read(few):
    assert facts_of(few, FULL).chirality.sided == ()
    (few / "disc").rename(few / "left_x")  # the order of the classes, and so every label, stays
    (few / "square").rename(few / "right_x")
    found = facts_of(few, FULL).chirality
    assert found.sided == (("left_x", "right_x"),)
    assert found.is_safe is False


def mirror_half(folder, target):
    """The images of `folder`, every other one mirrored."""
    for number, path in enumerate(sorted(folder.glob("*/*.png"))):
        (target / path.parent.name).mkdir(parents=True, exist_ok=True)
        image = Image.open(path)
        (ImageOps.mirror(image) if number % 2 else image).save(target / path.parent.name / path.name)
    return target


@pytest.mark.slow
@pytest.mark.technique("T147")
def test_shapes_without_a_side_are_called_safe_where_val_is_large_enough_to_say_so(tmp_path):
    """With fewer than 35 val images the cost of mirroring cannot be bounded by a tenth, even if it is none."""
    drawn = draw_shapes(tmp_path / "shapes", per_class=80)
    both = mirror_half(drawn, tmp_path / "both")
    many = facts_of(both, FULL, "data.split.val=0.4", "data.split.test=0.05").chirality
    assert many.share.n >= 100
    assert many.lost.n >= 90
    assert many.is_safe is True
    few = facts_of(both, FULL, "data.split.val=0.1").chirality
    assert few.lost.n < 35
    assert few.lost.high > 0.1
    assert few.is_safe is None
    sided = facts_of(drawn, FULL).chirality  # drawn more to the left than to the right
    assert sided.share.low > 0.6
    assert sided.is_safe is False
