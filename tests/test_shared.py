"""The main job on the five shared sets with a shared backbone; small budgets, real files."""

import pytest

import finetune as ft


@pytest.mark.shared
@pytest.mark.parametrize("name", ["ants_bees", "flowers5", "sign_digits", "malaria", "cifar10_20k"])
def test_a_shared_set_ends_in_a_scored_and_reported_run(shared, name, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_ZOO", str(shared / "zoo"))
    wishes = ["backbone=mobilenetv2_100.imagenet_keras", "data.image_size=64", "data.max_train_per_class=30"]
    wishes += [f"data.root={shared / 'data' / name}", "train.strategy=full", "train.epochs=1", "tracking.enabled=false"]
    run = ft.train(ft.load_recipe(None, wishes), runs=tmp_path, say=lambda text: None)
    facts, scores = run.read_json("facts.json"), run.read_json("scores.json")
    expected = {"ants_bees": 153, "flowers5": 736, "sign_digits": 500, "malaria": 500, "cifar10_20k": 2000}
    assert scores["test"]["top1"]["n"] == expected[name] == sum(facts["counts"]["test"])
    assert scores["probe"]["test"]["top1"]["low"] > facts["chance"]
    assert run.file("report.html").stat().st_size > 10_000
