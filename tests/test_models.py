"""Backbones, heads, and what frozen means, on the four families of network that people fine-tune."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.errors import BackboneError
from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import make_head
from finetune.recipe.shelf import default_backbone, read_zoo

FAMILIES = ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"]
PIXELS = {"test_vit": 160}


def random_backbone(name):
    torch.manual_seed(0)
    return load_backbone(name, zoo={}, pretrained=False)


def make_classifier(name, num_classes=3):
    backbone = random_backbone(name)
    return Classifier(backbone, make_head(backbone.num_features, num_classes, init="small"))


def pictures(name, count=6):
    pixels = PIXELS.get(name, 64)
    return torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


def train_an_epoch(classifier, name):
    """Three steps of SGD with momentum and weight decay, which would move whatever they could reach."""
    moving = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=0.1, momentum=0.9, weight_decay=0.1)
    classifier.train()
    for _ in range(3):
        loss = F.cross_entropy(classifier(pictures(name)), torch.arange(6) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return moving


def tensors_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.technique("T004")
@pytest.mark.technique("T072")
@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_frozen_backbone_is_bit_identical_after_an_epoch(name, batch_norm):
    classifier = make_classifier(name)
    classifier.freeze(0, batch_norm=batch_norm)
    before, head = tensors_of(classifier.backbone), tensors_of(classifier.head)
    moving = train_an_epoch(classifier, name)
    for key, value in classifier.backbone.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert {id(p) for p in moving} == {id(p) for p in classifier.head.parameters()}
    assert not torch.equal(classifier.head.linear.weight, head["linear.weight"])
    assert not any(module.training for module in classifier.backbone.modules())


@pytest.mark.technique("T007")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_top_stages_train_and_everything_below_is_bit_identical(name):
    classifier = make_classifier(name)
    total = len(classifier.backbone.stages)
    classifier.freeze(1, batch_norm="train")
    stage_of, before = classifier.backbone.stage_of, tensors_of(classifier.backbone)
    expected = {key for key, _ in classifier.backbone.named_parameters() if stage_of[key] == total - 1}
    assert {n.removeprefix("backbone.") for n in classifier.trainable_names() if n.startswith("backbone.")} == expected
    train_an_epoch(classifier, name)
    after = classifier.backbone.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in after if stage_of[key] < total - 1)
    assert sum(not torch.equal(after[key], before[key]) for key in expected) > len(expected) / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_cover_every_tensor_and_can_all_train(name):
    backbone = random_backbone(name)
    tensors = [*dict(backbone.named_parameters()), *dict(backbone.named_buffers())]
    assert set(tensors) == set(backbone.stage_of)
    assert set(backbone.stage_of.values()) == set(range(len(backbone.stages)))
    assert 3 <= len(backbone.stages) <= 16
    classifier = Classifier(backbone, make_head(backbone.num_features, 3))
    classifier.freeze(len(backbone.stages), batch_norm="train")
    assert set(classifier.trainable_names()) == {name for name, _ in classifier.named_parameters()}


@pytest.mark.technique("T067")
def test_batch_norm_keeps_its_statistics_in_trained_stages_unless_told_otherwise():
    for batch_norm, moves in (("frozen", False), ("train", True)):
        classifier = make_classifier("test_resnet")
        classifier.freeze(len(classifier.backbone.stages), batch_norm=batch_norm)
        before = {key: value for key, value in tensors_of(classifier).items() if "running" in key}
        train_an_epoch(classifier, "test_resnet")
        after = classifier.state_dict()
        assert len(before) > 4
        assert any(not torch.equal(after[key], value) for key, value in before.items()) == moves
        scales = [m.weight for m in classifier.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(scale.requires_grad for scale in scales)


def test_a_user_who_calls_train_thaws_nothing():
    classifier = make_classifier("test_resnet")
    classifier.freeze(1)
    classifier.eval()
    classifier.train()
    norms = [m for m in classifier.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert classifier.head.training


@pytest.mark.parametrize("name", FAMILIES)
def test_one_image_scores_the_same_in_any_batch(name):
    classifier = make_classifier(name).eval()
    images = pictures(name)
    with torch.inference_mode():
        together, alone = classifier(images), torch.cat([classifier(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.technique("T003")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_head_has_the_new_classes_and_leaves_the_rest_as_it_was(name):
    backbone = random_backbone(name)
    before = tensors_of(backbone)
    classifier = Classifier(backbone, make_head(backbone.num_features, 7, init="zero"))
    with torch.inference_mode():
        logits = classifier(pictures(name))
    assert logits.shape == (6, 7)
    assert float(F.cross_entropy(logits, torch.arange(6))) == pytest.approx(math.log(7), abs=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.technique("T054")
def test_a_small_head_is_small_and_a_probe_head_is_the_probe():
    head = make_head(1000, 100, init="small")
    assert float(head.linear.weight.std()) == pytest.approx(0.01, rel=0.02)
    weight, bias = torch.randn(3, 8), torch.randn(3)
    head, features = make_head(8, 3, init="probe", weight=weight, bias=bias), torch.randn(5, 8)
    torch.testing.assert_close(head(features), features @ weight.T + bias)


def test_a_model_head_follows_the_rule_of_its_architecture():
    backbone = random_backbone("test_vit")
    own = backbone.new_classifier(50)
    torch.manual_seed(3)
    head = make_head(backbone.num_features, 50, init="model", arch_rule=backbone.new_classifier)
    assert float(head.linear.weight.std()) == pytest.approx(float(own.weight.std()), rel=0.1)


def test_head_wishes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="go with init 'probe'"):
        make_head(8, 3, init="probe")
    with pytest.raises(ValueError, match="do not fit a head"):
        make_head(8, 3, init="probe", weight=torch.zeros(3, 9), bias=torch.zeros(3))
    with pytest.raises(ValueError, match="init must be one of"):
        make_head(8, 3, init="magic")


@pytest.mark.technique("T140")
def test_two_looks_are_bitwise_equal_even_with_dropout():
    backbone = random_backbone("test_resnet")
    classifier = Classifier(backbone, make_head(backbone.num_features, 3, init="small", dropout=0.5))
    images = pictures("test_resnet")
    classifier.eval()
    assert torch.equal(classifier(images), classifier(images))
    classifier.train()
    assert not torch.equal(classifier(images), classifier(images))


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv2_100", "torchvision/resnet18", "torchvision/mobilenet_v3_small"]
)
def test_features_are_those_before_the_classifier(name):
    backbone = random_backbone(name)
    with torch.inference_mode():
        features = backbone.eval()(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, backbone.num_features)
    assert 1 < backbone.num_features <= 1280


@pytest.mark.technique("T001")
@pytest.mark.parametrize(
    "name", ["resnet18.a1_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "mobilenetv3_large_100.ra_in1k"]
)
def test_the_contract_of_a_timm_name_is_timms_own(name):
    card = random_backbone(name).card
    own = timm.data.resolve_model_data_config(timm.create_model(name, pretrained=False), use_test_size=False)
    assert (card.mean, card.std, card.input_size) == (own["mean"], own["std"], own["input_size"])
    assert (card.interpolation, card.crop_pct) == (own["interpolation"], own["crop_pct"])


def test_a_missing_weight_is_one_paragraph_that_names_what_can_be_done(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackboneError) as caught:
        load_backbone("resnet18.a1_in1k", zoo=read_zoo())
    text = str(caught.value)
    assert "resnet18.a1_in1k" in text
    assert "safetensors" in text
    assert default_backbone() in text
    assert "\n\n" not in text


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(BackboneError, match="resnet50"):
        load_backbone("resnet_50", zoo={})


def damaged_zoo(tmp_path, change):
    from dataclasses import replace

    card = read_zoo()[default_backbone()]
    state = load_file(card.weights)
    change(state)
    save_file(state, tmp_path / "weights.safetensors")
    return {card.name: replace(card, weights=tmp_path / "weights.safetensors", sha256=None)}, card.name


def test_weights_of_another_network_are_refused(tmp_path):
    zoo, name = damaged_zoo(tmp_path, lambda state: state.pop("layer4.1.bn2.weight"))
    with pytest.raises(BackboneError, match=r"layer4\.1\.bn2\.weight"):
        load_backbone(name, zoo=zoo)


def test_a_flipped_byte_is_found(tmp_path):
    from dataclasses import replace

    card = read_zoo()[default_backbone()]
    whole = bytearray(card.weights.read_bytes())
    whole[-1] ^= 1
    (tmp_path / "w.safetensors").write_bytes(whole)
    with pytest.raises(BackboneError, match=r"w\.safetensors.*sha256"):
        load_backbone(card.name, zoo={card.name: replace(card, weights=tmp_path / "w.safetensors")})


def test_random_weights_follow_the_seed_and_touch_no_file():
    one, same = random_backbone("test_resnet"), random_backbone("test_resnet")
    assert one.weights_digest == same.weights_digest
    torch.manual_seed(1)
    assert load_backbone("test_resnet", zoo={}, pretrained=False).weights_digest != one.weights_digest


def test_the_source_head_is_neither_trained_nor_saved():
    backbone = load_backbone(default_backbone(), zoo=read_zoo())
    assert backbone.source_logits(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert not any("fc" in name for name in backbone.state_dict())
    clone = copy.deepcopy(backbone)
    assert clone.weights_digest == backbone.weights_digest


@pytest.mark.shared
@pytest.mark.technique("T001")
def test_shared_backbones_give_the_logits_of_the_plain_snippet(shared, monkeypatch):
    import yaml

    monkeypatch.setenv("FINETUNE_ZOO", str(shared / "zoo"))
    folders = sorted(path.parent for path in (shared / "zoo").glob("*/card.yaml"))
    assert len(folders) == 4
    for folder in folders:
        card = yaml.safe_load((folder / "card.yaml").read_text())
        model = timm.create_model(card["arch"], num_classes=card["num_classes"], **card["arch_kwargs"])
        model.load_state_dict(load_file(folder / "weights.safetensors"))
        images = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.inference_mode():
            want = model.eval()(images)
            got = load_backbone(folder.name, zoo=read_zoo()).eval().source_logits(images)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
