"""Classifiers: what is frozen stays bit for bit, through decay, momentum, batch norm and `train()`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.errors import BackboneError
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
FIRST = {
    "test_resnet": {"conv1.0.weight"},
    "test_efficientnet": {"conv_stem.weight"},
    "test_convnext": {"stem.0.weight", "stem.0.bias"},
    "test_vit": {"patch_embed.proj.weight", "patch_embed.proj.bias"},
}
"""Where the images come in."""
NORMS = {"test_resnet": ("conv1.1.", "conv1.4.", "bn", "downsample.2."), "test_efficientnet": ("bn",),
         "test_convnext": ("norm", "stem.1.", "downsample.0."), "test_vit": ("norm",)}  # fmt: skip
"""What in a tensor's name tells that a norm holds it."""
_AFFINE = ("weight", "bias")
LAYERS = {
    "test_resnet": ("layer2",),
    "test_efficientnet": ("blocks.4.0.conv_pw", "blocks.2"),
    "test_convnext": ("stages.2", "stages.0.blocks.0.mlp"),
    "test_vit": ("blocks.3.attn", "blocks.1"),
}
"""Some stages and layers with others below, between and above them."""


def _classifier(name, num_trainable_stages=0, **options):
    torch.manual_seed(0)
    backbone = load_backbone(name, zoo={}, pretrained=False)
    model = Classifier(backbone, make_head(backbone.num_features, 3, init="small", dropout=0.1))
    model.freeze(num_trainable_stages, **options)
    return model


def _train_one_epoch(model):
    """SGD with momentum and decay, over a few batches, and with `train()` called as users do."""
    size = 160 if "vit" in model.backbone.card.name else 64
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


def _own(model):
    """Names of the backbone's tensors that train, as the architecture calls them."""
    assert {"head.linear.weight", "head.linear.bias"} <= set(model.trainable_names())
    return {key.removeprefix("backbone.model.") for key in model.trainable_names() if key.startswith("backbone.")}


def _all(model):
    return {key for key, _ in model.backbone.model.named_parameters()}


def _moved_by_an_epoch(model):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    _train_one_epoch(model)
    return {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}


def _in_training(model):
    model.train()
    return {key for key, module in model.backbone.named_modules() if module.training}


@pytest.mark.technique("T007")
@pytest.mark.parametrize("name", ARCHETYPES)
def test_named_stages_and_layers_train_whole_and_all_around_them_stands_still(name):
    model, prefixes = _classifier(name, layers=LAYERS[name]), tuple(f"{layer}." for layer in LAYERS[name])
    expected = {key for key in _all(model) if key.startswith(prefixes)}
    assert _own(model) == expected
    within = {key for key, _ in model.backbone.named_modules() if f"{key}.".removeprefix("model.").startswith(prefixes)}
    norms = {key for key, module in model.backbone.named_modules() if isinstance(module, _BatchNorm)}
    assert _in_training(model) == within - norms
    assert _moved_by_an_epoch(model) == set(model.trainable_names())


@pytest.mark.technique("T007")
@pytest.mark.parametrize("name", ARCHETYPES)
def test_the_top_stages_by_name_are_the_top_stages_by_number(name):
    model = _classifier(name, 2)
    by_number = model.trainable_names(), _in_training(model)
    model.freeze(0, layers=STAGES[name][-2:])
    assert (model.trainable_names(), _in_training(model)) == by_number


@pytest.mark.technique("T072")
def test_batch_norm_moves_in_the_named_stage_and_neither_below_nor_above_it():
    model = _classifier("test_resnet", layers=("layer2",), batch_norm="train")
    moved = _moved_by_an_epoch(model)
    assert any("running_mean" in key for key in moved)
    assert {key for key in moved if not key.startswith("head.")} == {
        key for key in model.state_dict() if key.startswith("backbone.model.layer2.")
    }


@pytest.mark.technique("T072")
def test_statistics_follow_the_images_while_scale_and_shift_stay():
    model = _classifier("test_resnet", 2, batch_norm="statistics")
    opened = {key for key in model.state_dict() if key.startswith(("backbone.model.layer3.", "backbone.model.layer4."))}
    affine = {key for key in opened if model.state_dict()[key].ndim == 1 and key.endswith(("weight", "bias"))}
    assert affine
    assert {key for key in _moved_by_an_epoch(model) if not key.startswith("head.")} == opened - affine
    assert all(p.grad is None for key, p in model.named_parameters() if key in affine)


@pytest.mark.technique("T007")
@pytest.mark.parametrize("name", ARCHETYPES)
def test_the_first_layer_can_be_held_while_everything_else_trains(name):
    model = _classifier(name, len(STAGES[name]), freezes_first=True)
    assert _own(model) == _all(model) - FIRST[name]
    assert _moved_by_an_epoch(model) == set(model.trainable_names())


@pytest.mark.parametrize("name", ARCHETYPES)
@pytest.mark.parametrize("only", ["norm_only", "bitfit"])
def test_norms_or_biases_alone_train_everywhere(name, only):
    model = _classifier(name, len(STAGES[name]), only=only)
    with torch.no_grad():  # timm begins some branches at zero, through which no gradient passes
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.weight.fill_(1.0)
    norms = {key for key in _all(model) if any(part in key for part in NORMS[name])}
    biases = {key for key in _all(model) if key.endswith(".bias")}
    assert _own(model) == (norms if only == "norm_only" else biases)
    assert _moved_by_an_epoch(model) == set(model.trainable_names())


def test_without_biases_of_convolutions_the_shifts_of_norms_are_the_biases():
    model = _classifier("test_resnet", 5, only="bitfit")
    assert _own(model) == {key for key in _all(model) if key.endswith(".bias")} != set()
    norms = {key for key, module in model.backbone.model.named_modules() if isinstance(module, _BatchNorm)}
    assert {key.removesuffix(".bias") for key in _own(model)} == norms


def test_norms_of_the_top_stages_alone_can_train():
    model = _classifier("test_vit", 1, only="norm_only")
    assert _own(model) == {f"{n}.{own}" for n in ("blocks.5.norm1", "blocks.5.norm2", "norm") for own in _AFFINE}


@pytest.mark.technique("T007")
@pytest.mark.parametrize("name", ARCHETYPES)
def test_head_first_then_each_step_opens_one_stage_more(name):
    model, total = _classifier(name), len(STAGES[name])
    assert _own(model) == set()
    stage_of, known, optimizer = model.backbone.stage_of, set(), None
    for k in range(1, total + 1):
        model.freeze(k)
        opened = _own(model) - known
        assert {stage_of[f"model.{key}"] for key in opened} == {total - k}
        assert opened == {key for key in _all(model) if stage_of[f"model.{key}"] == total - k}
        known |= opened
        newly = [p for key, p in model.trainable_parameters()["backbone"] if key[len("backbone.model.") :] in opened]
        if optimizer is None:
            optimizer = torch.optim.SGD(newly, lr=0.1)
        else:
            optimizer.add_param_group({"params": newly})  # which refuses a tensor that it has
    assert known == _all(model)


@pytest.mark.technique("T006")
@pytest.mark.technique("T007")
def test_a_stage_opened_later_moves_only_from_then_on_and_opening_it_changes_no_answer():
    model, images = _classifier("test_vit"), torch.randn(2, 3, 160, 160)
    for k in range(3):
        before = model.eval()(images)
        model.freeze(k)
        assert torch.equal(model(images), before)
        moved = {key for key in _moved_by_an_epoch(model) if not key.startswith("head.")}
        assert {model.backbone.stage_of[key.removeprefix("backbone.")] for key in moved} == set(range(7 - k, 7))


def test_layers_that_are_not_there_are_refused_with_the_nearest():
    model = _classifier("test_vit")
    with pytest.raises(
        ValueError, match=r"'blocks.2.atn' is neither. Nearest: blocks.2.attn, .*'zzz' .*stages are stem"
    ):
        model.freeze(0, layers=("blocks.1", "blocks.2.atn", "zzz"))
    for name in ("blocks.0.nor", "model.blocks.0", "head_drop", ""):
        with pytest.raises(ValueError, match="is neither"):
            model.freeze(0, layers=(name,))
    assert _own(model) == set()


@pytest.mark.parametrize(
    ("k", "options", "match"),
    [
        (2, {"only": "lora"}, r"opened of test_resnet\S* has no low-rank matrices\. Call add_lora first"),
        (2, {"only": "norm_only", "batch_norm": "statistics"}, r"no norms that train with batch_norm 'statistics'"),
        (0, {"only": "bitfit"}, r"num_trainable_stages is 0; open some"),
    ],
)
def test_a_kind_of_tensor_that_is_not_there_is_refused_and_nothing_changes(k, options, match):
    model = _classifier("test_resnet", 1)
    before = model.trainable_names()
    with pytest.raises(BackboneError, match=match):
        model.freeze(k, **options)
    assert model.trainable_names() == before


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


@pytest.mark.parametrize(
    ("k", "options"), [(-1, {}), (6, {}), (1, {"batch_norm": "eval"}), (1, {"only": "weights"})], ids=str
)
def test_stages_and_modes_that_are_not_there_are_refused(k, options):
    with pytest.raises(ValueError, match=r"num_trainable_stages must lie in 0 to 5|(batch_norm|only) must be one of"):
        _classifier("test_resnet").freeze(k, **options)


@pytest.mark.technique("T067")
@pytest.mark.parametrize("name", ARCHETYPES)
def test_an_image_scores_the_same_whatever_stands_beside_it(name):
    model = _classifier(name, 2, batch_norm="train").eval()
    size = model.backbone.card.input_size[1]
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
