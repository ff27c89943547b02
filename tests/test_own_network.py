"""Networks handed in as modules: the whole walk, what they are asked, and what is said where they are missing."""

import copy
import importlib
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

import finetune as ft
from finetune.config.backbone_names import default_backbone, read_zoo
from finetune.errors import BackboneError, RecipeError, RunError
from finetune.models.own import open_network

SMALL = ["data.image_size=32", "tracking.enabled=false"]
TRAINED = [
    "train.averaging.wise_ft=1",
    *SMALL,
    "train.strategy=partial",
    "train.epochs=1",
    "data.split.refit=false",
    "train.batch_norm=train",
    "train.optimizer.lr=0.00003",
]
VIEW = {"input_size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def quiet(text):
    """Nobody listens."""


class Plain(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2)
        self.body = nn.Conv2d(width, width, 3, 2)
        self.scale = nn.Parameter(torch.linspace(0, 1, width))
        self.last = nn.Linear(width, 5)

    def features(self, images):
        return self.scale * self.body(self.stem(images).relu()).relu().mean((2, 3))

    def forward(self, images):
        return self.last(self.features(images))


class Timmish(Plain):
    """It answers as timm's do, and has nothing else of them."""

    def forward_features(self, images):
        return self.body(self.stem(images).relu()).relu()

    def forward_head(self, features, pre_logits=False):
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.last(pooled)


class Pair(Plain):
    def forward(self, images):
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


def seeded(make, *options, **more):
    torch.manual_seed(0)
    return make(*options, **more)


def resnet():
    return seeded(torchvision.models.resnet18)


def handed(module=None, head="fc", **more):
    return ft.Network(module or resnet(), head=head, **{**VIEW, **more})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("own") / "runs"


@pytest.fixture(scope="module")
def run(shapes, runs):
    return ft.train(shapes, [*TRAINED, "name=own"], model=handed(), runs=runs, say=quiet)


@pytest.mark.slow
def test_the_bundled_backbone_handed_in_is_trained_as_by_its_name(shapes, runs):
    card = read_zoo()[default_backbone()]
    module = timm.create_model(card.arch, **card.arch_kwargs, num_classes=card.num_classes)
    module.load_state_dict(load_file(card.weights))
    view = {"mean": card.mean, "std": card.std, "interpolation": card.interpolation, "crop_pct": card.crop_pct}
    own = ft.Network(module, input_size=card.input_size[1], classes=card.classes, **view)
    by_hand = ft.train(shapes, [*TRAINED, "name=hand"], model=own, runs=runs, say=quiet)
    by_name = ft.train(shapes, [*TRAINED, f"backbone={card.name}"], runs=runs, say=quiet)
    for what in ("val", "test", "probe"):
        assert getattr(by_hand.scores, what) == getattr(by_name.scores, what) is not None
    assert by_hand.final_weights().read_bytes() == by_name.final_weights().read_bytes()
    known, named = by_hand.facts, by_name.facts
    for what in ("probe", "knn", "view", "similarity"):
        ours, theirs = getattr(known, what), getattr(named, what)
        if what == "similarity":  # but for the control, which is drawn by another rule
            ours, theirs = (one.model_dump(exclude={"control"}) for one in (ours, theirs))
        assert ours == theirs, what
    assert known.backbone.stages == named.backbone.stages


def test_a_plain_module_walks_the_whole_way(run, shapes):
    assert run.path.name.startswith("own-ResNet-")
    assert run.scores.test.top1.n and run.report.is_file()
    (thing,) = run.plan.own
    assert (thing.argument, thing.name) == ("model", "torchvision.models.resnet.ResNet")
    assert thing.digest == run.plan.weights_digest == open_network(handed()).digest
    assert run.plan.backbone == "ResNet" and run.plan.stages[0].name == "partial"
    misses = [ft.survey(shapes, SMALL, model=handed(), say=quiet).features["misses"] for _ in range(2)]
    assert misses == [72, 0]  # known by its weights


def test_yours_stays_as_it_is(shapes, runs):
    module = seeded(Plain).train()
    before = copy.deepcopy(module.state_dict())
    wish = [*SMALL, "train.strategy=full", "train.epochs=1"]
    done = ft.train(shapes, wish, model=handed(module, "last"), runs=runs, say=quiet)
    assert module.training and isinstance(module.last, nn.Linear)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert not torch.equal(
        load_file(done.file("model.safetensors"))["backbone.model.body.weight"], before["body.weight"]
    )


@pytest.mark.slow
def test_a_run_needs_its_network_again_and_says_so(run, shapes, monkeypatch):
    image = next(shapes.rglob("*.png"))
    fresh = ft.load_run(run.path)
    words = (
        r"holds the weights of torchvision.models.resnet.ResNet, a network that was handed in .*load_run\(run, model"
    )
    for ask in (lambda: fresh.model, lambda: ft.predict(run.path, image)):
        with pytest.raises(BackboneError, match=words):
            ask()
    torch.manual_seed(1)
    other = torchvision.models.resnet18()  # other weights: only its layers matter
    known = ft.predict(run, image)[0]
    assert ft.predict(run.path, image, model=handed(other))[0] == known
    assert ft.predict(ft.load_run(run.path, model=handed(other)), image)[0] == known
    with pytest.raises(
        BackboneError, match=r"does not fit own/torchvision.*hand in the network that it was begun with"
    ):
        ft.predict(run.path, image, model=handed(Plain(), "last"))
    assert ft.evaluate(run, model=handed(), say=quiet).test == run.scores.test
    assert ft.resume(run, model=handed(), say=quiet).path == run.path
    begun = r"begun with torchvision.models.resnet.ResNet \([0-9a-f]{12}\) for model \(the network\)"
    for verb in (ft.resume, ft.evaluate):
        with pytest.raises(RunError, match=rf"{begun}, and gets none now. Hand in the same: finetune.\w+\(run, model="):
            verb(run.path, say=quiet)
        with pytest.raises(
            RunError, match=rf"{begun}, and gets torchvision.models.resnet.ResNet \([0-9a-f]{{12}}\) now"
        ):
            verb(run.path, model=handed(other), say=quiet)


def test_a_run_of_a_named_backbone_wants_no_module(shapes, runs):
    named = ft.train(shapes, [*SMALL, "train.strategy=probe"], runs=runs, say=quiet)
    with pytest.raises(RunError, match="which it can build; leave model= out"):
        ft.load_run(named, model=handed())
    with pytest.raises(RunError, match=r"begun with none for model .*ResNet \([0-9a-f]{12}\) now. Leave model= out"):
        ft.resume(named, model=handed(), say=quiet)


@pytest.mark.slow
def test_its_plan_runs_with_it_alone(run, runs):
    with pytest.raises(RunError, match=r"run of this plan was begun with torchvision.*for model .*gets none now"):
        ft.train(run.plan, runs=runs, say=quiet)
    again = ft.train(run.plan, model=handed(), runs=runs, say=quiet)
    assert again.final_weights().read_bytes() == run.final_weights().read_bytes()
    assert again.scores.test == run.scores.test and again.plan == run.plan


def test_where_it_cannot_serve_it_says_so(run, shapes, runs):
    with pytest.raises(BackboneError, match="was handed in from Python, and only its weights are kept"):
        ft.train(shapes, [*SMALL, f"backbone={run.path}"], runs=runs, say=quiet)
    with pytest.raises(BackboneError, match="holds the weights of torchvision"):
        ft.train(shapes, [*SMALL, f"train.distillation.teacher={run.path}"], runs=runs, say=quiet)


def test_another_run_can_begin_from_what_was_trained(run, shapes):
    trained = ft.Network(run.model.backbone.model, head="", **VIEW)
    facts = ft.survey(shapes, [*SMALL, "train.strategy=probe"], model=trained, say=quiet)
    assert facts.backbone.num_features == 512
    assert facts.backbone.weights_digest != run.plan.weights_digest


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_weights(run, shapes):
    before = run.final_weights().read_bytes()
    for path in (
        run.final_weights(),
        run.stage_folder(0) / "last.ckpt",
        run.file("scores.json"),
        run.file("card.yaml"),
    ):
        path.unlink()
    ft.resume(run, model=handed(), say=quiet)
    assert run.final_weights().read_bytes() == before


def test_a_timm_module_needs_no_words(shapes):
    module = seeded(timm.create_model, "test_resnet.r160_in1k", num_classes=1000)
    facts = ft.survey(shapes, [*SMALL, "train.strategy=probe"], model=module, say=quiet)
    cfg = module.pretrained_cfg
    assert facts.backbone.name == "test_resnet.r160_in1k" and facts.backbone.input_size == 160
    assert facts.view.mean == tuple(cfg["mean"]) and facts.view.interpolation == cfg["interpolation"]
    assert facts.backbone.num_features == module.head_hidden_size
    assert open_network(module).source_head is not None
    assert (
        open_network(timm.create_model("test_resnet", num_classes=7)).source_head is None
    )  # a head that knows nothing


@pytest.mark.parametrize(
    ("module", "head", "width"),
    [
        (seeded(Plain), "last", 8),
        (seeded(Timmish), None, 8),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "", 6),
        (torchvision.models.mobilenet_v3_small(), "classifier.3", 1024),
        (torchvision.models.mobilenet_v3_small(), "classifier", 576),
        (torchvision.models.vit_b_16(image_size=32), "heads", 768),
    ],
    ids=["plain", "as timm's", "no head", "the last of a classifier", "all of a classifier", "transformer"],
)
def test_heads_are_taken_off(module, head, width):
    backbone = open_network(handed(module, head))
    assert backbone.num_features == width and backbone(torch.zeros(2, 3, 32, 32)).shape == (2, width)
    assert len(backbone.stages) >= 1 and not backbone.training
    assert not any("last" in name or name.endswith("classifier.3.weight") for name, _ in backbone.named_parameters())


def test_what_a_head_knows_is_asked_where_its_classes_are_told():
    assert open_network(handed(Plain(), "last")).source_head is None
    knowing = open_network(handed(seeded(Plain), "last", classes=tuple("abcde")))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(knowing.source_logits(images), seeded(Plain).eval()(images))


def test_a_digest_is_of_weights_layers_and_own_code():
    first = open_network(handed(seeded(Plain), "last")).digest
    assert open_network(handed(seeded(Plain), "last")).digest == first
    moved = seeded(Plain)
    with torch.no_grad():
        moved.scale[0] += 1
    other = nn.Sequential(nn.Identity(), seeded(Plain))
    assert len({first, open_network(handed(moved, "last")).digest, open_network(handed(other, "1.last")).digest}) == 3


def test_a_class_that_computes_otherwise_is_another(tmp_path, monkeypatch):
    """The same weights and layers under other code: features in the cache are not those of this network."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    digests = []
    for power in (1, 2, 1):
        (tmp_path / "own_net.py").write_text(
            "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.stem = nn.Conv2d(3, 4, 3)\n    def forward(self, x):\n"
            f"        return self.stem(x).mean((2, 3)) ** {power}\n"
        )
        monkeypatch.delitem(sys.modules, "own_net", raising=False)
        digests.append(open_network(handed(seeded(importlib.import_module("own_net").Net), "")).digest)
    assert digests[0] == digests[2] != digests[1]


def test_what_is_frozen_stays_so_but_for_all():
    some = seeded(Plain)
    some.stem.requires_grad_(False)
    assert open_network(handed(some, "last")).fixed_names == {"model.stem.weight", "model.stem.bias"}
    assert not open_network(handed(seeded(Plain).requires_grad_(False), "last")).fixed_names


def test_a_twin_knows_nothing():
    backbone = open_network(handed(seeded(Plain), "last"))
    twin = backbone.random_twin()
    assert not torch.equal(twin.model.stem.weight, backbone.model.stem.weight)
    assert not torch.equal(twin.model.scale, backbone.model.scale)
    torch.testing.assert_close(twin.model.scale.sort()[0], backbone.model.scale.sort()[0])
    assert twin.stages == backbone.stages and twin.source_head is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: SimpleNamespace(), r"model= is a SimpleNamespace; give a torch.nn.Module"),
        (lambda: Plain(), r"does not tell how it wants its images.*finetune.Network\(module, head='fc', input_size"),
        (
            lambda: handed(Plain(), None),
            r"which of its layers is the head. Its last linear layer is 'last', from 8 to 5",
        ),
        (lambda: handed(Plain(), "lost"), r"has no layer 'lost' to be its head. Nearest: last"),
        (lambda: handed(Plain(), "body"), r"'body' does not give the answer of Plain: .* linear layer is 'last'"),
        (lambda: handed(torchvision.models.resnet18(), "avgpool"), "'avgpool' does not give the answer"),
        (lambda: handed(Pair(), ""), r"makes a tuple of 2 images in training, and not a row of features"),
        (lambda: handed(nn.Sequential(nn.Conv2d(3, 4, 3)), ""), r"makes \(2, 4, 30, 30\) of 2 images"),
        (lambda: handed(nn.Sequential(nn.Conv2d(1, 4, 3)), ""), r"cannot look at images \(2, 3, 32, 32\)"),
        (lambda: handed(Plain(), "last", classes=("a", "b")), "classes names 2, and no layer has as many outputs"),
        (lambda: handed(Plain(), "last", interpolation="cubic"), "interpolation is 'cubic'"),
    ],
)
def test_what_cannot_be_a_backbone_is_told(model, message):
    with pytest.raises(BackboneError, match=message):
        open_network(model())


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("backbone=resnet18", "backbone is resnet18, and model= hands in another"),
        ("pretrained=false", "give it random ones instead"),
        ("head.init=model", "does not say how it draws its head"),
    ],
)
def test_wishes_that_only_a_name_can_fulfil_are_refused(shapes, wish, message):
    with pytest.raises(RecipeError, match=message):
        ft.plan(shapes, [wish], model=handed(), say=quiet)
