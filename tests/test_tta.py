"""Views: what is cut out of a test image, what networks say of it, and how that is averaged."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional

import finetune as ft
from finetune.config.card import Card, View
from finetune.data import loading
from finetune.data.decoding import center_crop, decode, decode_sizes
from finetune.data.loading import ImageStore, normalize
from finetune.data.sources import open_source
from finetune.errors import RecipeError, RunError
from finetune.inference import tta_views
from finetune.inference.loading import load_final
from finetune.inference.predict import draw_in_batches, predict_in_batches, predict_probabilities
from finetune.inference.tta import (
    average_views,
    list_crops,
    permitted_views,
    unmirror,
    view_crops,
    view_names,
)
from finetune.inference.tta_views import Viewer, open_viewer
from finetune.metrics.classification import log_loss
from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import make_head

ONE_SCALE = ("center", "flip", "five", "ten")

SHAPES = [(9, 12), (12, 9), (11, 8), (8, 11), (10, 13), (13, 10), (8, 8), (9, 9), (21, 15)]


def predict_views(classifier, store, indices, plan, views):
    """Probabilities (N, V, K)."""
    viewer = open_viewer(classifier, plan, views)
    return torch.cat([said.transpose(0, 1) for said in predict_in_batches(viewer, store, indices)])


def predict_draws(classifier, store, indices, plan, draws=20, seed=0):
    """Probabilities (N, S, K)."""
    drawn = draw_in_batches(classifier, store, indices, plan, draws, seed)
    return torch.cat([some.transpose(0, 1) for some in drawn])


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


@pytest.mark.parametrize("views", ONE_SCALE)
def test_every_crop_has_a_name_of_its_own_and_plain_memory(views):
    crops = view_crops(_image(9, 12), 8, views)
    assert len(crops) == len(set(view_names(views))) == {"center": 1, "flip": 2, "five": 5, "ten": 10}[views]
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
        lambda: unmirror(torch.ones(1, 1, 1), "six", [0]),
    ):
        with pytest.raises(RecipeError, match=r"views: 'six' is unknown\. Give center, flip, five, ten, multiscale"):
            call()
    for views in ("multiscale", "fully_convolutional", "resolutions", "center@9", "center/9"):
        with pytest.raises(ValueError, match="cannot be cut out of one resized image"):
            view_crops(_image(9, 9), 8, views)


@pytest.mark.technique("T155")
def test_the_views_are_a_fixed_set():
    image = _image(21, 15)
    for views in ONE_SCALE:
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
    for views, left in [
        ("flip", "center"),
        ("multiscale", "multiscale_five"),
        ("fully_convolutional", "fully_convolutional_unmirrored"),
        ("center@256, ten@320,flip/288", "center@256, five@320,center/288"),
    ]:
        found, reason = permitted_views(views, ["vflip"])
        assert found == left and reason.startswith(f"{left} views instead of {views}: hflip is not declared")
        assert view_names(left) == tuple(name for name in view_names(views) if "mirrored" not in name)
        assert permitted_views(views, ["hflip"]) == (views, None)
    assert permitted_views("resolutions", []) == ("resolutions", None)


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


@pytest.mark.technique("T153")
def test_multiscale_is_ten_crops_at_five_scales_from_small_to_large():
    names = view_names("multiscale")
    assert len(names) == len(set(names)) == 50
    assert names[:2] == ("224 px top-left", "224 px top-right") and "384 px mirrored top-left" in names
    for place, side in enumerate([224, 256, 384, 480, 640]):
        assert names[10 * place : 10 * place + 10] == tuple(f"{side} px {name}" for name in view_names("ten"))
    assert view_names("multiscale_five") == tuple(name for name in names if "mirrored" not in name)
    assert view_names("multiscale", 112)[-1] == "320 px mirrored center"
    assert {crop.shorter_pixels for crop in list_crops("multiscale", 32)} == {32, 37, 55, 69, 91}


def test_the_other_names_stand_for_what_is_documented():
    assert view_names("flip") == ("center", "mirrored center")
    assert view_names("fully_convolutional")[:3] == ("224 px whole", "224 px mirrored whole", "256 px whole")
    assert len(view_names("fully_convolutional")) == 10
    assert view_names("resolutions") == ("center", "center at 256 px", "center at 288 px")
    assert view_names("resolutions", 32) == ("center", "center at 36 px", "center at 40 px")
    assert view_names("resolutions", 384) == ("center", "center at 448 px", "center at 512 px")


def test_a_list_of_words_gives_its_views_in_its_order():
    assert view_names("flip, center@256,five/288") == (
        *("center", "mirrored center", "256 px center"),
        *(f"{place} at 288 px" for place in view_names("five")),
    )
    assert view_names("center@320/288") == ("320 px center at 288 px",)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ("", "'' is unknown"),
        ("center,,ten", "'' is unknown"),
        ("center@", "'center@' is unknown"),
        ("center@0", "'center@0' is unknown"),
        ("multiscale@256", "'multiscale@256' is unknown"),
        ("whole/256", "'whole/256' is unknown"),
        ("center/256@300", "is unknown"),
        ("center,flip", "'center,flip' holds center twice"),
        ("multiscale,center@384", "holds 384 px center twice"),
    ],
)
def test_words_that_make_no_sense_are_refused(views, message):
    with pytest.raises(RecipeError, match=message):
        list_crops(views)


def test_views_at_several_scales_are_unmirrored_where_they_are_mirrored():
    for views in ("multiscale", "fully_convolutional", "resolutions", "center@256,flip@300"):
        names = view_names(views)
        rows = torch.rand(len(names), 3, 2)
        answer = unmirror(rows, views, (1, 0))
        for name, before, after in zip(names, rows, answer, strict=True):
            assert torch.equal(after, before.flip(1) if "mirrored" in name else before)


def _negative_log_likelihood(probabilities, labels):
    return float(-probabilities.gather(1, labels[:, None]).log().mean())


@pytest.mark.technique("T154")
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    v=st.integers(1, 12),
    n=st.integers(1, 9),
    num_classes=st.integers(2, 6),
    spread=st.floats(0.1, 8),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_for_any_views_the_mean_loses_no_more_and_does_not_know_their_order(v, n, num_classes, spread, seed, data):
    probabilities = _probabilities(v, n, num_classes, seed, spread)
    labels = torch.arange(n) % num_classes
    order = data.draw(st.permutations(range(v)))
    for how in ("probability", "logit"):
        average = average_views(probabilities, how)
        mean_loss = sum(_negative_log_likelihood(view, labels) for view in probabilities) / v
        assert _negative_log_likelihood(average, labels) <= mean_loss + 1e-9
        torch.testing.assert_close(average_views(probabilities[order], how), average, atol=1e-6, rtol=0)
        torch.testing.assert_close(average.sum(1), torch.ones(n, dtype=torch.float64))


WISHES = ["data.image_size=32", "train.batch_size=16", "train.epochs=1", "train.strategy=probe"]


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    recipe = ft.load_recipe(None, [f"data.root={shapes}", *WISHES, "tracking.enabled=false", "data.split.refit=false"])
    return ft.train(recipe, runs=tmp_path_factory.mktemp("views"), say=lambda text: None)


@pytest.fixture(scope="module")
def classifier(run):
    return load_final(run)


@pytest.fixture(scope="module")
def items(shapes, tmp_path_factory):
    """Drawn images of several shapes, wide and tall."""
    folder = tmp_path_factory.mktemp("wide") / "images"
    for number, file in enumerate(sorted(shapes.rglob("*.png"))[::6]):
        image = Image.open(file).resize((60 + 7 * (number % 3), 90 - 20 * (number % 4)))
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        image.save(folder / "ab"[number % 2] / f"{number}.png")
    return open_source(folder).items


@pytest.fixture
def store(run, items):
    return ImageStore(items, run.plan.view, limit_bytes=0)


def _rows(answers, names, name):
    return answers[:, names.index(name)]


@pytest.mark.technique("T150")
@pytest.mark.parametrize("how", ["probability", "logit"])
def test_one_view_is_the_plain_forward_bit_for_bit(run, classifier, store, how):
    plan, many = run.plan, range(len(store.items))
    crops = np.stack([center_crop(store.get(index), plan.view.size_pixels) for index in many])
    with torch.inference_mode():
        plain = classifier(normalize(torch.from_numpy(crops), plan.view)).softmax(1)
    assert torch.equal(predict_probabilities(classifier, store, many, plan, "center", how), plain)
    assert torch.equal(predict_views(classifier, store, many, plan, "center")[:, 0], plain)


@pytest.mark.technique("T151", "T152")
@pytest.mark.parametrize("views", ["five", "ten"])
def test_several_views_of_one_scale_are_one_forward_bit_for_bit(run, classifier, store, views):
    plan, many = run.plan, range(6)
    crops = [crop for index in many for crop in view_crops(store.get(index), plan.view.size_pixels, views)]
    with torch.inference_mode():
        plain = classifier(normalize(torch.from_numpy(np.stack(crops)), plan.view)).softmax(1)
    plain = plain.view(len(many), -1, 3)
    assert torch.equal(predict_views(classifier, store, many, plan, views), plain)
    assert torch.equal(
        predict_probabilities(classifier, store, many, plan, views), average_views(plain.transpose(0, 1))
    )


@pytest.mark.parametrize(("views", "most"), [("ten", 64), ("center/64", 16)])
def test_a_pass_of_many_crops_is_as_large_as_one_of_many_images(run, classifier, store, views, most):
    passes, rows = [], [index % len(store.items) for index in range(30)]
    hook = classifier.backbone.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    predict_views(classifier, store, rows, run.plan, views)
    hook.remove()
    count = 30 * len(view_names(views))
    assert sum(passes) - count in (0, 1)  # one more where it was tried whether the size is taken
    assert max(passes) == most and tta_views.CROPS_PER_PASS["cpu"] == 64


def test_a_pass_on_a_cpu_holds_no_more_pixels_than_one_of_training(run, classifier, store, monkeypatch):
    passes, rows = [], [index % len(store.items) for index in range(30)]
    whole = predict_views(classifier, store, rows, run.plan, "ten")
    monkeypatch.setattr(tta_views, "PASS_PIXELS", 8 * run.plan.view.size_pixels**2)
    hook = classifier.backbone.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    cut = predict_views(classifier, store, rows, run.plan, "ten")
    hook.remove()
    assert max(passes) == 8 and sum(passes) == 300
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)


def test_no_images_give_no_rows(run, classifier, store):
    assert predict_probabilities(classifier, store, [], run.plan, "ten").shape == (0, 3)


@pytest.mark.technique("T153")
def test_multiscale_views_are_torchvisions_ten_crops_of_each_scale(run, classifier, store):
    viewer, view = Viewer(classifier, run.plan, "multiscale"), run.plan.view
    for index in (0, 1, 2):
        crops, data = viewer.read(store, index), store.items[index].file.read_bytes()
        for place, scale in enumerate([32, 37, 55, 69, 91]):
            alone, _ = decode(data, shorter_pixels=scale, interpolation=view.interpolation)
            pixels = alone if scale == 91 else np.array(_resized(store, index, scale))
            assert pixels.shape == alone.shape
            tens = functional.ten_crop(Image.fromarray(pixels), view.size_pixels)
            for ours, theirs in zip(crops[10 * place : 10 * place + 10], tens, strict=True):
                assert np.array_equal(ours, np.array(theirs))


def _resized(store, index, scale):
    """As torchvision resizes a PIL image: the largest scale to a smaller one."""
    view = store.view
    largest, _ = decode(store.items[index].file.read_bytes(), shorter_pixels=91, interpolation=view.interpolation)
    mode = functional.InterpolationMode(view.interpolation)
    alone, _ = decode(store.items[index].file.read_bytes(), shorter_pixels=scale, interpolation=view.interpolation)
    return functional.resize(Image.fromarray(largest), list(alone.shape[:2]), mode)


@pytest.mark.technique("T153")
@pytest.mark.parametrize("views", ["multiscale", "fully_convolutional", "resolutions", "center,ten@40,whole@50"])
def test_an_image_is_decoded_once_however_many_views_are_taken(run, classifier, store, monkeypatch, views):
    sides = []

    def counted(data, sizes):
        sides.extend(one.shorter_pixels for one in sizes)
        return decode_sizes(data, sizes)

    monkeypatch.setattr(loading, "decode_sizes", counted)
    monkeypatch.setattr(tta_views, "decode_sizes", counted)
    answers = predict_views(classifier, store, [0, 3, 5], run.plan, views)
    crops = list_crops(views, 32)
    assert answers.shape == (3, len(crops), 3)
    assert sides == [max(crop.scale_pixels(run.plan.view) for crop in crops)] * 3


def test_a_scale_made_from_the_largest_looks_as_if_decoded_alone(tmp_path):
    y, x = np.mgrid[:300, :400] / 40
    pixels = np.stack([127 + 120 * np.sin(x * k + y) for k in (1, 2, 3)], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "smooth.png")
    data = (tmp_path / "smooth.png").read_bytes()
    images = tta_views._at_scales(*decode(data, shorter_pixels=160, interpolation="bicubic"), [160, 120, 64], "bicubic")
    for scale, image in images.items():
        alone, _ = decode(data, shorter_pixels=scale, interpolation="bicubic")
        assert np.abs(image.astype(int) - alone).mean() < 1


def test_views_of_the_stores_scale_come_out_of_the_store(run, classifier, items, monkeypatch):
    view = run.plan.view
    store = ImageStore(items, view, limit_bytes=10**8)
    store.get(0)
    monkeypatch.setattr(loading, "decode_sizes", None)  # would raise if it were called
    monkeypatch.setattr(tta_views, "decode_sizes", None)
    for views in (*ONE_SCALE, "whole", f"five@{view.shorter_pixels}"):
        predict_views(classifier, store, [0], run.plan, views)


@pytest.mark.technique("T153")
def test_every_view_keeps_its_answer_in_whatever_list_it_stands(run, classifier, store):
    plan, many = run.plan, range(6)
    words = ["ten@40", "center@91", "whole@50", "flip@64/48"]
    answers = []
    for order in itertools.islice(itertools.permutations(words), 0, None, 7):
        views = ",".join(order)
        names, rows = view_names(views, 32), predict_views(classifier, store, many, plan, views)
        answers.append({name: _rows(rows, names, name) for name in names})
        mean = predict_probabilities(classifier, store, many, plan, views)
        torch.testing.assert_close(mean, rows.mean(1), atol=1e-6, rtol=0)
        labels = torch.arange(6) % 3
        assert (
            log_loss(mean, labels) <= sum(log_loss(rows[:, v], labels) for v in range(len(names))) / len(names) + 1e-6
        )
    for one in answers[1:]:
        assert set(one) == set(answers[0])
        for name, row in one.items():
            torch.testing.assert_close(row, answers[0][name], atol=1e-6, rtol=0)


def test_whole_images_of_different_shapes_are_each_looked_at_whole(run, classifier, store):
    rows = predict_views(classifier, store, [0, 1, 2, 3], run.plan, "whole_flip@48")
    for place, index in enumerate([0, 1, 2, 3]):
        pixels, _ = decode(store.items[index].file.read_bytes(), shorter_pixels=48, interpolation="bilinear")
        for number, image in enumerate([pixels, pixels[:, ::-1].copy()]):
            with torch.inference_mode():
                alone = classifier(normalize(torch.from_numpy(image[None]), run.plan.view)).softmax(1)
            torch.testing.assert_close(rows[place, number], alone[0], atol=1e-5, rtol=0)


def test_a_crop_larger_than_its_image_is_refused_before_anything_is_read(run, classifier):
    with pytest.raises(RecipeError, match=r"'31 px center' cuts 32 x 32 px .* shorter side is 31 px; .* at least 32"):
        Viewer(classifier, run.plan, "ten,center@31")
    with pytest.raises(RecipeError, match="at least 64"):
        Viewer(classifier, run.plan, "center@48/64")


STRICT = {
    "vit": ("test_vit", {"dynamic_img_size": False}, 160),
    "dynamic": ("test_vit", {"dynamic_img_size": True}, 160),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 2), "num_heads": (1, 2)},
        64,
    ),
}


def _other(run, name):
    """A classifier on a small transformer with random weights, and a plan for it."""
    arch, options, size = STRICT[name]
    torch.manual_seed(0)
    card = Card(name=name, arch=arch, arch_kwargs=options, num_classes=5, input_size=(3, size, size))
    backbone = load_backbone(name, zoo={name: card}, pretrained=False)
    head = make_head(backbone.num_features, 3, init="small")
    data = run.plan.data.model_copy(update={"image_size": size, "crop_pct": 1.0})
    return Classifier(backbone, head).eval(), run.plan.model_copy(update={"data": data})


@pytest.mark.parametrize(("name", "replaced"), [("vit", "pos_embed"), ("swin", "bias_table"), ("dynamic", None)])
def test_position_embeddings_are_interpolated_for_other_sizes_and_the_network_stays_as_it_was(
    run, items, name, replaced
):
    classifier, plan = _other(run, name)
    store = ImageStore(items, plan.view, limit_bytes=0)
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    rows = predict_views(classifier, store, range(3), plan, "resolutions")
    viewer = Viewer(classifier, plan, "resolutions")
    crops = np.stack([viewer.read(store, index)[0] for index in range(3)])
    with torch.inference_mode():
        assert torch.equal(rows[:, 0], classifier(normalize(torch.from_numpy(crops), plan.view)).softmax(1))
    assert torch.isfinite(rows).all() and all(not torch.equal(rows[:, 0], rows[:, view]) for view in (1, 2))
    after = classifier.state_dict()
    assert list(after) == list(before) and all(torch.equal(value, after[key]) for key, value in before.items())
    own = {id(parameter) for parameter in classifier.parameters()}
    fresh = [
        key
        for network in viewer._networks.values()
        for key, parameter in network.named_parameters()
        if id(parameter) not in own
    ]
    assert bool(fresh) is bool(replaced) and all(key.endswith(str(replaced)) for key in fresh)


def test_a_network_that_takes_one_size_is_refused_others_with_the_way_out(run):
    classifier, plan = _other(run, "vit")
    with pytest.raises(RecipeError, match=r"whole images have many sizes, and vit does not take any size .*Use ten"):
        Viewer(classifier, plan, "fully_convolutional")
    classifier.backbone.model = _NoResizing(classifier.backbone.model)
    with pytest.raises(RecipeError, match=r"vit was trained on 160 px and cannot look at 176 px \(.*176"):
        Viewer(classifier, plan, "resolutions")
    Viewer(classifier, plan, "multiscale")


class _NoResizing(torch.nn.Module):
    """A transformer whose maker did not think of other sizes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)


def test_a_network_that_pools_to_several_places_is_refused_whole_images(run, classifier):
    other = copy.deepcopy(classifier)
    other.backbone.add_module("pool", torch.nn.AdaptiveAvgPool2d((7, 7)))
    with pytest.raises(RecipeError, match=r"pools to \(7, 7\) places and not to one"):
        Viewer(other, run.plan, "whole")
    Viewer(other, run.plan, "resolutions")


def test_draws_of_the_heads_dropout_repeat_by_seed_and_need_dropout(run, classifier, store):
    with pytest.raises(RunError, match="no dropout, so draws of it would all be the same"):
        predict_draws(classifier, store, [0], run.plan)
    torch.manual_seed(0)
    backbone = classifier.backbone
    noisy = Classifier(backbone, make_head(backbone.num_features, 3, init="model", dropout=0.5)).eval()
    first = predict_draws(noisy, store, range(4), run.plan, draws=5, seed=1)
    assert first.shape == (4, 5, 3)
    assert torch.equal(predict_draws(noisy, store, range(4), run.plan, draws=5, seed=1), first)
    assert not torch.equal(predict_draws(noisy, store, range(4), run.plan, draws=5, seed=2), first)
    assert first.std(1).max() > 0


def test_a_view_keeps_the_share_of_the_image_at_other_sizes():
    view = View(size_pixels=224, shorter_pixels=256, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert [crop.scale_pixels(view) for crop in list_crops("resolutions")] == [256, 293, 329]
    full = replace(view, shorter_pixels=224)
    assert [crop.scale_pixels(full) for crop in list_crops("resolutions")] == [224, 256, 288]
    assert [crop.scale_pixels(full) for crop in list_crops("center@256,whole,whole@300")] == [256, 224, 300]
