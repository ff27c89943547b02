"""What a training starts from: a head that decides as the probe does, whatever the sizes of the classes."""

import math

import pytest
import torch
import torch.nn.functional as F
from made_facts import make_facts

from finetune.config.reading import load_recipe
from finetune.features.probing import fit_probe
from finetune.models.backbones import load_backbone
from finetune.planning.planner import make_plan
from finetune.training.losses import log_priors, make_loss
from finetune.training.setup import make_classifier, soften_probe

RATIOS = pytest.mark.parametrize("ratio", [1, 3, 10, 30, 100])
LARGEST = 400


def draw(counts, *, distance=1.0, seed=0):
    """Features (N, 8) of classes that lie `distance` apart, and labels (N,)."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    centers = distance * torch.eye(len(counts), 8)
    return centers[labels] + torch.randn(len(labels), 8, generator=random), labels


def solve(ratio, *, distance=1.0):
    """Images of three classes in long tail, the probe solved on them, and even test images."""
    counts = [LARGEST, round(LARGEST / math.sqrt(ratio)), LARGEST // ratio]
    images = draw(counts, distance=distance)
    probe = fit_probe(*images, num_classes=3, l2=0.01)
    return counts, images, probe, draw([300] * 3, distance=distance, seed=1)


def logits(start, features):
    return F.linear(features.double(), start["weight"], start["bias"])


@RATIOS
def test_what_is_judged_decides_as_the_probe_with_its_priors_taken_away_where_the_loss_adds_them(ratio):
    counts, _, probe, (features, _) = solve(ratio)
    start = soften_probe({"weight": probe.weight, "bias": probe.bias}, "logit_adjustment", counts)
    adjusted = probe.logits(features) - log_priors(counts)
    assert torch.equal(logits(start, features).argmax(1), adjusted.argmax(1))
    assert torch.equal(logits(start, features).argmax(1), probe.logits(features).argmax(1)) == (ratio == 1)


@RATIOS
@pytest.mark.parametrize("kind", ["none", "inverse", "effective", "sampler", "focal"])
def test_every_other_loss_starts_from_the_decisions_of_the_probe(ratio, kind):
    counts, _, probe, (features, _) = solve(ratio)
    start = soften_probe({"weight": probe.weight, "bias": probe.bias}, kind, counts)
    assert torch.equal(logits(start, features).argmax(1), probe.logits(features).argmax(1))


@RATIOS
@pytest.mark.parametrize("distance", [0.0, 1.0, 3.0])
def test_the_first_loss_is_at_most_that_of_naming_the_priors(ratio, distance):
    counts, (features, labels), probe, _ = solve(ratio, distance=distance)
    start = soften_probe({"weight": probe.weight, "bias": probe.bias}, "logit_adjustment", counts)
    priors = log_priors(counts)
    entropy = -float((priors.exp() * priors).sum())
    assert float(make_loss("logit_adjustment", counts)(logits(start, features), labels).mean()) <= entropy + 1e-9


@RATIOS
def test_where_images_say_nothing_the_start_judged_evenly_is_about_a_fair_guess(ratio):
    counts, _, probe, (features, labels) = solve(ratio, distance=0.0)
    start = soften_probe({"weight": probe.weight, "bias": probe.bias}, "logit_adjustment", counts)
    assert float(F.cross_entropy(logits(start, features), labels)) == pytest.approx(math.log(3), abs=0.05)


@pytest.mark.parametrize("kind", ["none", "logit_adjustment", "inverse"])
def test_a_training_begins_from_the_softened_probe(kind):
    counts, backbone = [90, 30, 3], load_backbone("test_resnet", zoo={}, pretrained=False)
    facts = make_facts().model_copy(update={"counts": {**make_facts().counts, "train": tuple(counts)}})
    plan = make_plan(load_recipe(None, ["train.strategy=full", f"train.imbalance.kind={kind}"]), facts)
    random = torch.Generator().manual_seed(0)
    probe = {
        "weight": torch.randn(3, backbone.num_features, generator=random),
        "bias": torch.randn(3, generator=random),
    }
    linear = make_classifier(plan, backbone, probe, counts).head.linear
    start = soften_probe(probe, kind, counts)
    torch.testing.assert_close(linear.weight, start["weight"])
    torch.testing.assert_close(linear.bias, start["bias"])
