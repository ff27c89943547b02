"""Judging on other images: the same scores for the same images, names to the letter, and a run left as it is."""

import hashlib
import shutil

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import v2

import finetune as ft
from finetune.config.card import read_card
from finetune.config.other_data import FittedTemperature
from finetune.config.scores import Temperature
from finetune.data.loading import ImageStore
from finetune.data.sources import open_source
from finetune.errors import BackboneError, DataError, RecipeError, RunError
from finetune.evaluation.other_data import evaluate_backbone, evaluate_elsewhere, source_view_logits
from finetune.inference.tta import view_names
from finetune.models.backbones import load_backbone
from finetune.runs.folder import RunFolder

SIZE = 48
NAMES = ("disc, circle", "square", "stripes, bars", "ring", "5", "crane, bird", "crane, machine")


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """A real run, for the tests that only look."""
    wishes = [f"data.root={shapes}", "data.image_size=32", "train.batch_size=16", "train.epochs=1"]
    wishes += ["tracking.enabled=false", "data.split.refit=false", "train.strategy=full"]
    return ft.train(ft.load_recipe(None, wishes), runs=tmp_path_factory.mktemp("runs"), say=lambda text: None)


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A zoo with one card: a network with random weights and seven named outputs that differ."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    with torch.no_grad():
        model.get_classifier().weight.mul_(20)
    folder = tmp_path / "zoo" / "tiny"
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "weights.safetensors")
    fields = {
        "name": "tiny", "arch": "test_resnet", "num_classes": 7, "classes": "classes.txt", "mean": [0.5, 0.4, 0.3],
        "input_size": [3, SIZE, SIZE], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "crop_pct": 0.8,
        "sha256": hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest(),
    }  # fmt: skip
    (folder / "card.yaml").write_text(yaml.safe_dump(fields))
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    monkeypatch.setenv("FINETUNE_ZOO", str(tmp_path / "zoo"))
    return folder


def _digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def _test_part(run, shapes, folder):
    """The run's own test images, copied elsewhere."""
    import numpy as np

    with np.load(run.file("predictions.npz")) as stored:
        for name in stored["test_names"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(shapes / name, folder / name)
    return folder


def test_the_runs_own_test_images_get_the_scores_they_had(finished, shapes, tmp_path):
    found = evaluate_elsewhere(finished, _test_part(finished, shapes, tmp_path / "again"))
    known = finished.scores.test
    assert found.scores.top1 == known.top1 == found.own_test
    assert found.scores.confusion == known.confusion
    assert found.scores.log_loss.value == pytest.approx(known.log_loss.value, abs=1e-5)
    assert found.missing_classes == () and found.bad_images == () and found.role == "all"
    assert found.seen.n == found.n == known.n and "flatter" in found.seen.note


def test_nothing_in_the_run_folder_changes(finished, shapes):
    before = _digests(finished.path)
    evaluate_elsewhere(finished, shapes, views="five")
    assert _digests(finished.path) == before and len(before) > 8


def test_columns_follow_names_where_classes_are_missing(finished, shapes, tmp_path):
    folder = tmp_path / "two"
    for name in ("square", "stripes"):
        shutil.copytree(shapes / name, folder / name)
    found = evaluate_elsewhere(finished, folder)
    assert found.missing_classes == ("disc",) and found.n == 48
    assert [sum(row) for row in found.scores.confusion] == [0, 24, 24]  # rows are the truth, in the run's order
    whole = evaluate_elsewhere(finished, shapes).scores.confusion
    assert found.scores.confusion[1:] == whole[1:]


def test_unknown_classes_are_all_named_with_the_nearest(finished, shapes, tmp_path):
    folder = tmp_path / "wrong"
    for old, new in (("disc", "Disc"), ("square", "square"), ("stripes", "strips")):
        shutil.copytree(shapes / old, folder / new)
    with pytest.raises(
        DataError, match=r"2 of 3 classes .*'Disc' is none\. Nearest: disc.*'strips' .*Nearest: stripes"
    ):
        evaluate_elsewhere(finished, folder)


def test_what_a_run_was_fitted_on_is_told(finished, shapes):
    told = evaluate_elsewhere(finished, shapes).fitted_on
    assert told.weights == "train" and told.root == str(shapes)
    assert told.split_digest == finished.plan.split_digest
    assert told.chosen_by_val and not any("test" in flag for flag in told.chosen_by_val)
    assert told.temperature is None  # seven calibration images are too few for one


def test_the_temperature_of_the_run_is_used_and_its_images_are_counted(finished, shapes, tmp_path):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(finished.path, run.path)
    plan = finished.plan
    hot = plan.evaluate.model_copy(update={"calibrate": True})
    run.write_text("plan.yaml", plan.model_copy(update={"evaluate": hot}).to_yaml())
    hot = Temperature(value=1e4, n=120, log_loss_before=1, log_loss_after=1, ece_before=0, ece_after=0)
    run.write_json("scores.json", run.scores.model_copy(update={"temperature": hot}).model_dump(mode="json"))
    found = evaluate_elsewhere(run, shapes)
    assert found.fitted_on.temperature == FittedTemperature(role="calibration", value=1e4, n=120)
    assert found.scores.log_loss.value == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-2)
    assert found.scores.top1 == evaluate_elsewhere(finished, shapes).scores.top1


def test_images_of_another_make_are_not_taken_for_seen_ones(finished, shapes, tmp_path):
    for name in ("disc", "square"):
        (tmp_path / "new" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red" if name == "disc" else "blue").save(tmp_path / "new" / name / "a.png")
    shutil.copy(shapes / "disc" / "00.png", tmp_path / "new" / "disc" / "renamed.png")
    found = evaluate_elsewhere(finished, tmp_path / "new")
    assert found.seen.n == 1 and found.n == 3


def test_only_the_test_part_is_judged_where_there_is_one_and_broken_images_are_named(finished, shapes, tmp_path):
    for role, last in (("train", 4), ("test", 6)):
        for name in ("disc", "square", "stripes"):
            (tmp_path / "parts" / role / name).mkdir(parents=True)
            for number in range(last):
                shutil.copy(shapes / name / f"{number:02}.png", tmp_path / "parts" / role / name)
    (tmp_path / "parts" / "test" / "disc" / "00.png").write_bytes(b"nothing")
    found = evaluate_elsewhere(finished, tmp_path / "parts")
    assert found.role == "test" and found.n == 17
    assert [bad.name for bad in found.bad_images] == ["test/disc/00.png"]


def test_mirrored_views_are_used_only_where_the_run_allows_them(finished, shapes):
    found = evaluate_elsewhere(finished, shapes, views="ten")
    assert found.views == "five" and "hflip" in found.views_note


def test_a_run_that_is_not_finished_is_refused(finished, shapes, tmp_path):
    run = RunFolder(tmp_path / "half")
    shutil.copytree(finished.path, run.path)
    run.final_weights().unlink()
    with pytest.raises(RunError, match="not trained to its end"):
        evaluate_elsewhere(run, shapes)


def _plain_crops(card, files):
    """What plain timm and torchvision say of each crop, (10, N, C): the published way to test with ten crops."""
    plain = timm.create_model(card.arch, num_classes=card.num_classes, **card.arch_kwargs).eval()
    plain.load_state_dict(load_file(card.weights))
    shorter, size = int(card.input_size[1] / card.crop_pct), card.input_size[1]
    kinds = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}
    cut = v2.Compose([v2.Resize(shorter, kinds[card.interpolation]), v2.TenCrop(size)])
    ready = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(card.mean, card.std)])
    rows = []
    with torch.inference_mode():
        for file in files:
            crops = torch.stack([ready(crop) for crop in cut(Image.open(file).convert("RGB"))])
            rows.append(plain(crops))
    return torch.stack(rows, dim=1)


def _check_ten_crops(folder, card, *, spread):
    source = open_source(folder)
    rows = [0, len(source.items) // 2, len(source.items) - 1]
    backbone = load_backbone(card.name, zoo={card.name: card}).eval()
    store = ImageStore(source.items, card.view(), limit_bytes=0)
    found = source_view_logits(backbone, store, rows, views="ten")
    expected = _plain_crops(card, [source.items[index].file for index in rows])
    assert float(expected.std(dim=0).mean()) > spread  # crops differ, so their order counts
    for number, name in enumerate(view_names("ten")):
        assert torch.equal(found[number], expected[number]), f"{name}: {(found - expected)[number].abs().max()}"
    for views, places in (("five", range(5)), ("center", [4])):  # another batch: the same but for rounding
        fewer = source_view_logits(backbone, store, rows, views=views)
        torch.testing.assert_close(fewer, expected[places], rtol=0, atol=1e-5)
    assert torch.equal(source_view_logits(backbone, store, rows[1:2], views="ten"), found[:, 1:2])


@pytest.mark.technique("T152")
def test_ten_crops_give_the_logits_of_plain_timm_and_torchvision_crop_by_crop(zoo, shapes):
    _check_ten_crops(shapes, read_card(zoo / "card.yaml"), spread=1e-3)


@pytest.mark.technique("T152")
@pytest.mark.shared
def test_ten_crops_of_photographs_give_the_logits_of_the_plain_snippet(shared):
    card = read_card(shared / "zoo" / "mobilenetv2_100.imagenet_keras" / "card.yaml")
    _check_ten_crops(shared / "data" / "ants_bees" / "test", card, spread=0.1)


@pytest.mark.shared
def test_a_shared_backbone_knows_ants_and_bees_by_its_own_names(shared, monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_ZOO", str(shared / "zoo"))
    folder = tmp_path / "insects"
    for old, new in (("ants", "ant"), ("bees", "bee")):
        folder.mkdir(exist_ok=True)
        (folder / new).symlink_to(shared / "data" / "ants_bees" / "test" / old)
    found = evaluate_backbone("mobilenetv2_100.imagenet_keras", folder)
    assert found.classes["ant"].startswith("ant, ") and found.num_source_classes == 1000
    assert found.scores.top1.low > 0.5  # among a thousand


@pytest.mark.technique("T154")
def test_the_average_over_views_is_that_of_probabilities(zoo, shapes, tmp_path):
    folder = tmp_path / "numbers"
    for number, name in enumerate(("disc", "square", "stripes")):
        shutil.copytree(shapes / name, folder / str(number))
    card = read_card(zoo / "card.yaml")
    expected = _plain_crops(card, [item.file for item in open_source(folder).items]).softmax(2).mean(0)
    labels = torch.arange(3).repeat_interleave(24)
    found = evaluate_backbone("tiny", folder, views="ten")
    assert found.scores.top1.value == pytest.approx(float((expected.argmax(1) == labels).double().mean()))
    loss = float(-expected.gather(1, labels[:, None]).log().mean())
    assert found.scores.log_loss.value == pytest.approx(loss, abs=1e-5)


def test_folders_find_their_output_by_name_by_one_of_its_names_or_by_number(zoo, shapes, tmp_path):
    folder = tmp_path / "mixed"
    for old, new in (("disc", "disc, circle"), ("square", "bars"), ("stripes", "6")):
        shutil.copytree(shapes / old, folder / new)
    (folder / "5").mkdir()
    shutil.copy(shapes / "disc" / "00.png", folder / "5")
    found = evaluate_backbone("tiny", folder)
    expected = {"disc, circle": "disc, circle", "bars": "stripes, bars", "6": "crane, machine", "5": "5"}
    assert found.classes == expected  # "5" is the name of output 4
    assert {row.name: row.n for row in found.scores.per_class} == {
        "disc, circle": 24, "stripes, bars": 24, "5": 1, "crane, machine": 24,
    }  # fmt: skip
    assert found.missing_classes == ("square", "ring", "crane, bird")
    assert found.fitted_on.chosen_by_val == () and found.scores.confusion is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("crane", r"name of outputs 5, 6; name the folder by the number"),
        ("Square", r"'Square' is none\. Nearest: square"),
        ("7", r"1 of 2 classes are no classes of the source classifier of tiny"),
    ],
)
def test_a_folder_without_an_output_is_refused(zoo, shapes, tmp_path, name, said):
    for new in ("ring", name):
        shutil.copytree(shapes / "disc", tmp_path / "data" / new)
    with pytest.raises(DataError, match=said):
        evaluate_backbone("tiny", tmp_path / "data")


def test_a_backbone_without_a_classifier_and_other_views_are_refused(zoo, shapes, monkeypatch):
    with pytest.raises(RecipeError, match="'dozen' is not for a source classifier; take center, five, ten"):
        evaluate_backbone("tiny", shapes, views="dozen")
    backbone = load_backbone("tiny", zoo={"tiny": read_card(zoo / "card.yaml")}, pretrained=False)
    monkeypatch.setattr("finetune.evaluation.other_data.load_backbone", lambda name, zoo: backbone)
    with pytest.raises(BackboneError, match="no source classifier"):
        evaluate_backbone("tiny", shapes)
