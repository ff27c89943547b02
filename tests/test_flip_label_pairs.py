"""`data.flip_label_pairs`: a flipped image gets the label of its counterpart, in training and in judging."""

import numpy as np
import pytest
import torch
from PIL import Image

import finetune as ft
from finetune.config.card import View
from finetune.config.recipe import DataSpec
from finetune.data.augmentation import Augmentation
from finetune.data.loading import Batches, ImageStore
from finetune.data.sources import open_source
from finetune.errors import RecipeError
from finetune.features.survey import look
from finetune.inference.tta import average_views, unmirror, view_crops, view_names
from finetune.training.setup import make_batches

pytestmark = pytest.mark.technique("T147")
VIEW = View(size_pixels=32, shorter_pixels=36, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
SWAP = "data.flip_label_pairs=[[left, right]]"
LEFT, NONE, RIGHT = range(3)  # as the folders are sorted


def ramp(side, size=40):
    """Grey that falls to the right (left), rises (right) or stays (none): a side that any crop shows."""
    grey = np.linspace(20, 235, size) * {"left": -1, "none": 0, "right": 1}[side] + (255 if side == "left" else 0)
    return np.repeat(np.broadcast_to(grey, (size, size))[..., None], 3, axis=2).astype(np.uint8)


def side_of(view):
    """The class that the pixels show, whatever colour jitter and cutout did; (H, W, 3) or normalised (3, H, W)."""
    grey = view.mean(0) if view.shape[0] == 3 else view.astype(float).mean(-1)
    slope = np.sign(np.diff(np.asarray(grey), axis=1)).sum()
    return NONE if abs(slope) < 100 else RIGHT if slope > 0 else LEFT


@pytest.fixture(scope="module")
def arrows(tmp_path_factory):
    """40 images of each side: a ramp with some noise, and none."""
    root, random = tmp_path_factory.mktemp("arrows") / "arrows", np.random.default_rng(0)
    for side in ("left", "none", "right"):
        (root / side).mkdir(parents=True)
        for number in range(40):
            noise = random.integers(-2, 3, (40, 40, 3))
            Image.fromarray((ramp(side) + noise).clip(0, 255).astype(np.uint8)).save(root / side / f"{number:02}.png")
    return root


def make(preset, *invariances):
    return Augmentation(preset, size_pixels=32, interpolation="bilinear", invariances=invariances)


def epoch(arrows, number, mirror_labels, *, preset="heavy", workers=0):
    source = open_source(arrows)
    labels = [item.label for item in source.items]
    loader = Batches(
        ImageStore(source.items, VIEW, 10**8),
        range(len(labels)),
        labels,
        batch_size=16,
        augmentation=make(preset, "hflip"),
        shuffle=True,
        seed=5,
        workers=workers,
        mirror_labels=mirror_labels,
    )
    loader.set_epoch(number)
    images, labels, indices = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return images, labels, indices, torch.tensor([source.items[i].label for i in indices.tolist()])


@pytest.mark.parametrize("preset", ["light", "medium", "heavy"])
@pytest.mark.parametrize("others", [(), ("vflip",)], ids=["hflip", "hflip and vflip"])
def test_the_augmentation_tells_whether_it_mirrored(preset, others):
    augment, image = make(preset, "hflip", *others), ramp("right")
    told = [augment.draw(image, seed) for seed in range(300)]
    assert [is_mirrored for _, is_mirrored in told] == [side_of(view) == LEFT for view, _ in told]
    assert 100 < sum(is_mirrored for _, is_mirrored in told) < 200
    assert all((augment(image, seed) == told[seed][0]).all() for seed in range(20))


@pytest.mark.parametrize("preset", ["none", "light", "heavy"])
def test_nothing_is_told_to_be_mirrored_where_the_flip_is_not_allowed(preset):
    augment = make(preset, "vflip")
    assert not any(augment.draw(ramp("right"), seed)[1] for seed in range(50))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_label_is_swapped_exactly_where_the_image_is_flipped(arrows, workers):
    for number in range(3):
        images, labels, _, own = epoch(arrows, number, (RIGHT, NONE, LEFT), preset="light", workers=workers)
        assert labels.tolist() == [side_of(image.numpy()) for image in images]
        swapped = labels != own
        assert not swapped[own == NONE].any() and 0.25 < swapped[own != NONE].float().mean() < 0.75


def test_workers_change_no_label(arrows):
    alone, helped = (epoch(arrows, 1, (RIGHT, NONE, LEFT), workers=workers) for workers in (0, 2))
    assert all(torch.equal(one, other) for one, other in zip(alone, helped, strict=True))


def test_without_pairs_images_are_flipped_alike_and_labels_stay(arrows):
    images, labels, indices, own = epoch(arrows, 0, None)
    swapped = epoch(arrows, 0, (RIGHT, NONE, LEFT))
    assert torch.equal(labels, own) and torch.equal(images, swapped[0]) and torch.equal(indices, swapped[2])
    assert torch.equal(epoch(arrows, 0, (LEFT, NONE, RIGHT))[1], own)


def test_labels_without_a_mirror_label_are_refused(arrows):
    with pytest.raises(ValueError, match="says nothing of label 2"):
        epoch(arrows, 0, (RIGHT, NONE))


def test_ten_crops_of_an_arrow_and_of_its_mirror_image_agree():
    def judge(image):
        """(10, 1, 3): a judge that sees sides, but not perfectly."""
        seen = torch.tensor([side_of(crop) for crop in view_crops(image, 32, "ten")])
        return (2.0 * torch.nn.functional.one_hot(seen, 3).double()).softmax(-1)[:, None]

    one, other = judge(ramp("left")), judge(ramp("left")[:, ::-1])
    mean, mirrored = (average_views(unmirror(rows, "ten", (RIGHT, NONE, LEFT)))[0] for rows in (one, other))
    assert mean.argmax() == LEFT and mirrored.argmax() == RIGHT
    torch.testing.assert_close(mean, mirrored[[RIGHT, NONE, LEFT]])
    torch.testing.assert_close(mean, one[0, 0])  # all views say the same
    undecided = average_views(one)[0]
    assert undecided[LEFT] == pytest.approx(float(undecided[RIGHT]))  # what forgetting the swap would give


@pytest.mark.parametrize("views", ["center", "five", "ten"])
def test_only_mirrored_views_are_unmirrored(views):
    count = len(view_names(views))
    rows = torch.randn(count, 4, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    kept = rows.clone()
    answer = unmirror(rows, views, (2, 1, 0))
    assert torch.equal(answer[:5], rows[:5]) and torch.equal(answer[5:], rows[5:].flip(-1)) and torch.equal(rows, kept)
    assert torch.equal(unmirror(rows, views, (0, 1, 2)), rows)
    with pytest.raises(ValueError, match=f"probabilities \\({count}, N, 2\\) are needed"):
        unmirror(rows, views, (1, 0))


def test_pairs_go_both_ways_and_other_classes_keep_their_own():
    data = DataSpec(flip_label_pairs=(("d", "b"), ("q", "p")))
    assert data.mirror_classes(("a", "b", "d", "p", "q")) == (0, 2, 1, 4, 3)
    assert DataSpec().mirror_classes(("a", "b")) == (0, 1)


def test_pairs_allow_the_flip_once():
    assert DataSpec(flip_label_pairs=(("b", "d"),), invariances=("vflip",)).allowed_changes == ("vflip", "hflip")
    assert DataSpec(flip_label_pairs=(("b", "d"),), invariances=("hflip",)).allowed_changes == ("hflip",)
    assert DataSpec(flip_label_pairs=(("b", "d"),)).allowed_changes == ("hflip",)
    assert DataSpec(invariances=("rot90",)).allowed_changes == ("rot90",)
    assert DataSpec().allowed_changes == ()


@pytest.fixture(scope="module")
def facts(arrows):
    return ft.survey(ft.load_recipe(None, [f"data.root={arrows}", "data.image_size=32", "train.strategy=partial"]))


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("[[left, rihgt]]", "names 'rihgt', which is no class; they are left, none, right"),
        ("[[left, right], [none, left]]", "names 'left' twice"),
        ("[[left, right], [right, left]]", "names 'left', 'right' twice"),
        ("[[none, none]]", "names 'none' twice, .*leave out a class that keeps its own"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(facts, wish, message):
    with pytest.raises(RecipeError, match=message):
        ft.make_plan(ft.load_recipe(None, [f"data.flip_label_pairs={wish}"]), facts)


@pytest.mark.parametrize("wish", ["[left, right]", "[[left]]", "[[left, none, right]]"])
def test_what_is_no_list_of_pairs_is_refused_by_its_key(wish):
    with pytest.raises(RecipeError, match=r"data\.flip_label_pairs"):
        ft.load_recipe(None, [f"data.flip_label_pairs={wish}"])


def test_two_changes_that_make_a_mirror_are_refused_beside_pairs(facts):
    with pytest.raises(RecipeError, match="vflip and rot90, which together mirror an image"):
        ft.make_plan(ft.load_recipe(None, [SWAP, "data.invariances=[vflip, rot90]"]), facts)
    ft.make_plan(ft.load_recipe(None, [SWAP, "data.invariances=[vflip]"]), facts)


@pytest.mark.technique("T155")
def test_a_plan_with_pairs_keeps_ten_crops_and_names_the_pairs(facts):
    plan = ft.make_plan(ft.load_recipe(None, [SWAP, "evaluate.views=ten"]), facts)
    assert plan.evaluate.views == "ten" and plan.data.invariances == ()
    assert [(r.value, r.why) for r in plan.reasons if r.key == "data.flip_label_pairs"] == [
        ("[[left, right]]", "the recipe says so")
    ]
    assert not any(r.key == "data.flip_label_pairs" for r in ft.make_plan(ft.load_recipe(None, []), facts).reasons)


@pytest.mark.slow
def test_a_run_trains_on_swapped_labels_and_watches_plain_ones(arrows):
    wishes = [f"data.root={arrows}", "data.image_size=32", "train.strategy=full", "augment.preset=light", SWAP]
    seen = look(ft.load_recipe(None, wishes))
    train, val = make_batches(ft.make_plan(ft.load_recipe(None, wishes), seen.facts), seen.dataset)
    for loader, swaps in ((train, True), (val, False)):
        images, labels, indices = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert labels.tolist() == [side_of(image.numpy()) for image in images]
        assert (labels.tolist() != [seen.dataset.items[index].label for index in indices]) is swaps


@pytest.mark.slow
def test_a_run_judges_an_image_and_its_mirror_image_alike(arrows, tmp_path):
    wishes = [f"data.root={arrows}", "data.image_size=32", "train.batch_size=16", "train.epochs=2", SWAP]
    wishes += ["train.strategy=full", "evaluate.views=ten", "evaluate.calibrate=false", "augment.preset=light"]
    run = ft.train(
        ft.load_recipe(None, [*wishes, "tracking.enabled=false", "data.split.refit=false"]),
        runs=tmp_path,
        say=lambda text: None,
    )
    scores = run.read_json("scores.json")
    assert scores["views"] == "ten" and scores["test"]["top1"]["value"] > 0.9
    for name, pixels in (("1", ramp("left")), ("2", ramp("left")[:, ::-1])):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    one, other = (p.probabilities for p in ft.predict(run, [tmp_path / "1.png", tmp_path / "2.png"]))
    assert one["left"] > 0.5 and other["right"] > 0.5
    assert [one[k] for k in ("left", "none", "right")] == pytest.approx(
        [other[k] for k in ("right", "none", "left")], abs=1e-4
    )
