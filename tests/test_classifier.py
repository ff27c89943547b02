"""Classifiers: what is frozen stays bit for bit, through decay, momentum, batch norm and `train()`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import make_head

ARCHETYPES = ("test_resnet", "test_efficientnet", "test_convnext", "test_vit")
STAGES = {
    "test_resnet": ("stem", "layer1", "layer2", "layer3", "layer4"),
    "test_efficientnet": ("stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4"),
    "test_convnext": ("stem", "stages.0", "stages.1", "stages.2", "stages.3"),
    "test_vit": ("stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "blocks.5"),
}
ABOVE = {"test_efficientnet": ("conv_head", "bn2"), "test_convnext": ("head",), "test_vit": ("norm",)}
"""What stands above the last stage and trains with it."""


def _classifier(name, num_trainable_stages=0, **options):
    torch.manual_seed(0)
    backbone = load_backbone(name, zoo={}, pretrained=False)
    model = Classifier(backbone, make_head(backbone.num_features, 3, init="small", dropout=0.1))
    model.freeze(num_trainable_stages, **options)
    return model


def _train_one_epoch(model):
    """SGD with momentum and decay, over a few batches, and with `train()` called as users do."""
    size = model.backbone.card.input_size[1]
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9, weight_decay=0.1
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        model.train()
        images = torch.randn(4, 3, size, size, generator=generator) + 1
        F.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.technique("T004")
@pytest.mark.technique("T007")
@pytest.mark.technique("T072")
@pytest.mark.parametrize("name", ARCHETYPES)
@pytest.mark.parametrize("num_trainable_stages", [0, 2])
def test_an_epoch_moves_what_trains_and_not_one_bit_of_what_is_frozen(name, num_trainable_stages):
    model = _classifier(name, num_trainable_stages)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = _train_one_epoch(model)
    after, trained = model.state_dict(), set(model.trainable_names())
    assert trained
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]) == (key not in trained), key
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for key, parameter in model.named_parameters() if key in trained}
    assert all(p.grad is None for key, p in model.named_parameters() if key not in trained)


@pytest.mark.technique("T007")
@pytest.mark.parametrize("name", ARCHETYPES)
def test_exactly_the_top_stages_train(name):
    model, stages = _classifier(name), STAGES[name]
    assert model.backbone.stages == stages
    all_names = {key for key, _ in model.named_parameters()}
    for k in range(len(stages)):  # the stem by name: see the next test
        prefixes = [*stages[len(stages) - k :], *(ABOVE.get(name, ()) if k else ())]
        expected = {
            key for key in all_names if any(key.startswith(f"backbone.model.{prefix}.") for prefix in prefixes)
        } | {"head.linear.weight", "head.linear.bias"}
        model.freeze(k)
        assert set(model.trainable_names()) == expected
        assert {key for part in model.trainable_parameters().values() for key, _ in part} == expected
    model.freeze(len(stages))
    assert set(model.trainable_names()) == all_names


@pytest.mark.technique("T007")
def test_class_token_and_position_table_belong_to_the_stem():
    backbone = _classifier("test_vit").backbone
    assert {backbone.stage_of[f"model.{name}"] for name in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {0}


@pytest.mark.technique("T072")
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_batch_norm_stays_in_evaluation_mode_after_train_is_called(name):
    model = _classifier(name, 2)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert norms
    for outer in (model, nn.Sequential(model)):  # Lightning calls train() on the module around us
        outer.train()
        assert model.training
        assert model.head.training
        assert not any(m.training for m in norms)


@pytest.mark.technique("T072")
def test_batch_norm_of_trainable_stages_follows_the_images_where_asked_and_no_other():
    model = _classifier("test_resnet", 1, batch_norm="train").train()
    for key, module in model.backbone.model.named_modules():
        if isinstance(module, _BatchNorm):
            assert module.training == key.startswith("layer4"), key
    before = {key: tensor.clone() for key, tensor in model.named_buffers()}
    _train_one_epoch(model)
    for key, tensor in model.named_buffers():
        assert torch.equal(before[key], tensor) == (".layer4." not in key), key


@pytest.mark.technique("T072")
def test_scale_and_shift_of_a_frozen_batch_norm_in_a_trainable_stage_still_train():
    model = _classifier("test_resnet", 1)
    assert "backbone.model.layer4.0.bn1.weight" in model.trainable_names()


def test_dropout_is_off_in_frozen_stages_and_on_above_them():
    model = _classifier("test_vit", 2)
    module_of = dict(model.backbone.model.named_modules())
    model.train()
    for key in ("pos_drop", "patch_drop", "blocks.0.mlp.drop1", "blocks.3.attn.proj_drop", "blocks.0.drop_path1"):
        assert not module_of[key].training, key
    for key in ("blocks.5.mlp.drop1", "blocks.4.attn.proj_drop", "blocks.5.drop_path1", "head_drop"):
        assert module_of[key].training, key
    model.freeze(0)
    assert not any(module.training for module in model.backbone.modules())
    assert model.head.dropout.training
    model.freeze(len(model.backbone.stages))
    assert all(module.training for module in model.backbone.modules())
    assert not any(module.training for module in model.eval().modules())


def test_a_frozen_backbone_gives_in_training_the_features_it_gives_in_evaluation():
    model, images = _classifier("test_resnet").train(), torch.randn(4, 3, 64, 64)
    features = model.backbone(images)
    torch.testing.assert_close(features, model.eval().backbone(images), rtol=0, atol=0)
    assert not features.requires_grad


def test_a_gradient_from_before_is_dropped_when_a_stage_is_frozen():
    model = _classifier("test_resnet", 5)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert model.backbone.model.layer4[0].conv1.weight.grad is not None
    model.freeze(0)
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert model.head.linear.weight.grad is not None


def test_a_new_classifier_has_its_backbone_frozen():
    backbone = load_backbone("test_resnet", zoo={}, pretrained=False)
    model = Classifier(backbone, make_head(backbone.num_features, 3))
    assert model.trainable_names() == ("head.linear.weight", "head.linear.bias")
    assert model.num_trainable_stages == 0


@pytest.mark.parametrize(("k", "batch_norm"), [(-1, "frozen"), (6, "frozen"), (1, "eval")])
def test_stages_and_modes_that_are_not_there_are_refused(k, batch_norm):
    with pytest.raises(ValueError, match=r"num_trainable_stages must lie in 0 to 5|batch_norm must be one of"):
        _classifier("test_resnet").freeze(k, batch_norm=batch_norm)


@pytest.mark.technique("T067")
@pytest.mark.parametrize("name", ARCHETYPES)
def test_an_image_scores_the_same_whatever_stands_beside_it(name):
    model = _classifier(name, 2, batch_norm="train").eval()
    size = model.backbone.card.input_size[1]
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
