"""`data.splits` reaches every place that opens a recipe's or a run's images."""

from types import SimpleNamespace

import pytest
from PIL import Image

import finetune as ft
from finetune.config.recipe import DataSpec
from finetune.errors import DataError
from finetune.evaluation.other_data import _count_seen
from finetune.evaluation.page_images import stored_images
from finetune.model_selection.ranking import _Images

GIVEN = {"train": ("Lager A",), "test": ("Lager B",)}


@pytest.fixture
def folds(tmp_path):
    """Two folders of the same two classes, under names that no vocabulary knows."""
    for shade, name in enumerate(f"{f}/{c}/{i}" for f in ("Lager A", "Lager B") for c in "ab" for i in range(6)):
        file = tmp_path / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (shade * 9, 90, 200 - shade)).save(file)
    return tmp_path


def wish(root, *more):
    return ft.load_recipe(None, [f"data.root={root}", "train.strategy=probe", *more])


def test_the_survey_divides_as_the_recipe_says_and_the_plan_tells_it(folds):
    recipe = wish(folds, "data.splits={train: Lager A, test: Lager B}")
    facts = ft.survey(recipe)
    assert facts.classes == ("a", "b") and facts.counts["test"] == (6, 6)
    plan = ft.make_plan(recipe, facts)
    assert [(r.value, r.why) for r in plan.reasons if r.key == "data.splits"] == [
        ("train: Lager A; test: Lager B", "the recipe says so")
    ]
    assert plan.data.splits == GIVEN


def test_nothing_is_a_split_where_the_recipe_says_so(folds):
    with pytest.raises(DataError, match="look like splits"):
        _Images(wish(folds))
    assert _Images(wish(folds, "data.splits={}")).dataset.classes == ("Lager A", "Lager B")


def test_the_ranking_and_the_images_of_a_run_are_opened_alike(folds):
    assert _Images(wish(folds, "data.splits={train: Lager A, test: Lager B}")).dataset.classes == ("a", "b")
    data = DataSpec(root=str(folds), splits=GIVEN)
    read = stored_images(SimpleNamespace(plan=SimpleNamespace(data=data)))
    assert read is not None and read("Lager A/a/0.png") == (folds / "Lager A/a/0.png").read_bytes()
    nothing = SimpleNamespace(items=[], files=())
    assert _count_seen(SimpleNamespace(data=data), nothing, []).n == 0
