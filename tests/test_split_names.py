"""The words of the field for splits; what they mean is decided once, for folders, tables and shards."""

import pytest

import finetune as ft
from finetune.data.split_names import role_of
from finetune.errors import RecipeError


@pytest.mark.parametrize(
    ("role", "words"),
    [
        ("train", "train TRAIN Training training_set trn train_images TrainData train-split trainset train2017"),
        ("val", "val valid Validation validation_data val_imgs dev devel VAL2017 valset img_val"),
        ("test", "test Testing tst test_set test-images TestData test1 testset eval holdout hold_out held-out"),
        ("calibration", "calibration calib CALIBRATION_SET"),
    ],
)
def test_the_words_of_the_field_mean_their_role(role, words):
    assert {word: role_of(word) for word in words.split()} == dict.fromkeys(words.split(), role)


@pytest.mark.parametrize(
    "word", ["trail", "test_tube", "bullet train", "daisy", "data", "images", "2017", "", "train_val", "tests", "été"]
)
def test_other_words_mean_none(word):
    assert role_of(word) is None


def test_given_names_are_the_only_ones():
    splits = {"train": ("Lager A",), "test": ("0", "images/test/")}
    words = ["lager a", "0", "images/test", "train", "test"]
    assert [role_of(word, splits) for word in words] == ["train", "test", "test", None, None]
    assert role_of("train", {}) is None


def test_the_recipe_takes_one_name_or_several_and_any_word():
    wish = ft.load_recipe(None, ["data.splits={train: [1, 2], test: true}", "data.splits.val=Prüfung"]).data.splits
    assert wish == {"train": ("1", "2"), "test": ("True",), "val": ("Prüfung",)}
    assert ft.load_recipe(None, []).data.splits is None
    assert ft.load_recipe(None, ["data.splits={}"]).data.splits == {}


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("{tset: Testing}", r"'tset' is no role.*Nearest: test"),
        ("{train:Training}", "a blank after the colon"),
        ("Training", "valid dictionary"),
    ],
)
def test_what_is_no_split_is_refused(wish, message):
    with pytest.raises(RecipeError, match=rf"data\.splits.*{message}"):
        ft.load_recipe(None, [f"data.splits={wish}"])
