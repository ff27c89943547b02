"""Similarity: nothing moves for images of the source, the stem first for spoilt pixels, and the formulas are theirs."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import finetune as ft
from finetune.compute import PLAIN
from finetune.config.backbone_names import read_zoo
from finetune.config.card import Card
from finetune.data.loading import normalize
from finetune.features.similarity import _stage_shift, measure_control, measure_response, measure_shift, source_logits
from finetune.models.backbones import Backbone, load_backbone


def clouds(n, seed=0):
    """Smooth random colours (n, 64, 64, 3), with room above and below."""
    small = np.random.default_rng(seed).integers(70, 180, (n, 8, 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((64, 64), Image.Resampling.BILINEAR)) for one in small])


def load():
    return load_backbone("tiny_resnet18.cifar10", zoo=read_zoo()).eval()


def norms_of(backbone):
    return [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]


def used_to(backbone, crops):
    """The same network with the statistics of these very crops in every batch norm."""
    own = copy.deepcopy(backbone)
    for norm in norms_of(own):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        own(normalize(torch.from_numpy(crops), own.card.view()))
    return own.eval()


def shift(backbone, crops):
    return measure_shift(backbone, crops, backbone.card.view(), compute=PLAIN, seed=0)


@pytest.fixture(scope="module")
def known():
    """A network and 96 images that it is used to."""
    crops = clouds(96)
    return used_to(load(), crops), crops


@pytest.mark.technique("T016")
def test_images_whose_statistics_are_the_running_ones_have_moved_nowhere(known):
    backbone, crops = known
    rows = shift(backbone, crops)
    assert [row.stage for row in rows] == list(backbone.stages)
    for row in rows:  # 2 x 2 positions are left at the top: n / (n - 1) of the stored variance shows there
        assert row.mean.value < 1e-3
        assert row.spread.value < 0.02
    assert rows[0].mean.value < 1e-8
    assert rows[0].spread.value < 1e-4
    pretrained = shift(load(), crops)
    assert all(row.mean.value > 100 * own.mean.value for row, own in zip(pretrained, rows, strict=True))


@pytest.mark.technique("T016")
@pytest.mark.parametrize("kind", ["brightness", "contrast"])
def test_the_shift_grows_with_the_change_of_the_pixels_and_the_stem_moves_first(known, kind):
    backbone, crops = known

    def changed(amount):
        pixels = crops + 70.0 * amount if kind == "brightness" else 125 + (crops - 125.0) * (1 + amount)
        assert pixels.min() >= 0
        assert pixels.max() <= 255
        return pixels.round().astype(np.uint8)

    steps = [shift(backbone, changed(amount)) for amount in (0.0, 0.25, 0.5, 1.0)]
    measure = "mean" if kind == "brightness" else "spread"
    stem = [getattr(rows[0], measure).value for rows in steps]
    assert stem == sorted(stem)
    assert stem[3] > 2 * stem[1] > 100 * stem[0]
    strongest = [getattr(row, measure).value for row in steps[3]]
    lower, upper = max(strongest[:2]), max(strongest[2:])
    assert lower > upper  # the stem, and the stage that its output goes to first


@pytest.mark.technique("T016")
def test_the_shift_is_the_distance_of_moments_channel_by_channel():
    backbone, crops = load(), clouds(20)
    seen = {}
    first, second = (backbone.model.layer1[0].bn1, backbone.model.bn1)
    handles = [
        norm.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(module, inputs[0]))
        for norm in (first, second)
    ]
    with torch.no_grad():
        backbone(normalize(torch.from_numpy(crops), backbone.card.view()))
    for handle in handles:
        handle.remove()
    x, norm = seen[backbone.model.bn1].double(), backbone.model.bn1  # the only one of the stem
    known = norm.running_var.double() + norm.eps
    sampling = x.mean((2, 3)).var(0) / len(x)  # the variance of the mean of 20 images
    mean = (((x.mean((0, 2, 3)) - norm.running_mean).square() - sampling) / known).mean()
    spread = ((x.var((0, 2, 3), correction=0) + norm.eps) / known).log().abs().mean()
    row = shift(backbone, crops)[0]
    assert row.mean.value == pytest.approx(float(mean), rel=1e-4)
    assert row.spread.value == pytest.approx(float(spread), rel=1e-4)


@pytest.mark.technique("T016")
@pytest.mark.parametrize("images", [4, 16, 128])
def test_few_images_are_as_similar_as_many_of_their_kind(images):
    """Means of images that differ by 1 around a shift of 0.5, in units of the source: 0.25, however few there are."""
    generator = torch.Generator().manual_seed(0)
    known = torch.stack([torch.zeros(50), torch.ones(50)])[None]
    values = []
    for _ in range(40):
        means = 0.5 + torch.randn(images, 50, generator=generator)
        moments = torch.stack([means, means.square() + 0.1], dim=1)
        values.append(_stage_shift("stem", [torch.cat([moments, known]).double()], 0).mean)
    assert np.mean([one.value for one in values]) == pytest.approx(0.25, abs=0.03)  # plus 1 / images, were it left in
    assert np.mean([one.low <= 0.25 <= one.high for one in values]) >= (0.5 if images == 4 else 0.85)


def test_a_channel_that_is_dead_here_and_was_dead_there_has_not_moved(known):
    backbone, crops = copy.deepcopy(known[0]), known[1]
    stem = backbone.model
    with torch.no_grad():
        stem.conv1.weight[:12] = 0.0
        stem.bn1.running_mean[:12] = 0.0
        stem.bn1.running_var[:12] = 0.0
    assert shift(backbone, crops)[0].spread.value < 1e-3


def test_a_norm_that_is_not_called_once_per_image_is_left_out():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.second, self.shared, self.unused = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            x = self.second(self.norm(self.first(x)).relu())
            return self.fc(self.shared(self.shared(x)).mean((2, 3)))

    card = Card(name="odd", arch="odd", num_classes=2, input_size=(3, 64, 64))
    backbone = Backbone(Odd(), card, build=lambda num_classes: Odd(), has_source=False).eval()
    rows = shift(backbone, clouds(6))
    assert len(rows) == 1
    assert rows[0].stage == backbone.stages[backbone.stage_of["model.norm.running_mean"]]


def test_a_network_without_batch_norm_has_no_shift():
    backbone = load_backbone("test_vit", zoo={}, pretrained=False).eval()
    view = backbone.card.view()
    crops = np.zeros((2, view.size_pixels, view.size_pixels, 3), dtype=np.uint8)
    assert measure_shift(backbone, crops, view, compute=PLAIN, seed=0) == ()


def test_looking_for_a_shift_leaves_no_trace():
    backbone = load()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    shift(backbone, clouds(8))
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in before.items())
    assert not any(module._forward_pre_hooks for module in backbone.modules())


@pytest.mark.parametrize("moves", [0, 30])
def test_intervals_hold_the_value_and_shrink_with_images(known, moves):
    backbone, _ = known
    few, many = (shift(backbone, clouds(n, seed=5) + np.uint8(moves)) for n in (12, 192))
    for small, large in zip(few, many, strict=True):
        for name in ("mean", "spread"):
            for measure in (getattr(small, name), getattr(large, name)):
                assert 0 <= measure.low <= measure.value <= measure.high
        assert small.mean.n == 12
    assert sum(row.mean.high - row.mean.low for row in many) < 0.5 * sum(row.mean.high - row.mean.low for row in few)


def test_the_interval_of_a_mean_is_two_standard_errors():
    logits = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    energy = -logits.double().logsumexp(1)
    found = measure_response(logits, [], seed=0).energy
    half = 1.96 * float(energy.std()) / 400**0.5
    assert found.value - found.low == pytest.approx(half, rel=0.25)
    assert found.high - found.value == pytest.approx(half, rel=0.25)


@pytest.mark.technique("T016")
@pytest.mark.parametrize("used", [1, 3, 10])
def test_images_surely_taken_for_so_many_source_classes_count_so_many(used):
    logits = torch.full((60, 10), -50.0)
    logits[torch.arange(60), torch.arange(60) % used] = 50.0
    found = measure_response(logits, [f"name{k}" for k in range(10)], seed=0)
    assert found.num_classes == 10
    assert found.effective.value == pytest.approx(used)
    assert found.confidence.value == pytest.approx(1.0)
    assert found.effective.low <= found.effective.value <= found.effective.high
    assert len({name for name, _ in found.named}) == min(3, used)
    assert {name for name, _ in found.named} <= {f"name{k}" for k in range(used)}
    assert [share for _, share in found.named] == pytest.approx([1 / used] * min(3, used))


@pytest.mark.technique("T016")
def test_images_taken_for_nothing_are_spread_over_all_source_classes():
    found = measure_response(torch.full((20, 8), 1.5), [], seed=0)
    assert found.effective.value == pytest.approx(8)
    assert found.confidence.value == pytest.approx(1 / 8)
    assert found.energy.value == pytest.approx(-(1.5 + math.log(8)))
    assert all(name.startswith("class ") for name, _ in found.named)


@pytest.mark.technique("T016")
def test_energy_effective_classes_and_names_are_the_formulas():
    logits = 3 * torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    found = measure_response(logits, list("abcdef"), seed=0)
    p = logits.double().softmax(1)
    mean = p.mean(0)
    assert found.effective.value == pytest.approx(float((-(mean * mean.log()).sum()).exp()))
    assert found.confidence.value == pytest.approx(float(p.max(1).values.mean()))
    assert found.energy.value == pytest.approx(float(-logits.double().exp().sum(1).log().mean()))
    counts = torch.bincount(logits.argmax(1), minlength=6)
    assert dict(found.named) == {"abcdef"[k]: pytest.approx(int(counts[k]) / 50) for k in counts.topk(3).indices}
    assert [share for _, share in found.named] == sorted((share for _, share in found.named), reverse=True)


def test_the_source_head_on_stored_features_is_the_whole_source_network():
    backbone = load()
    images = normalize(torch.from_numpy(clouds(5)), backbone.card.view())
    with torch.inference_mode():
        features, expected = backbone(images), backbone.source_logits(images)
    torch.testing.assert_close(source_logits(backbone, features), expected, rtol=0, atol=1e-6)
    many = features.repeat(500, 1)  # more than one block
    torch.testing.assert_close(source_logits(backbone, many), expected.repeat(500, 1), rtol=0, atol=1e-5)


def control(backbone, crops, labels, seed=0):
    view = backbone.card.view()
    return measure_control(backbone, crops, labels, view, num_classes=2, compute=PLAIN, seed=seed)


@pytest.mark.technique("T016")
def test_random_weights_tell_nothing_of_random_labels_but_see_what_is_plain():
    backbone, crops = load(), clouds(100)
    labels = torch.randint(2, (100,), generator=torch.Generator().manual_seed(3))
    chance = control(backbone, crops, labels)
    assert chance.low < 0.5 < chance.high
    assert chance.n == 100
    lit = np.where(labels.numpy()[:, None, None, None] == 1, crops + np.uint8(60), crops)
    assert control(backbone, lit, labels).value > 0.9


def test_the_control_draws_from_its_own_seed_and_leaves_all_else_alone():
    backbone, crops = load(), clouds(40)
    labels = torch.arange(40) % 2
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one = control(backbone, crops, labels, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert control(backbone, crops, labels, seed=1) == one
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in before.items())
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert control(backbone, crops, labels, seed=1) == one  # what pretraining left is not in it


@pytest.mark.slow
@pytest.mark.technique("T015")
@pytest.mark.technique("T016")
def test_sixteen_bit_grey_pictures_are_surveyed_and_found_far_from_photographs(tmp_path):
    """As X-rays come: one channel of 16 bits, half of the range used, little contrast in it."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:48, 0:48]
    for label, size in (("healthy", 6), ("ill", 12)):
        (tmp_path / label).mkdir()
        for number in range(20):
            x, y = random.uniform(16, 32, 2)
            blob = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * size**2))
            pixels = 15_000 + 12_000 * blob + random.normal(0, 300, (48, 48))
            Image.fromarray(pixels.astype(np.uint16)).save(tmp_path / label / f"{number:02}.png")
    facts = ft.survey(ft.load_recipe(str(tmp_path), ["data.image_size=32"]))
    assert facts.image_kinds == {"16-bit": 40}
    found = facts.similarity
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert [row.stage for row in found.shift] == list(facts.backbone.stages)
    assert all(math.isfinite(row.mean.value) and row.spread.value > 0 for row in found.shift)
    assert max(row.mean.value for row in found.shift) > 0.2  # photographs of pretraining give about 0
    assert found.response.named[0][1] > 0.4  # of ten classes of photographs, to one of which they mostly seem to belong
    assert found.control.n == facts.profile.num_images == sum(facts.counts["train"])
