"""Where a login stands in an address, and that nothing that is written holds it."""

import pytest
import yaml

from finetune.config.addresses import (
    Login,
    hide_logins,
    join_login,
    login_from_environment,
    split_login,
    uri_from_environment,
)
from finetune.config.reading import load_recipe
from finetune.errors import RecipeError


@pytest.mark.parametrize(
    ("given", "bare", "login"),
    [
        ("http://me:secret@host:5000/mlflow", "http://host:5000/mlflow", Login("me", "secret")),
        ("https://me:se%2Fc%40ret@host", "https://host", Login("me", "se/c@ret")),
        ("http://me:se@cret@host", "http://host", Login("me", "se@cret")),
        ("http://me:sec/ret@host/x", "http://host/x", Login("me", "sec/ret")),
        ("https://token@host", "https://host", Login("token", "")),
        ("postgresql://me:secret@host/db", "postgresql://host/db", Login("me", "secret")),
        ("http://host:5000/a@b", "http://host:5000/a@b", None),
        ("http://host/a@b", "http://host/a@b", None),
        ("sqlite:////data/a@b.db", "sqlite:////data/a@b.db", None),
        ("off", "off", None),
    ],
)
def test_a_login_is_split_off_its_address(given, bare, login):
    assert split_login(given) == (bare, login)


def test_a_login_can_be_put_back_into_an_address():
    uri, login = split_login("mysql://m%40e:se%2Fcret@host/db")
    assert join_login(uri, login) == "mysql://m%40e:se%2Fcret@host/db"
    assert "cret" not in repr(login)


def test_a_text_shows_no_login():
    said = hide_logins("no answer from http://me:se@cret@host/api (url: https://a:b/c@host2), ask me@host")
    assert said == "no answer from http://***@host/api (url: https://***@host2), ask me@host"


def test_a_recipe_keeps_the_login_in_memory_and_writes_none():
    recipe = load_recipe(None, ["tracking.uri=http://me:secret@host"])
    assert split_login(recipe.tracking.uri or "")[1] == Login("me", "secret")
    for dumped in (recipe.model_dump(), recipe.model_dump(mode="json"), recipe.model_dump(exclude_unset=True)):
        assert dumped["tracking"]["uri"] == "http://host"
    assert "secret" not in recipe.model_dump_json() + yaml.safe_dump(recipe.model_dump(mode="json"))


def test_a_fault_in_a_recipe_shows_no_login():
    with pytest.raises(RecipeError, match="is a section") as fault:
        load_recipe(None, ["tracking=http://me:secret@host"])
    assert "secret" not in str(fault.value)


def test_the_environment_gives_the_login_of_its_own_server_only(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host/")
    assert login_from_environment("http://host") == Login("me", "secret")
    assert login_from_environment("http://other") is None
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "you")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "word")
    assert login_from_environment("http://other") == Login("you", "word")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("http://me:secret@host:5000", "http://host:5000"),
        ("sqlite:///mlflow.db", "sqlite:///HERE/mlflow.db"),
        ("mlruns", "file://HERE/mlruns"),
        ("databricks", "databricks"),
        ("  ", None),
    ],
)
def test_a_tracking_uri_of_the_environment_holds_from_every_folder(said, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", said)
    assert uri_from_environment() == (meant and meant.replace("HERE", str(tmp_path)))
