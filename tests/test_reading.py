"""Recipes are read strictly: every fault at once, each with its line and the nearest right name."""

import pytest

from finetune.config.backbone_names import list_recipes, recipe_summary
from finetune.config.reading import load_recipe
from finetune.config.recipe import Recipe
from finetune.errors import RecipeError


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_fault_is_named_at_once_with_its_line(tmp_path):
    path = write(
        tmp_path, "name: x\nbackbon: resnet18\ndata: {rot: a, image_size: 5}\ntrain:\n  epochs: many\n  lr: 3\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert "line 2: backbon is no key of a recipe. Nearest: backbone." in text
    assert "line 3: data.image_size" in text
    assert "got 5" in text
    assert "line 3: data.rot is no key" in text
    assert "line 5: train.epochs" in text
    assert "line 6: train.lr is no key of a recipe. It is written train.optimizer.lr." in text


def test_a_key_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"line 3: seed stands here and in .*line 1"):
        load_recipe(write(tmp_path, "seed: 1\nname: x\nseed: 2\n"))


def test_overrides_lie_over_the_file(tmp_path):
    path = write(tmp_path, "data: {root: here, split: {val: 0.2}}\nseed: 4\n")
    recipe = load_recipe(
        path, ["data.split.test=0.3", "seed=5", "data.invariances=[hflip, vflip]", "train.epochs=null"]
    )
    assert (recipe.data.root, recipe.data.split.val, recipe.data.split.test, recipe.seed) == ("here", 0.2, 0.3, 5)
    assert recipe.data.invariances == ("hflip", "vflip")
    assert recipe.train.epochs is None


def test_a_wrong_override_is_quoted():
    with pytest.raises(
        RecipeError, match=r"'train\.epoch=3': train\.epoch is no key of a recipe\. Nearest: train\.epochs"
    ):
        load_recipe(None, ["train.epoch=3"])


def test_a_value_in_place_of_a_section_is_told_what_it_may_mean():
    with pytest.raises(RecipeError, match=r"section of keys and no value, got 'cosine'. .* train.schedule.name=cosine"):
        load_recipe(None, ["train.schedule=cosine"])
    with pytest.raises(RecipeError, match=r"Its keys are data\.columns\.image, .*data\.std\b"):
        load_recipe(None, ["data=3"])


def test_an_unknown_view_is_told_which_there_are():
    with pytest.raises(RecipeError, match=r"'ten,nine' is no view, nor a list of views. Views are center, "):
        load_recipe(None, ["evaluate.views=ten,nine"])
    with pytest.raises(RecipeError, match=r"'whole/288' is no view"):  # it is as large as the image
        load_recipe(None, ["evaluate.views=whole/288"])


def test_a_folder_is_a_recipe_for_itself(tmp_path):
    assert load_recipe(tmp_path) == Recipe.model_validate({"data": {"root": str(tmp_path)}})


def test_a_misspelt_recipe_gets_a_hint():
    with pytest.raises(RecipeError, match=r"neither a file, a folder, nor a shipped recipe\. Nearest: quick"):
        load_recipe("quik")


def test_a_misspelt_folder_gets_its_neighbours(tmp_path):
    (tmp_path / "ants_bees").mkdir()
    (tmp_path / "flowers").mkdir()
    with pytest.raises(RecipeError, match=r"nor a shipped recipe\. Nearest: ants_bees\."):
        load_recipe(str(tmp_path / "ant_bees"))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe(write(tmp_path, text))


def test_broken_yaml_is_named_with_its_line(tmp_path):
    with pytest.raises(RecipeError, match=r"is not YAML(.|\n)*line 2"):
        load_recipe(write(tmp_path, "data: {root: a\nseed: 3\n"))


def test_shares_that_leave_nothing_are_refused():
    with pytest.raises(RecipeError, match=r"val \+ calibration \+ test = 1\.10 leaves nothing to train on"):
        load_recipe(None, ["data.split={val: 0.5, calibration: 0.1, test: 0.5}"])


def test_shipped_recipes_are_right_and_say_what_they_are_for():
    recipes = list_recipes()
    assert {"probe", "small-similar", "small-different", "large-similar", "large-different", "quick"} <= set(recipes)
    for name, path in recipes.items():
        assert load_recipe(name).data.root is None
        assert len(recipe_summary(path)) > 20


def test_every_key_is_documented():
    schema = Recipe.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        for name, key in section["properties"].items():
            assert key.get("description"), name


def test_numbers_are_names_where_names_are_meant():
    recipe = load_recipe(None, ["hardware.precision=32", "name=2024", "data.root=2024"])
    assert (recipe.hardware.precision, recipe.name, recipe.data.root) == ("32", "2024", "2024")


@pytest.mark.parametrize("wish", ["name=2024-13-01", "data.std=[0, 0, 0]", "train.epochs=maybe"])
def test_odd_values_are_the_users_to_mend(wish):
    with pytest.raises(RecipeError):
        load_recipe(None, [wish])


def test_a_file_of_another_encoding_is_named(tmp_path):
    (tmp_path / "r.yaml").write_bytes("name: fl\xf6te\n".encode("latin-1"))
    with pytest.raises(RecipeError, match="is not UTF-8"):
        load_recipe(tmp_path / "r.yaml")
