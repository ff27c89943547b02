"""What a run computes with: decided once, with a reason, and refused in words where it cannot be had."""

import pytest
import torch

import finetune as ft
from finetune import preparing
from finetune.compute import Compute, Machine
from finetune.config.recipe import HardwareSpec
from finetune.errors import RecipeError, RunError

OFFERS = {
    "cpu": Machine(device="cpu", cores=4, has_bf16=False, has_fp16=False, can_fork=True),
    "old": Machine(device="cuda", cores=4, has_bf16=False, has_fp16=True, can_fork=True),
    "new": Machine(device="cuda", cores=4, has_bf16=True, has_fp16=True, can_fork=True),
    "mac": Machine(device="mps", cores=4, has_bf16=True, has_fp16=True, can_fork=False),
    "old mac": Machine(device="mps", cores=4, has_bf16=False, has_fp16=True, can_fork=False),
}
SMALL = ["backbone=test_resnet.r160_in1k", "pretrained=false", "train.strategy=full", "tracking.enabled=false"]


def quiet(text):
    pass


@pytest.fixture
def a_mac(monkeypatch):
    """A machine whose torch says that it has the GPU of a Mac."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: version <= (13, 3))


@pytest.mark.parametrize(
    ("offer", "devices", "precision", "device", "chosen", "why"),
    [
        ("cpu", "auto", "auto", "cpu", "32", "a CPU repeats 32-bit training to the last bit"),
        ("cpu", "auto", "bf16", "cpu", "bf16", "the recipe says so"),
        ("old", "auto", "auto", "cuda", "fp16", "the fastest this GPU trains well in is fp16"),
        ("new", "auto", "auto", "cuda", "bf16", "the fastest this GPU trains well in is bf16"),
        ("new", "cuda", "32", "cuda", "32", "the recipe says so"),
        ("new", "cpu", "auto", "cpu", "32", "a CPU repeats 32-bit training to the last bit"),
        ("mac", "auto", "auto", "mps", "32", "the GPU of a Mac trains in 32 bit"),
        ("mac", "mps", "bf16", "mps", "bf16", "the recipe says so"),
        ("mac", "cpu", "auto", "cpu", "32", "a CPU repeats 32-bit training to the last bit"),
    ],
)
def test_device_and_precision_are_decided_together(offer, devices, precision, device, chosen, why):
    found = Compute.decide(HardwareSpec(devices=devices, precision=precision), OFFERS[offer])
    assert (found.device, found.precision, found.why) == (device, chosen, why)


@pytest.mark.parametrize(
    ("offer", "devices", "precision", "told"),
    [
        ("cpu", "cuda", "auto", "hardware.devices is cuda, but torch sees no GPU here; use auto or cpu"),
        ("cpu", "mps", "auto", "hardware.devices is mps, but torch sees no GPU here; use auto or cpu"),
        ("new", "mps", "auto", "hardware.devices is mps, but torch sees cuda alone here"),
        ("mac", "cuda", "auto", "hardware.devices is cuda, but torch sees mps alone here"),
        ("cpu", "auto", "fp16", "needs a GPU; use 32 or bf16 on a CPU"),
        ("new", "cpu", "fp16", "needs a GPU; use 32 or bf16 on a CPU"),
        ("old", "auto", "bf16", "torch does not compute in bf16 on cuda here; use 32"),
        ("old mac", "auto", "bf16", "torch does not compute in bf16 on mps here; use 32"),
    ],
)
def test_what_is_not_here_is_refused_in_words(offer, devices, precision, told):
    with pytest.raises(RecipeError, match=told):
        Compute.decide(HardwareSpec(devices=devices, precision=precision), OFFERS[offer])


def test_a_device_that_is_not_here_is_refused_before_an_image_is_read(shapes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("finetune.data.dataset.Dataset.open", lambda *rest: pytest.fail("images were opened"))
    with pytest.raises(RecipeError, match="torch sees no GPU here"):
        preparing.plan(ft.load_recipe(str(shapes), [*SMALL, "hardware.devices=cuda"]), say=quiet)


def test_the_gpu_of_a_mac_is_asked_for_what_it_can(a_mac):
    found = Machine.here()
    assert (found.device, found.has_fp16, found.has_bf16) == ("mps", True, False)
    assert Machine.here("cpu").device == "cpu"
    assert Compute.decide(HardwareSpec()).device == "mps"


def test_a_plan_on_a_mac_says_what_and_why(shapes, a_mac):
    recipe = ft.load_recipe(str(shapes), SMALL)
    facts, _ = preparing.plan(recipe.model_copy(update={"hardware": HardwareSpec(devices="cpu")}), say=quiet)
    machine = facts.machine.model_copy(update={"device": "mps", "cores": 8, "can_fork": False})
    plan = ft.make_plan(recipe, facts.model_copy(update={"machine": machine}))
    assert (plan.hardware.devices, plan.hardware.precision, plan.hardware.workers) == ("mps", "32", 0)
    reasons = {reason.key: reason.why for reason in plan.reasons}
    assert reasons["hardware.devices"] == "torch sees mps"
    assert reasons["hardware.precision"] == "the GPU of a Mac trains in 32 bit"
    assert reasons["hardware.workers"].startswith("this system starts every loader process anew")
    assert plan.hardware.micro_batch == plan.train.batch_size  # only on a CPU is a step cut


def test_a_plan_for_a_gpu_trains_on_no_other_and_is_judged_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    decided = HardwareSpec(devices="cuda", precision="bf16")
    with pytest.raises(RunError, match=r"made for a GPU \(cuda\), and torch sees none such here"):
        Compute.of(decided)
    found = Compute.of(decided, or_cpu=True)
    assert (found.device, found.precision) == ("cpu", "bf16")


@pytest.mark.parametrize(("precision", "dtype"), [("32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_is_the_precision(precision, dtype):
    with Compute(device="cpu", precision=precision, why="").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
