"""Images pass through the network in pieces: who decides, what stays the same, and what is given back."""

import platform
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from made_classifiers import ShortOfMemory, _module, tiny_classifier
from made_facts import make_facts

from finetune.compute import PLAIN
from finetune.config.card import View
from finetune.config.plan import read_plan
from finetune.config.reading import load_recipe
from finetune.errors import RecipeError
from finetune.features.extraction import look_at, look_at_all
from finetune.planning.planner import make_plan
from finetune.training.losses import make_loss
from finetune.training.mixup import Mixing
from finetune.training.module import Step

IMAGES, LABELS = torch.randn(19, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(19) % 3


def plan_of(*wishes, size_pixels=224, **facts):
    made = make_facts(**facts)
    made = made.model_copy(update={"view": replace(made.view, size_pixels=size_pixels)})
    return make_plan(load_recipe(None, ["data.root=/x", "train.strategy=full", *wishes]), made)


def reasons_of(plan):
    return [reason.why for reason in plan.reasons if reason.key == "hardware.micro_batch"]


def test_a_step_on_a_cpu_is_cut_where_batch_norm_is_frozen_and_the_plan_says_why():
    plan = plan_of()
    assert plan.hardware.micro_batch == 12
    (why,) = reasons_of(plan)
    assert "12 images of 224 px at a time take less memory than 64" in why and "gradient of a step is the same" in why
    assert plan_of(size_pixels=448).hardware.micro_batch == 3
    assert plan_of("train.batch_norm=train", has_batch_norm=False).hardware.micro_batch == 12
    assert plan_of(size_pixels=2000).hardware.micro_batch == 1


@pytest.mark.parametrize(
    ("wishes", "facts"),
    [
        (["train.batch_norm=train"], {}),
        (["train.batch_norm=statistics"], {}),
        ([], {"device": "cuda"}),
        ([], {"size_pixels": 96}),
    ],
)
def test_where_nothing_is_to_be_cut_a_step_stays_whole_without_a_word(wishes, facts):
    plan = plan_of(*wishes, **facts)
    assert plan.hardware.micro_batch == plan.train.batch_size == 64 and not reasons_of(plan)


def test_what_the_recipe_says_is_taken_and_what_would_change_the_gradient_is_refused():
    plan = plan_of("hardware.micro_batch=5")
    assert plan.hardware.micro_batch == 5 and reasons_of(plan) == ["the recipe says so"]
    assert plan_of("hardware.micro_batch=0").hardware.micro_batch == 0
    for size in (0, 64, 99):
        assert plan_of(f"hardware.micro_batch={size}", "train.batch_norm=train").hardware.micro_batch == size
    with pytest.raises(RecipeError, match=r"micro_batch is 63, .* statistics from all 64 images .* to frozen"):
        plan_of("hardware.micro_batch=63", "train.batch_norm=train")


def test_plans_of_older_versions_pass_whole_steps(tmp_path):
    found = yaml.safe_load(plan_of().to_yaml())
    del found["hardware"]["micro_batch"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(found))
    assert read_plan(tmp_path / "plan.yaml").hardware.micro_batch == 0


def stepped(size, kind, *, smoothing, mixing):
    """Classifier after the backward pass of one step, and what was summed."""
    module = _module(tiny_classifier(), [])
    counts = [9, 6, 4]
    step = Step(
        loss=make_loss(kind, counts, smoothing=smoothing), factor=lambda step: 1.0, clip_norm=1e9, seed=3, mixing=mixing
    )
    module._step, module.micro_batch = step, size
    module._descend = lambda images, targets: (*module._accumulate(images, targets), 0.0)
    module.training_step((IMAGES, LABELS, LABELS), 0)
    return module.classifier, module.take_totals()


@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize(
    ("kind", "smoothing", "mixing"),
    [
        ("none", 0.0, None),
        ("inverse", 0.0, None),
        ("focal", 0.1, None),
        ("inverse", 0.1, Mixing(mixup=1.0, cutmix=0.0, num_classes=3)),
        ("none", 0.0, Mixing(mixup=0.0, cutmix=1.0, num_classes=3)),
    ],
)
def test_pieces_have_the_gradient_of_the_whole_step(size, kind, smoothing, mixing):
    (whole, all_at_once), (cut, in_pieces) = (
        stepped(at_once, kind, smoothing=smoothing, mixing=mixing) for at_once in (None, size)
    )
    assert in_pieces == pytest.approx(all_at_once, rel=1e-5)
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
        assert one.grad.abs().max() > 1e-3


def test_pieces_are_of_nearly_equal_size():
    module, sizes = _module(tiny_classifier(), []), []
    module.classifier.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    module.micro_batch = 6
    module._accumulate(IMAGES, LABELS)
    assert sizes == [5, 5, 5, 4]


def test_a_batch_norm_that_reads_the_batch_is_never_cut_by_a_plan():
    gradients = []
    for size in (None, 5):
        module = _module(tiny_classifier(batch_norm="train"), said := [])
        module.micro_batch = size
        module._accumulate(IMAGES, LABELS)
        gradients.append(module.classifier.backbone.stem.weight.grad)
    assert torch.equal(*gradients)
    assert said == ["a batch norm here normalises by the images at hand, so all of a step pass at once"]


def test_short_memory_halves_what_the_plan_says():
    module = _module(tiny_classifier(), said := [])
    module.classifier, module.micro_batch = ShortOfMemory(module.classifier, 5), 8
    module._accumulate(IMAGES, LABELS)
    assert module.micro_batch == 4 and said[0].startswith("out of memory at 8 images: going on with 4 at a time")


@pytest.mark.parametrize(("pixels", "passes"), [(224, [16, 16]), (112, [64]), (450, [2] * 10)])
def test_frozen_features_are_extracted_in_passes_of_one_size(pixels, passes):
    sizes, constants = [], {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    view = View(size_pixels=pixels, shorter_pixels=pixels, interpolation="bilinear", **constants)

    def backbone(images):
        sizes.append(len(images))
        return [images.mean((2, 3)), images.amax((2, 3))]

    crops = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, pixels, pixels, 3), dtype=np.uint8)
    depths = look_at(backbone, crops, view, PLAIN)
    assert sizes == passes
    expected = torch.arange(20)[:, None].expand(20, 3) / 255 / 0.5 - 1
    for depth in depths:
        torch.testing.assert_close(depth, expected, rtol=0, atol=1e-5)
    assert all(map(torch.equal, look_at_all(backbone, crops[7:8], view, PLAIN), [d[7:8] for d in depths]))


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_freed_memory_is_kept_until_it_is_given_back():
    """In a process of its own, whose heap has no holes that others left."""
    code = """
from pathlib import Path
import numpy as np
from finetune.compute import give_back_memory
from finetune.process import tune_process

def resident_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))

tune_process()
before = resident_mb()
held = [np.ones(5_000_000) for _ in range(5)]  # 40 MB each
last = np.ones(100_000)  # above them on the heap
del held
kept = resident_mb()
give_back_memory()
print(kept - before, resident_mb() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, left = map(float, done.stdout.split())
    assert kept > 150 and left < 50
