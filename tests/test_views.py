import numpy as np
import pytest
import torch
from torchvision.transforms import functional

from finetune.evaluation.views import VIEWS, average_views, permitted_views, view_crops, view_names
from finetune.scores.metrics import log_loss

SHAPES = [(9, 12), (12, 9), (11, 8), (8, 11), (10, 13), (13, 10), (8, 8), (9, 9), (21, 15)]


def _image(height, width):
    return np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _tensors(crops):
    return [torch.from_numpy(crop).permute(2, 0, 1) for crop in crops]


def _probabilities(v=4, n=50, num_classes=5, seed=0, spread=3.0):
    logits = spread * torch.randn(v, n, num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.softmax(dim=-1)


@pytest.mark.technique("T150")
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_one_view_is_the_center_crop(height, width):
    image = _image(height, width)
    (crop,) = _tensors(view_crops(image, 8, "center"))
    assert torch.equal(crop, functional.center_crop(torch.from_numpy(image).permute(2, 0, 1), [8, 8]))


@pytest.mark.technique("T151")
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_five_views_are_four_corners_and_the_center(height, width):
    image = _image(height, width)
    crops = view_crops(image, 8, "five")
    for name, corner in [
        ("top-left", image[:8, :8]),
        ("top-right", image[:8, -8:]),
        ("bottom-left", image[-8:, :8]),
        ("bottom-right", image[-8:, -8:]),
        ("center", view_crops(image, 8, "center")[0]),
    ]:
        assert np.array_equal(crops[view_names("five").index(name)], corner)
    expected = functional.five_crop(torch.from_numpy(image).permute(2, 0, 1), 8)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(_tensors(crops), expected, strict=True))


@pytest.mark.technique("T152")
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_ten_views_are_five_and_five_of_the_mirrored_image_in_the_order_of_torchvision(height, width):
    image = _image(height, width)
    crops = view_crops(image, 8, "ten")
    expected = functional.ten_crop(torch.from_numpy(image).permute(2, 0, 1), 8)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(_tensors(crops), expected, strict=True))
    mirrored = view_crops(image[:, ::-1], 8, "five")
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(crops[5:], mirrored, strict=True))


@pytest.mark.technique("T152")
def test_mirrored_views_are_mirrors_of_the_first_five_with_the_sides_exchanged():
    crops = view_crops(_image(9, 12), 8, "ten")  # the width leaves an even rest
    for place, other in enumerate([1, 0, 3, 2, 4]):
        assert np.array_equal(crops[5 + place], crops[other][:, ::-1])
    crops = view_crops(_image(9, 13), 8, "ten")  # an odd rest: the mirrored centre lies one pixel beside
    assert not np.array_equal(crops[9], crops[4][:, ::-1])
    assert np.array_equal(crops[9][:, :-1], crops[4][:, ::-1][:, 1:]) or np.array_equal(
        crops[9][:, 1:], crops[4][:, ::-1][:, :-1]
    )


@pytest.mark.parametrize("views", VIEWS)
def test_every_crop_has_a_name_of_its_own_and_plain_memory(views):
    crops = view_crops(_image(9, 12), 8, views)
    assert len(crops) == len(set(view_names(views))) == {"center": 1, "five": 5, "ten": 10}[views]
    assert all(crop.shape == (8, 8, 3) and crop.flags.c_contiguous and crop.dtype == np.uint8 for crop in crops)


def test_an_image_as_large_as_the_crop_gives_five_equal_views():
    image = _image(8, 8)
    crops = view_crops(image, 8, "ten")
    assert all(np.array_equal(crop, image) for crop in crops[:5])
    assert all(np.array_equal(crop, image[:, ::-1]) for crop in crops[5:])


def test_an_image_below_the_crop_and_unknown_views_are_refused():
    with pytest.raises(ValueError, match="8 x 8 pixels from an image of 12 x 7"):
        view_crops(_image(7, 12), 8, "five")
    for call in (
        lambda: view_crops(_image(9, 9), 8, "six"),
        lambda: view_names("six"),
        lambda: permitted_views("six", []),
    ):
        with pytest.raises(ValueError, match="views must be one of center, five, ten, got 'six'"):
            call()


@pytest.mark.technique("T155")
def test_the_views_are_a_fixed_set():
    image = _image(21, 15)
    for views in VIEWS:
        first, second = view_crops(image.copy(), 8, views), view_crops(image.copy(), 8, views)
        assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert np.array_equal(image, _image(21, 15))


@pytest.mark.technique("T155")
def test_ten_views_fall_back_to_five_with_a_reason_where_mirroring_is_not_declared():
    views, reason = permitted_views("ten", ["rotate90"])
    assert views == "five"
    assert "hflip is not declared" in reason
    assert permitted_views("ten", ["hflip"]) == ("ten", None)
    assert permitted_views("five", []) == ("five", None)
    assert permitted_views("center", []) == ("center", None)


@pytest.mark.technique("T154")
def test_the_means_of_probabilities_and_of_logits_can_disagree():
    logits = torch.tensor([[[10.0, 0, 0]], [[0, 3.0, 0]], [[0, 3.0, 0]]], dtype=torch.float64)  # (V, 1, K)
    probabilities = logits.softmax(dim=-1)
    assert average_views(probabilities, "logit").argmax().item() == 0
    assert average_views(probabilities, "probability").argmax().item() == 1
    torch.testing.assert_close(average_views(probabilities, "logit"), logits.mean(dim=0).softmax(dim=-1))
    torch.testing.assert_close(average_views(probabilities), probabilities.mean(dim=0))


@pytest.mark.technique("T154")
@pytest.mark.parametrize("how", ["probability", "logit"])
@pytest.mark.parametrize("seed", range(8))
def test_the_average_never_loses_more_than_its_views_do_on_average(how, seed):
    """Jensen for the arithmetic mean; the normaliser of a geometric mean is at most one."""
    probabilities, labels = _probabilities(seed=seed), torch.arange(50) % 5
    average = average_views(probabilities, how)
    mean_loss = sum(log_loss(view, labels) for view in probabilities) / len(probabilities)
    assert log_loss(average, labels) <= mean_loss + 1e-12
    torch.testing.assert_close(average.sum(dim=-1), torch.ones(50, dtype=torch.float64))


@pytest.mark.technique("T154")
@pytest.mark.parametrize("how", ["probability", "logit"])
def test_one_view_comes_back_bit_for_bit_and_order_does_not_matter(how):
    for probabilities in (_probabilities(), _probabilities().float()):
        assert torch.equal(average_views(probabilities[:1], how), probabilities[0])
    backwards = average_views(probabilities.flip(0), how)
    assert backwards.dtype == torch.float32
    torch.testing.assert_close(backwards, average_views(probabilities, how), atol=1e-6, rtol=0)


def test_a_view_that_excludes_a_class_leaves_the_geometric_mean_finite():
    average = average_views(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), "logit")
    torch.testing.assert_close(average, torch.tensor([[0.5, 0.5]]))


def test_no_average_of_nothing_or_in_an_unknown_way():
    with pytest.raises(ValueError, match="V >= 1"):
        average_views(torch.empty(0, 2, 2))
    with pytest.raises(ValueError, match="probability, logit, got 'median'"):
        average_views(_probabilities(), "median")
