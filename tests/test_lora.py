"""Low-rank adapters: nothing changes at the start, only they train, and they melt into the weights at the end."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune.config.card import Card
from finetune.errors import BackboneError
from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import make_head
from finetune.models.lora import LowRankLinear, add_lora, merge_lora

IMAGES = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def load(name="test_vit"):
    torch.manual_seed(0)
    return load_backbone(name, zoo={}, pretrained=False).eval()


def with_trained_adapters(**options):
    """A backbone whose adapters have moved away from zero, and the backbone as it was."""
    backbone = load()
    plain = copy.deepcopy(backbone)
    add_lora(backbone, **options)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.1)
    return backbone, plain


@torch.no_grad()
def features(backbone):
    return backbone(IMAGES)


def test_at_the_start_features_are_those_of_the_base_bit_for_bit():
    backbone = load()
    before = features(backbone)
    add_lora(backbone, rank=4)
    assert torch.equal(features(backbone), before)


def test_trained_numbers_are_rank_times_in_plus_out_of_every_target():
    backbone = load()
    layers = [module for name, module in backbone.named_modules() if name.endswith(("attn.qkv", "mlp.fc1"))]
    expected = sum(3 * (layer.in_features + layer.out_features) for layer in layers)
    assert len(layers) == 12
    added = add_lora(backbone, rank=3, targets=("qkv", "fc1"))
    model = Classifier(backbone, nn.Linear(backbone.num_features, 5))
    model.freeze(len(backbone.stages), only="lora")
    trained = dict(model.trainable_parameters()["backbone"])
    assert set(trained) == {f"backbone.{name}" for name in added}
    assert sum(parameter.numel() for parameter in trained.values()) == expected


def test_names_of_the_base_stay_and_new_tensors_belong_to_the_stage_of_their_layer():
    backbone = load()
    names, stages = set(backbone.state_dict()), dict(backbone.stage_of)
    added = add_lora(backbone, rank=2)
    assert set(backbone.state_dict()) == names | set(added)
    assert set(backbone.stage_of) == set(stages) | set(added)
    assert {backbone.stage_of[name] for name in stages} == set(stages.values())
    for block in range(6):
        own = {f"model.blocks.{block}.attn.qkv.{part}" for part in ("lora_a", "lora_b")}
        assert {name for name in added if backbone.stage_of[name] == block + 1} == own


def test_matrices_of_the_top_stages_alone_can_train():
    backbone = load()
    model = Classifier(backbone, nn.Linear(backbone.num_features, 2))  # made before there are any
    add_lora(backbone, rank=2)
    model.freeze(2, only="lora")
    own = {name.removeprefix("backbone.model.") for name, _ in model.trainable_parameters()["backbone"]}
    assert own == {f"blocks.{block}.attn.qkv.{part}" for block in (4, 5) for part in ("lora_a", "lora_b")}


def test_training_moves_the_matrices_and_the_head_and_not_one_bit_of_the_base():
    backbone = load()
    add_lora(backbone, rank=2)
    model = Classifier(backbone, make_head(backbone.num_features, 2, init="small"))
    model.freeze(len(backbone.stages), only="lora")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        model.train()
        F.cross_entropy(model(IMAGES), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(model.trainable_names())


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (2.0, 0.5)])
def test_the_layer_is_that_of_the_paper(alpha, scale):
    backbone, plain = with_trained_adapters(rank=4, alpha=alpha)
    assert (features(backbone) - features(plain)).abs().max() > 0.01
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if name.endswith("qkv"):
                own = backbone.get_submodule(name)
                layer.weight += scale * own.lora_b @ own.lora_a
    torch.testing.assert_close(features(backbone), features(plain), atol=1e-5, rtol=1e-5)


def test_a_starts_as_the_paper_s_code_does_and_depends_on_the_seed_alone():
    first, second = load(), load()
    torch.manual_seed(5)
    names = add_lora(first, rank=64)
    torch.manual_seed(5)
    add_lora(second, rank=64)
    for name in names:
        tensor = first.get_parameter(name).detach()
        assert torch.equal(tensor, second.get_parameter(name))
        if name.endswith("lora_a"):  # uniform within 1 / sqrt(in)
            assert tensor.abs().max() <= 64**-0.5
            assert tensor.std() == pytest.approx((3 * 64) ** -0.5, rel=0.05)


def test_merged_the_network_is_plain_again_and_says_the_same():
    backbone, plain = with_trained_adapters(rank=4)
    before = features(backbone)
    merge_lora(backbone)
    torch.testing.assert_close(features(backbone), before, atol=1e-5, rtol=1e-5)
    assert list(backbone.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in backbone.modules()] == [type(module) for module in plain.modules()]
    assert backbone.stage_of == plain.stage_of
    plain.load_state_dict(backbone.state_dict())
    assert torch.equal(features(plain), features(backbone))
    assert len(add_lora(backbone, rank=1)) == 12  # and may begin again


def test_adding_looks_at_the_network_without_changing_its_modes():
    backbone = load().train()
    backbone.model.blocks[1].eval()
    modes = {name: module.training for name, module in backbone.named_modules()}
    add_lora(backbone, rank=1)
    assert {name: module.training for name, module in backbone.named_modules()} == modes


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_a_network_without_attention_is_refused(name):
    with pytest.raises(BackboneError, match=rf"{name}\S* has no attention.*Choose a vision transformer"):
        add_lora(load(name), rank=1)


def test_layers_that_are_not_there_are_refused_with_the_nearest():
    with pytest.raises(BackboneError, match=r"no linear layer called qvk; it has fc1, fc2, proj, qkv\. Nearest: qkv\."):
        add_lora(load(), rank=1, targets=("qvk", "proj"))


def test_a_layer_whose_weight_is_read_past_it_is_refused_and_left_alone():
    card = Card(
        name="small_beit", arch="beit_base_patch16_224", num_classes=2, pretrained_on="nothing", licence="unknown",
        input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0,
        arch_kwargs={"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32},
    )  # fmt: skip
    backbone = load_backbone("small_beit", zoo={"small_beit": card}, pretrained=False)
    with pytest.raises(BackboneError, match=r"reads the weight of blocks\.0\.attn\.qkv without calling the layer"):
        add_lora(backbone, rank=1)
    assert not any(isinstance(module, LowRankLinear) for module in backbone.modules())
    assert len(add_lora(backbone, rank=1, targets=("proj",))) == 2


def test_no_rank_and_a_second_set_are_refused():
    backbone = load()
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        add_lora(backbone, rank=0)
    add_lora(backbone, rank=1)
    with pytest.raises(ValueError, match="has low-rank matrices already"):
        add_lora(backbone, rank=1)


@pytest.mark.filterwarnings("ignore")
def test_peft_says_the_same():
    peft = pytest.importorskip("peft", reason="peft is not needed; where it is installed, we compare")
    backbone, plain = with_trained_adapters(rank=4, alpha=6)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["qkv"])
    peft.inject_adapter_in_model(config, plain.model)
    with torch.no_grad():
        for name, layer in plain.model.named_modules():
            if name.endswith("qkv"):
                own = backbone.model.get_submodule(name)
                layer.lora_A["default"].weight.copy_(own.lora_a)
                layer.lora_B["default"].weight.copy_(own.lora_b)
    torch.testing.assert_close(features(backbone), features(plain.eval()), atol=1e-6, rtol=1e-6)
