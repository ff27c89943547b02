"""Timed steps leave no trace, cost more the more they train, and forecasts are their arithmetic."""

import numpy as np
import pytest
import torch
from made_facts import make_facts

from finetune.compute import PLAIN
from finetune.config.backbone_names import default_backbone, read_zoo
from finetune.config.facts import TeacherFacts, TimingFacts
from finetune.config.reading import load_recipe
from finetune.features import timing
from finetune.features.timing import NORMS, time_training
from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.planning.cost import EPOCH_SECONDS, START_SECONDS, predict_memory, predict_seconds
from finetune.planning.planner import make_plan

CROPS = np.random.default_rng(0).integers(0, 255, (10, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(default_backbone(), zoo=read_zoo()).eval()


def timed(backbone, batch_size=16, depths=(2, 5)):
    view = backbone.card.view(size_pixels=32)
    return time_training(backbone, CROPS, view, num_classes=3, depths=depths, batch_size=batch_size, compute=PLAIN)


def test_timing_teaches_the_backbone_nothing(backbone):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in backbone.parameters()]
    timed(backbone)
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert [parameter.requires_grad for parameter in backbone.parameters()] == wanted
    assert not backbone.training
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_every_depth_and_the_norms_are_timed(backbone):
    forward, rows = timed(backbone)
    assert [row.trains for row in rows] == ["2", "5", NORMS]
    assert all(0 < row.images_per_second < forward for row in rows)


def test_more_trained_stages_keep_more(backbone):
    _, (part, whole, norms) = timed(backbone)
    assert part.memory_mb < whole.memory_mb
    assert norms.memory_mb < whole.memory_mb  # the same activations at most, and hardly any optimizer state


def test_memory_is_what_the_backward_pass_really_keeps(backbone):
    """Against the allocator's own count of one step, in which gradients and two moments are made too."""
    _, rows = timed(backbone, batch_size=64, depths=(5,))
    classifier = Classifier(backbone, torch.nn.Linear(backbone.num_features, 3))
    classifier.freeze(5)
    images = torch.randn(64, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = torch.nn.functional.cross_entropy(classifier(images), torch.arange(64) % 3)
    held = sum(event.self_cpu_memory_usage for event in profile.key_averages())  # still allocated after the forward
    own = 12 * sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad)
    assert rows[0].memory_mb == pytest.approx((held + images.nbytes + own) / 1e6, rel=0.3)
    del loss


def test_memory_of_a_batch_does_not_depend_on_how_many_images_were_timed(backbone, monkeypatch):
    _, whole = timed(backbone, batch_size=64, depths=(5,))
    monkeypatch.setattr(timing, "SECONDS", 1e-6)  # two images
    _, rows = timed(backbone, batch_size=64, depths=(5,))
    assert rows[0].memory_mb == pytest.approx(whole[0].memory_mb, rel=0.05)


def forecast_facts():
    timing = (
        TimingFacts(trains="2", images_per_second=200, memory_mb=50),
        TimingFacts(trains="5", images_per_second=100, memory_mb=90, image_mb=1.0, batch_size=64),
    )
    facts = make_facts(per_class=500, calibration=60, val=70)  # 1,500 train, 210 val, 60 calibration, 210 test
    return facts.model_copy(update={"timing": timing, "forward_images_per_second": 300.0})


def test_seconds_are_epochs_of_steps_and_looks_at_val():
    facts = forecast_facts()
    expected = START_SECONDS + 4 * (1500 / 100 + 210 / 300 + EPOCH_SECONDS) + 210 / 300 + (210 + 60 + 210) / 300
    assert predict_seconds(facts, trains="5", epochs=4) == pytest.approx(expected)
    known = TeacherFacts(
        run="runs/teacher", networks=3, weights_digest="0", split_digest="0", classes=facts.classes, view=facts.view,
        crop_pct=1.0, imbalances=("none",),
    )  # fmt: skip
    beside = facts.model_copy(update={"teacher": known})
    assert predict_seconds(beside, trains="5", epochs=4) == pytest.approx(expected + 4 * 1500 * 3 / 300)
    assert predict_seconds(beside, trains="0", epochs=4) == 0
    assert predict_seconds(facts, trains="2", epochs=4) < expected
    assert predict_seconds(facts, trains="0", epochs=4) == 0
    assert predict_seconds(facts, trains="3", epochs=4) is None


def test_memory_is_that_of_the_images_that_pass_at_once():
    facts = forecast_facts()
    assert predict_memory(facts, trains="5", at_once=64) == predict_memory(facts, trains="5", at_once=99) == 90
    assert predict_memory(facts, trains="5", at_once=16) == 90 - 48
    assert predict_memory(facts, trains="2", at_once=16) == 50  # of an older version, which counted no image
    assert predict_memory(facts, trains="0", at_once=16) == 0
    assert predict_memory(facts, trains="3", at_once=16) is None
    told = {}
    for wish in ("hardware.micro_batch=8", "hardware.micro_batch=0", "hardware.micro_batch=null"):
        for mode in ("frozen", "train"):
            wishes = ["data.root=/x", f"train.batch_norm={mode}", "train.strategy=probe", wish]
            rows = make_plan(load_recipe(None, wishes), facts).advice.forecasts
            told[wish[21:], mode] = next(row.memory_mb for row in rows if row.strategy == "full")
    assert told == {
        ("8", "frozen"): 34, ("0", "frozen"): 90, ("null", "frozen"): 90 - 64 + 36,
        ("8", "train"): 90, ("0", "train"): 90, ("null", "train"): 90,
    }  # fmt: skip
