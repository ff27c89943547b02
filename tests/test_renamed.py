"""Keys and values that had other names: a recipe is told the new one, and the plans of old runs are still read."""

import pytest
import yaml
from made_facts import make_facts

from finetune.config.plan import plan_of
from finetune.config.reading import load_recipe
from finetune.config.recipe import recipe_keys
from finetune.config.renamed import KEYS, VALUES
from finetune.errors import RecipeError
from finetune.planning.planner import make_plan


def laid(key, value):
    inner = value
    for part in reversed(key.split(".")):
        inner = {part: inner}
    return inner


def test_new_names_are_keys_and_old_ones_are_none():
    assert set(KEYS.values()) <= set(recipe_keys())
    assert not set(KEYS) & set(recipe_keys())
    assert set(VALUES) <= set(recipe_keys())


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize(("old", "new"), KEYS.items())
def test_an_old_key_is_refused_with_its_new_name(tmp_path, old, new, is_file):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(laid(old, 1)))
    with pytest.raises(RecipeError, match=rf"{old} is called {new} now"):
        load_recipe(file) if is_file else load_recipe(None, [f"{old}=1"])


@pytest.mark.parametrize(
    ("key", "old", "new"), [(key, old, new) for key, names in VALUES.items() for old, new in names.items()]
)
def test_an_old_value_is_refused_with_its_new_name(key, old, new):
    with pytest.raises(RecipeError, match=rf"{key}: {old} is called {new} now"):
        load_recipe(None, [f"{key}={old}"])
    load_recipe(None, [f"{key}={new}"])


@pytest.mark.parametrize("strategy", ["norm_only", "bitfit"])
def test_a_plan_with_old_names_is_read(strategy):
    wishes = ["data.root=photos", f"train.strategy={strategy}", "train.schedule.name=cosine_restarts"]
    wishes += ["train.imbalance.kind=logit_adjustment", "train.divergence_threshold=4", "train.checkpoint=last"]
    plan = make_plan(load_recipe(None, wishes), make_facts())
    text = plan.model_copy(update={"reasons": ()}).to_yaml()
    old = {new: old for names in VALUES.values() for old, new in names.items()}
    old |= {new.rpartition(".")[2] + ":": old.rpartition(".")[2] + ":" for old, new in KEYS.items()}
    for new, before in old.items():
        text = text.replace(new, before)
    found = yaml.safe_load(text)
    assert found["train"]["stop_ratio"] == 4 and found["stages"][0]["schedule"]["name"] == "growing"
    assert plan_of(found) == plan.model_copy(update={"reasons": ()})
