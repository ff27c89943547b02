"""The command line: what it prints, where, and with which exit code."""

import gc
import json
import os
import shutil
import subprocess
import sys

import pytest

from finetune.cli import main


def finetune(*words, cwd=None, **env):
    return subprocess.run(
        [sys.executable, "-m", "finetune", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env={**os.environ, **{key: str(value) for key, value in env.items()}},
    )


def test_the_version_and_the_lists_answer(tmp_path):
    assert finetune("--version").stdout.startswith("finetune 0.")
    recipes = json.loads(finetune("recipes", "list", "--json").stdout)["recipes"]
    assert len(recipes) >= 6
    cards = json.loads(finetune("zoo", "list", "--json").stdout)["cards"]
    assert "tiny_resnet18.cifar10" in [card["name"] for card in cards]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "train.epoch=3"], "Nearest: train.epochs"),
        (["train", "/nowhere"], "neither a file, a folder, nor a shipped recipe"),
        (["train", "quick"], "no images are named"),
        (["train", "quick", "probe"], "one recipe or folder at a time"),
        (["resume", "/nowhere"], "is no folder. Runs are kept under"),
        (["zoo", "show", "tiny_resnet18.cifar"], "Nearest: tiny_resnet18.cifar10"),
        (["zoo", "rank", "--among", "tiny_resnet18.cifar1"], "Nearest: tiny_resnet18.cifar10"),
        (["zoo", "add", "tiny_resnet18.cifar1", "--statistics", "/nowhere"], "Nearest: tiny_resnet18.cifar10"),
        (["recipes", "show", "quik"], "Nearest: quick"),
        (["evaluate", "/nowhere", "--views", "nine"], "may be center, flip, five, ten"),
        (["evaluate", "/nowhere"], "is no folder"),
    ],
)
def test_what_the_user_can_mend_is_one_paragraph_and_code_2(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune", *words])
    monkeypatch.setattr(gc, "set_threshold", lambda number: None)
    monkeypatch.setattr(os, "environ", {**os.environ})
    with pytest.raises(SystemExit) as leave:
        main()
    said = capsys.readouterr()
    assert leave.value.code == 2
    assert message in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_a_process_that_is_given_a_wrong_verb_leaves_with_code_2_too():
    done = finetune("trian")
    assert done.returncode == 2 and "No such command 'trian'" in done.stderr and done.stdout == ""


def test_a_check_that_finds_something_is_code_1(tmp_path):
    (tmp_path / "wrong.yaml").write_text("sed: 3\n")
    done = finetune("recipes", "check", tmp_path / "wrong.yaml", "--json")
    assert done.returncode == 1
    assert "Nearest: seed" in json.loads(done.stdout)["faults"][str(tmp_path / "wrong.yaml")]
    assert finetune("recipes", "check").returncode == 0


def test_a_recipe_is_copied_once(tmp_path):
    assert finetune("recipes", "copy", "quick", cwd=tmp_path).returncode == 0
    assert (tmp_path / "quick.yaml").read_text() == finetune("recipes", "show", "quick").stdout.rstrip() + "\n"
    assert "is there already" in finetune("recipes", "copy", "quick", cwd=tmp_path).stderr


@pytest.mark.technique("T001")
def test_a_card_is_added_verified_and_found_damaged(tmp_path):
    from finetune.config.backbone_names import shipped

    source = shutil.copytree(shipped("zoo") / "tiny_resnet18.cifar10", tmp_path / "mine")
    card = (source / "card.yaml").read_text().replace("name: tiny_resnet18.cifar10", "name: mine")
    (source / "card.yaml").write_text(card)
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    assert finetune("zoo", "add", source, FINETUNE_ZOO=zoo).returncode == 0
    assert finetune("zoo", "verify", FINETUNE_ZOO=zoo).returncode == 0
    weights = zoo / "mine" / "weights.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    done = finetune("zoo", "verify", FINETUNE_ZOO=zoo)
    assert done.returncode == 1
    assert "mine: " in done.stdout
    assert "copy the file again" in done.stdout


@pytest.mark.slow
def test_a_training_speaks_json_on_one_stream_and_prose_on_the_other(shapes, tmp_path):
    done = finetune(
        "train",
        "--json",
        f"data.root={shapes}",
        "data.image_size=32",
        "train.strategy=probe",
        "tracking.enabled=false",
        FINETUNE_RUNS=tmp_path / "runs",
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer["scores"]["test"]["top1"]) == {"value", "low", "high", "n"}
    assert answer["plan"]["train"]["strategy"] == "probe"
    assert "Facts" in done.stderr
    assert "Plan" in done.stderr
    predicted = finetune("predict", answer["run"], shapes / "disc" / "00.png", "--json")
    assert json.loads(predicted.stdout)["predictions"][0]["label"] in ("disc", "square", "stripes")
