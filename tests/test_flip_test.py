"""Chirality: a planted side is found, none is invented, and names that tell sides are paired."""

import numpy as np
import pytest
import torch

from finetune.config.backbone_names import read_zoo
from finetune.config.reading import load_recipe
from finetune.data.decoding import center_crop, decode
from finetune.data.loading import normalize
from finetune.data.sources import open_source, read_bytes
from finetune.features.flip_test import LEAST_IMAGES, measure_chirality, sided_classes
from finetune.features.viewing import choose_view
from finetune.models.backbones import load_backbone

pytestmark = pytest.mark.technique("T147")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(n=300, d=40, side=1.0):
    """Features that mirroring leaves alone, but for noise and, in the first column, `side`."""
    common, noise = 5 * randn(n, d, seed=1), randn(n, d, seed=2)
    shift = torch.zeros(d)
    shift[0] = side
    return common + noise + shift, common - noise - shift


def pixels(images):
    """Features of grey images (N, S, S) and of their mirror images."""
    return tuple(torch.from_numpy(np.ascontiguousarray(part)).flatten(1) for part in (images, images[:, :, ::-1]))


def test_a_planted_side_is_objected_to():
    found = measure_chirality(*planted(), seed=0)
    assert found.is_safe is False and found.num_images == found.share.n == 300
    assert found.share.value > 0.75  # the best possible rule gets Phi(1) = 0.84


def test_the_same_features_without_a_side_are_safe():
    found = measure_chirality(*planted(side=0.0), seed=0)
    assert found.is_safe is True and found.share.low < 0.5 < found.share.high


def test_a_mark_in_a_corner_is_seen_and_symmetric_textures_are_not():
    textures = np.random.default_rng(0).random((200, 8, 8), dtype=np.float32)
    assert measure_chirality(*pixels(textures), seed=0).share.low < 0.5
    textures[:, :2, :2] += 1.0
    assert measure_chirality(*pixels(textures), seed=0).share.value > 0.9


def test_images_that_are_their_own_mirror_images_tell_nothing():
    features = randn(200, 10)
    found = measure_chirality(features, features, seed=0)
    assert found.share.value == 0.5 and found.is_safe is True


def test_what_is_memorised_does_not_help_unless_it_is_asked_again():
    """With N < D every training pair is told; one that shared its fold's training would be, too."""
    originals, mirrored = randn(150, 400, seed=1), randn(150, 400, seed=2)
    shares = [measure_chirality(originals, mirrored, seed=seed).share.value for seed in range(4)]
    assert 0.4 < np.mean(shares) < 0.6
    twice = measure_chirality(originals.repeat(2, 1), mirrored.repeat(2, 1), seed=0)
    assert twice.share.value > 0.75  # this is what a leak looks like


def test_the_verdict_does_not_depend_on_which_of_the_two_is_called_the_original():
    originals, mirrored = planted(side=0.3)
    one, other = (measure_chirality(*pair, seed=0) for pair in ((originals, mirrored), (mirrored, originals)))
    assert one == other


def test_too_few_images_get_no_verdict():
    originals, mirrored = planted(n=LEAST_IMAGES, side=5.0)
    assert measure_chirality(originals, mirrored, seed=0).is_safe is False
    for n in (0, 1, LEAST_IMAGES - 1):
        found = measure_chirality(originals[:n], mirrored[:n], seed=0)
        assert (found.share, found.num_images, found.is_safe) == (None, n, None)


def test_a_side_that_is_weak_for_the_number_of_images_is_left_open():
    found = measure_chirality(*planted(n=120, side=0.4), seed=0)
    assert found.is_safe is None and found.share.low < 0.6 and found.share.high > 0.65


def test_the_same_seed_gives_the_same_answer():
    assert measure_chirality(*planted(), seed=3) == measure_chirality(*planted(), seed=3)


def test_classes_that_mirror_each_other_hide_from_the_probe_but_not_by_name():
    originals, mirrored = planted(side=3.0)
    mixed = (torch.cat([originals[:150], mirrored[150:]]), torch.cat([mirrored[:150], originals[150:]]))
    assert measure_chirality(originals[:150], mirrored[:150], seed=0).is_safe is False
    assert measure_chirality(*mixed, seed=0).is_safe is not False
    assert sided_classes(["left_hand", "right_hand"])


def test_features_of_other_shapes_are_refused():
    for wrong in (randn(200, 9), randn(199, 10), randn(200)):
        with pytest.raises(ValueError, match=r"must both be \(N, D\)"):
            measure_chirality(randn(200, 10), wrong, seed=0)


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["left_hand", "right_hand", "foot"], [("left_hand", "right_hand")]),
        (["Right", "Left"], [("Left", "Right")]),
        (["turn-RIGHT", "turn-LEFT", "straight"], [("turn-LEFT", "turn-RIGHT")]),
        (["RightHand", "LeftHand"], [("LeftHand", "RightHand")]),
        (["lefthand", "righthand"], [("lefthand", "righthand")]),
        (["hand_l", "hand_r", "foot_L", "foot_R"], [("hand_l", "hand_r"), ("foot_L", "foot_R")]),
        (["l2", "r2"], [("l2", "r2")]),
        (["left_to_right", "right_to_left"], [("left_to_right", "right_to_left")]),
        (["links", "rechts"], [("links", "rechts")]),
        (["left_hand", "right_foot"], []),
        (["left_hand", "hand"], []),
        (["bell", "berr", "ball", "barr"], []),
        (["cat", "dog"], []),
        ([], []),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_names_that_differ_in_their_side_alone_are_paired(names, pairs):
    assert sided_classes(names) == tuple(pairs)
    assert {frozenset(pair) for pair in sided_classes(reversed(names))} == {frozenset(pair) for pair in pairs}


@pytest.mark.shared
@pytest.mark.parametrize(("name", "is_safe"), [("sign_digits", False), ("malaria", True)])
def test_hand_signs_have_a_side_and_blood_cells_have_none(shared, name, is_safe, monkeypatch):
    monkeypatch.setenv("FINETUNE_ZOO", str(shared / "zoo"))
    backbone = load_backbone("mobilenetv2_100.imagenet_keras", zoo=read_zoo()).eval()
    view, _ = choose_view(load_recipe(None, ["data.image_size=96"]).data, backbone, 96)
    items = [item for item in open_source(shared / "data" / name).items if item.role == "train"]
    rows = np.random.default_rng(0).permutation(len(items))[:300]
    sizes = {"shorter_pixels": view.shorter_pixels, "interpolation": view.interpolation}
    crops = np.stack([center_crop(decode(read_bytes(items[row]), **sizes)[0], 96) for row in rows])

    def features(images):
        parts = torch.from_numpy(np.ascontiguousarray(images)).split(50)
        with torch.inference_mode():
            return torch.cat([backbone(normalize(part, view)) for part in parts])

    found = measure_chirality(features(crops), features(crops[:, :, ::-1]), seed=0)
    assert found.is_safe is is_safe, found
