"""`data.frame: each`: every frame of a file is an image, and what is cut, counted and answered are still files."""

import io
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune as ft
from finetune.cli import main
from finetune.config.card import View
from finetune.config.recipe import DataSpec
from finetune.data import digests as digesting
from finetune.data import frames
from finetune.data.dataset import Dataset
from finetune.data.decoding import center_crop, decode
from finetune.data.digests import digest_images
from finetune.data.items import Found, Item, Items
from finetune.data.loading import ImageStore
from finetune.data.sources import open_source
from finetune.data.splits import cut_split
from finetune.data.training_range import RangeMeter
from finetune.errors import DataError
from finetune.evaluation.other_data import evaluate_elsewhere
from finetune.evaluation.page_images import stored_images
from finetune.features.survey import look
from finetune.inference.batch_predict import predict_stream
from finetune.inference.ensemble_model import Ensemble
from finetune.inference.loading import load_final
from finetune.inference.tta_views import MixedViewer, Viewer, open_viewer
from finetune.model_selection.ranking import _Images

SMALL = ["data.image_size=32", "train.batch_size=16", "train.epochs=1", "train.strategy=full"]
SMALL += ["tracking.enabled=false", "data.split.refit=false", "data.split.calibration=0"]
PLAIN = View(size_pixels=32, shorter_pixels=32, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
KINDS = (".gif", ".tif", ".png", ".webp")


def quiet(text):
    """Nobody listens."""


def draw(tone, seed, size=36):
    """A noisy image of one tone."""
    noise = np.random.default_rng(seed).integers(-60, 60, (size, size, 3))
    return Image.fromarray((np.array(tone) + noise).clip(0, 255).astype(np.uint8))


def save(file, images, **options):
    """Lossless, so that a frame can be had alone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    options |= {"lossless": True} if file.suffix == ".webp" else {}
    images[0].save(file, save_all=True, append_images=images[1:], **options)
    return file


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """Two classes, each of eight files of four frames in four formats, and two files of one."""
    root, seed = tmp_path_factory.mktemp("moving"), 0
    for name, tone in (("cold", (60, 80, 180)), ("warm", (180, 90, 60))):
        for number in range(8):
            tones = [tuple(value * (6 - frame) // 6 for value in tone) for frame in range(4)]
            images = [draw(shade, seed := seed + 1) for shade in tones]
            save(root / name / f"{number}{KINDS[number % 4]}", images)
        for number in (8, 9):
            draw(tone, seed := seed + 1).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def run(moving, tmp_path_factory):
    """Stopped after its plan and resumed."""
    runs, recipe = tmp_path_factory.mktemp("runs"), ft.load_recipe(None, wishes(moving))

    def say(text):
        if text.startswith("Plan"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ft.train(recipe, runs=runs, say=say)
    (folder,) = runs.iterdir()
    return ft.resume(folder, say=quiet)


def wishes(root, *more):
    return [f"data.root={root}", "data.frame=each", *SMALL, *more]


def opened(root):
    return frames.open_images(DataSpec(root=str(root), frame="each"))


def divided(root, *more):
    """Items, files and roles of the images under `root`."""
    recipe = ft.load_recipe(None, wishes(root, *more))
    dataset = Dataset.open(recipe.data, recipe.seed)
    return dataset.items, list(dataset.files), dataset.divide()


def test_every_frame_is_an_item_with_the_label_of_its_file(moving):
    source = opened(moving)
    assert len(source.items) == 2 * (8 * 4 + 2)
    held = defaultdict(list)
    for item in source.items:
        assert source.classes[item.label] == item.name.partition("/")[0]
        held[item.file.name].append(item.frame)
    assert held["0.gif"] == held["1.tif"] == held["2.png"] == held["3.webp"] == [0, 1, 2, 3] * 2
    assert held["8.png"] == [None, None]
    assert [item.name for item in source.items][:2] == ["cold/0.gif#frame-1", "cold/0.gif#frame-2"]


def test_frames_are_sorted_by_number_and_a_file_of_one_keeps_its_name(tmp_path):
    save(tmp_path / "a" / "stack.tif", [draw((9 * page,) * 3, page) for page in range(11)])
    save(tmp_path / "b" / "lone.tif", [draw((50,) * 3, 1)])
    names = [item.name for item in opened(tmp_path).items]
    assert names == [*(f"a/stack.tif#frame-{number}" for number in range(1, 12)), "b/lone.tif"]


@pytest.mark.parametrize("row", [None, 3])
def test_frames_are_sorted_in_whatever_order_they_are_found(row):
    found = [Found("a.tif" if row is None else f"a#{row}", "x", None, Path("a"), row, frame) for frame in (10, 2, 0)]
    assert [item.frame for item in Items(found)] == [0, 2, 10]


def test_frames_of_a_row_of_a_shard_are_items_too(tmp_path):
    stack, shard = io.BytesIO(), tmp_path / "train.parquet"
    first, *rest = [draw((90 * page,) * 3, page) for page in range(2)]
    first.save(stack, "TIFF", save_all=True, append_images=rest)
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": stack.getvalue(), "path": None}, "label": label} for label in ("a", "b")]
    pq.write_table(pa.Table.from_pylist(rows), shard)
    source = opened(shard)
    assert [(item.row, item.frame) for item in source.items] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    store = ImageStore(source.items, PLAIN, 0)
    assert not np.array_equal(store.get(0), store.get(1))


def test_only_files_that_may_hold_several_frames_are_opened(tmp_path, monkeypatch):
    for name, suffix in (("a", ".jpg"), ("b", ".bmp"), ("c", ".gif")):
        (tmp_path / name).mkdir()
        draw((90,) * 3, 0).save(tmp_path / name / f"0{suffix}")
    read, original = [], frames.read_bytes
    monkeypatch.setattr(frames, "read_bytes", lambda item: read.append(item.name) or original(item))
    assert len(opened(tmp_path).items) == 3
    assert read == ["c/0.gif"]


def test_what_cannot_be_opened_stays_an_item_to_be_named_as_bad(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name / "0.gif", [draw((60 * page,) * 3, page) for page in range(2)])
    (tmp_path / "a" / "broken.gif").write_bytes(b"GIF89a")
    source = opened(tmp_path)
    assert [item.name for item in source.items if item.frame is None] == ["a/broken.gif"]
    assert source.warnings == open_source(tmp_path).warnings


def test_frames_that_cannot_be_counted_are_told(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name / "0.tif", [draw((60 * page,) * 3, page) for page in range(3)])
    whole = (tmp_path / "a" / "0.tif").read_bytes()
    with Image.open(tmp_path / "a" / "0.tif") as image:
        image.seek(2)
        second = image._frame_pos[2]
    (tmp_path / "a" / "0.tif").write_bytes(whole[: second + 1])
    source = opened(tmp_path)
    assert (source.items[0].name, source.items[0].frame) == ("a/0.tif", None)
    assert "the frames of 1 files cannot be counted" in source.warnings[-1] and "a/0.tif" in source.warnings[-1]


@pytest.mark.parametrize("seed", range(6))
def test_frames_of_one_file_and_of_its_copies_are_never_on_two_sides(moving, tmp_path, seed):
    for file in moving.rglob("*.*"):
        for copy in (file.name, f"copy-{file.name}"):
            (tmp_path / file.parent.name).mkdir(exist_ok=True)
            (tmp_path / file.parent.name / copy).write_bytes(file.read_bytes())
    items, _, split = divided(tmp_path, f"seed={seed}", "data.split.calibration=0.1")
    sides = defaultdict(set)
    for item, role in zip(items, split.roles, strict=True):
        sides[item.file.name.removeprefix("copy-"), item.label].add(role)
    assert all(len(found) == 1 for found in sides.values())
    assert set.union(*sides.values()) == {"train", "val", "calibration", "test"}


def test_an_image_of_one_frame_is_divided_as_it_is_without_frames(shapes):
    recipe, source = ft.load_recipe(None, [f"data.root={shapes}"]), open_source(shapes)
    files = digest_images(source.items)
    items, expanded, split = divided(shapes, *(f"data.split.{role}={share}" for role, share in _shares(recipe).items()))
    assert items == source.items and expanded == files == frames.frame_digests(items, files)
    again = cut_split(items.labels, files, [None] * len(files), source.classes, seed=0, **_shares(recipe))
    assert Dataset.open(recipe.data, 0).divide() == again == split


def _shares(recipe):
    return {role: getattr(recipe.data.split, role) for role in ("val", "calibration", "test")}


def test_a_file_in_two_given_splits_is_a_leak_of_all_its_frames(tmp_path):
    for role in ("train", "test"):
        for name, tone in (("a", 60), ("b", 160)):
            seed = tone if name == "a" else tone + len(role)
            save(tmp_path / role / name / "0.gif", [draw((tone + 20 * page,) * 3, seed + page) for page in range(3)])
    assert divided(tmp_path)[2].leaks == 3


def test_a_limit_of_training_images_takes_frames_of_different_files(moving):
    items, _, split = divided(moving, "data.max_train_per_class=4")
    taken = [item.file for item, role in zip(items, split.roles, strict=True) if role == "train"]
    assert len(taken) == 8 and len(set(taken)) > 4


def test_the_split_is_told_apart_by_its_frames(moving):
    _, _, whole = divided(moving)
    recipe = ft.load_recipe(None, [f"data.root={moving}", *SMALL])
    assert Dataset.open(recipe.data, recipe.seed).divide().digest != whole.digest


def test_a_file_is_read_once_for_the_digests_of_its_frames(moving, monkeypatch):
    read, original = [], digesting.read_bytes
    monkeypatch.setattr(digesting, "read_bytes", lambda item: read.append(item.file) or original(item))
    digest_images(opened(moving).items)
    assert len(read) == len(set(read)) == 20


@pytest.mark.parametrize("suffix", KINDS)
def test_a_store_gives_each_frame(moving, suffix):
    items = [item for item in opened(moving).items if item.file.suffix == suffix and item.frame is not None][:4]
    store = ImageStore(items, PLAIN, 0)
    for index, item in enumerate(items):
        assert np.array_equal(store.get(index), alone(item))


def alone(item, shorter=32):
    """Pixels of a frame by Pillow itself."""
    with Image.open(item.file) as image:
        image.seek(item.frame)
        stream = io.BytesIO()
        image.convert("RGB").save(stream, "PNG")
    return decode(stream.getvalue(), shorter_pixels=shorter, interpolation="bilinear")[0]


@pytest.mark.slow
def test_features_are_those_of_each_frame_and_the_facts_say_how_many(moving):
    seen = look(ft.load_recipe(None, wishes(moving)))
    assert seen.facts.several_frames == 16 and seen.facts.frame_images == 64
    assert "16 files hold several frames or pages: 64 images; the frames of one file stay" in seen.facts.frames_text
    rows = seen.features("train")
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert sum(map(sum, seen.facts.counts.values())) == 68


@pytest.mark.slow
def test_who_judges_an_image_that_is_left_out_has_seen_no_other_frame_of_its_file(moving):
    seen = look(ft.load_recipe(None, ["data.frame=each", f"data.root={moving}", "data.image_size=32"]))
    files = {seen.dataset.files[index] for index in seen.dataset.indices("train")}
    assert len(files) < len(seen.dataset.indices("train"))
    facts = seen.facts
    assert facts.probe.left_out.n == facts.knn.left_out.n == facts.profile.num_images == len(files)


@pytest.mark.parametrize("frame", [pytest.param("first", marks=pytest.mark.slow), "each"])
@pytest.mark.slow
def test_files_that_weights_have_seen_are_told_whichever_of_their_frames_are_used(run, moving, frame):
    before = look(ft.load_recipe(None, wishes(moving)))
    used = {before.dataset.files[index] for role in ("train", "val") for index in before.dataset.indices(role)}
    others = [f"data.frame={frame}", f"backbone={run.path}", "seed=1"]
    seen = look(ft.load_recipe(None, [f"data.root={moving}", *SMALL, *others]))
    test = [seen.dataset.files[index] in used for index in seen.dataset.indices("test")]
    assert any(f"{sum(test)} of {len(test)} test images" in line for line in seen.facts.warnings) and sum(test) > 1


def test_backbones_are_ranked_on_one_frame_of_a_file(moving):
    images = _Images(ft.load_recipe(None, wishes(moving)))
    rows = images.draw(1000)
    assert len({images.dataset.files[row] for row in rows}) == len(rows) > 8


@pytest.mark.parametrize("frame", ["first", "middle"])
@pytest.mark.slow
def test_of_files_that_are_one_image_the_facts_say_which_frame(moving, frame):
    seen = look(ft.load_recipe(None, [f"data.root={moving}", *SMALL, f"data.frame={frame}"]))
    assert len(seen.dataset.items) == 20 and seen.facts.frame_images == 0
    assert seen.facts.frames_text == f"16 files hold several frames or pages; the {frame} of each is used"


def test_the_value_range_is_measured_on_every_frame(tmp_path):
    pages = [Image.fromarray(np.full((20, 20), value, np.uint16)) for value in (100, 4000)]
    for name in ("a", "b"):
        save(tmp_path / name / "0.tif", pages)
    items = opened(tmp_path).items
    digests = frames.frame_digests(items, digest_images(items))
    found = RangeMeter(items, digests, "each", 0).measure(range(len(items)), items.labels.tolist())
    assert (found.num_images, found.lowest, found.highest) == (2, 100, 4000)  # the two files are copies


def test_a_run_is_resumed_and_judges_every_frame(run):
    assert run.plan.data.frame == "each"
    assert run.read_json("scores.json")["test"]["n"] == sum(run.read_json("facts.json")["counts"]["test"])
    with np.load(run.file("predictions.npz")) as stored:
        assert sum(name.endswith("#frame-4") for name in stored["test_names"]) == 2
        assert len(np.unique(stored["test_probabilities"], axis=0)) == len(stored["test_names"])
    assert "frames of one file stay together" in next(r.why for r in run.plan.reasons if r.key == "data.frame")


@pytest.mark.parametrize("is_mixed", [False, True])
def test_views_of_other_sizes_are_of_the_frame(moving, run, is_mixed):
    network, view = load_final(run), run.plan.view
    larger = replace(view, shorter_pixels=48)
    classifier = Ensemble([network, network], views=[view, larger]) if is_mixed else network
    viewer = open_viewer(classifier, run.plan, "center@40")
    assert isinstance(viewer, MixedViewer if is_mixed else Viewer)
    items = [item for item in opened(moving).items if item.frame is not None][:4]
    store = ImageStore(items, view, 0)
    for index, item in enumerate(items):
        assert np.array_equal(viewer.read(store, index)[0], center_crop(alone(item, 40), 32))
        assert np.array_equal(viewer.read_file(item)[0][0], viewer.read(store, index)[0])


def test_a_new_file_is_answered_once_with_the_mean_over_its_frames(run, moving, tmp_path):
    files = [moving / "warm" / "1.tif", moving / "cold" / "2.png", moving / "cold" / "8.png"]
    answers = list(predict_stream(run, [*files, *files]))
    assert [answer.name for answer in answers] == [str(file) for file in [*files, *files]]
    assert answers[:3] == answers[3:]
    for file, answer in zip(files[:2], answers, strict=False):
        pages = []
        with Image.open(file) as image:
            for frame in range(4):
                image.seek(frame)
                image.convert("RGB").save(page := tmp_path / f"{file.stem}-{frame}.png")
                pages.append(page)
        rows = [one.probabilities for one in predict_stream(run, pages)]
        assert len({json.dumps(row) for row in rows}) == 4
        for name, share in answer.probabilities.items():
            assert share == pytest.approx(sum(row[name] for row in rows) / 4, abs=2e-6)


def test_a_file_of_more_frames_than_a_batch_is_answered_once(run, tmp_path):
    file = save(tmp_path / "long.tif", [draw((90,) * 3, page, size=8) for page in range(70)])
    (answer,) = predict_stream(run, [file])
    assert answer.label in run.plan.classes and answer.note is None


def test_a_frame_that_cannot_be_read_is_noted_and_the_others_answer(run, moving, tmp_path):
    whole = (moving / "warm" / "0.gif").read_bytes()
    (tmp_path / "half.gif").write_bytes(whole[: len(whole) - 1500])
    (answer,) = predict_stream(run, [tmp_path / "half.gif"])
    assert answer.fault is None and "1 of 4 frames: cannot be read (" in answer.note


def test_a_run_of_first_frames_answers_from_the_first(shapes, moving, tmp_path):
    recipe = ft.load_recipe(None, [f"data.root={moving}", *SMALL, "train.strategy=probe"])
    run = ft.train(recipe, runs=tmp_path / "runs", say=quiet)
    with Image.open(moving / "cold" / "1.tif") as image:
        image.convert("RGB").save(tmp_path / "first.png")
    one, other = predict_stream(run, [moving / "cold" / "1.tif", tmp_path / "first.png"])
    assert one.probabilities == other.probabilities


def test_other_images_are_judged_frame_by_frame(run, moving):
    found = evaluate_elsewhere(run, moving)
    assert found.n == found.seen.n == 68


def test_a_page_shows_the_frame_that_it_names(run, moving):
    read = stored_images(run)
    for name, item in ((item.name, item) for item in opened(moving).items if item.frame is not None):
        with Image.open(io.BytesIO(read(name))) as image, Image.open(item.file) as file:
            file.seek(item.frame)
            assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(file.convert("RGB"))), name


def test_an_item_says_of_which_file_it_is(tmp_path):
    one = Item(name="a", label=0, role=None, file=tmp_path / "a.gif", frame=0)
    assert frames.is_of_same_file(one, Item(name="a", label=0, role=None, file=tmp_path / "a.gif", frame=1))
    assert not frames.is_of_same_file(one, Item(name="b", label=0, role=None, file=tmp_path / "b.gif", frame=1))


def test_too_few_files_to_divide_is_an_error_however_many_frames_they_hold(tmp_path):
    for name, tone in (("a", 60), ("b", 160)):
        save(tmp_path / name / "0.gif", [draw((tone,) * 3, tone + page) for page in range(9)])
    with pytest.raises(DataError, match="no images play the role val"):
        look(ft.load_recipe(None, wishes(tmp_path)))


def deep(file, top):
    values = np.random.default_rng(0).integers(0, top, (40, 40), dtype=np.uint16)
    Image.fromarray(values).save(file)
    return file


def test_predict_notes_images_of_more_bits_than_the_run_learned_from(run, tmp_path):
    (answer,) = predict_stream(run, [deep(tmp_path / "deep.png", 4096)])
    assert answer.fault is None and answer.label
    assert "the run learned from 8-bit images only; values 0 to 65535 are mapped" in answer.note


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A run that learned values up to 1023."""
    root = tmp_path_factory.mktemp("narrow")
    for name, top in (("dark", 400), ("light", 1024)):
        (root / name).mkdir()
        for number in range(5):
            values = np.random.default_rng(top + number).integers(top // 2, top, (36, 36), dtype=np.uint16)
            Image.fromarray(values).save(root / name / f"{number}.png")
    recipe = ft.load_recipe(None, [f"data.root={root}", *SMALL, "train.strategy=probe"])
    return ft.train(recipe, runs=tmp_path_factory.mktemp("narrow-runs"), say=quiet)


def test_predict_notes_values_outside_the_range_of_the_run(narrow, tmp_path, capsys):
    inside, outside = deep(tmp_path / "inside.png", 1000), deep(tmp_path / "outside.png", 4096)
    quiet_one, loud = predict_stream(narrow, [inside, outside])
    assert quiet_one.note is None
    assert loud.fault is None and loud.note == "values outside 0 to 1023, the range of the run, are clipped"


def test_notes_go_to_standard_error_once_and_change_no_exit_code(narrow, tmp_path, capsys, monkeypatch):
    files = [str(deep(tmp_path / f"{number}.png", 4096)) for number in range(3)]
    monkeypatch.setattr("sys.argv", ["finetune", "predict", str(narrow.path), *files])
    with pytest.raises(SystemExit) as leave:
        main()
    told = capsys.readouterr()
    assert not leave.value.code
    assert len(told.out.splitlines()) == 3
    assert told.err.count("note: ") == 1 and f"note: {files[0]} and 2 more: values outside 0 to 1023" in told.err
