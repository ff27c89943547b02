"""Transformers at other sizes than that of pretraining: resampled by timm, rounded aloud, and kept with the run."""

import warnings

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

import finetune as ft
from finetune.config.card import ARCH, Card, read_card
from finetune.errors import BackboneError
from finetune.inference.batch_predict import predict
from finetune.models.backbones import load_backbone
from finetune.models.image_sizes import nearest_size, size_unit
from finetune.models.input_size import TRAINABLE_PIXELS, fit_size
from finetune.preparing import plan

VIT = ("vit_tiny_patch16_224", {"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 2}, 64)
SWIN = (
    "swin_tiny_patch4_window7_224",
    {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": [1, 1], "num_heads": [1, 2]},
    64,
)
BEIT = ("beit_base_patch16_224", {"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 2}, 64)
EVA = ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 1, "embed_dim": 24, "num_heads": 2}, 56)
DEIT = ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 2}, 64)
NETWORKS = pytest.mark.parametrize("network", [VIT, SWIN, BEIT, EVA, DEIT], ids=["vit", "swin", "beit", "eva", "deit"])


def quiet(text):
    """Nobody listens."""


def backbone_of(network):
    arch, options, size = network
    torch.manual_seed(0)
    card = Card(name="own", arch=arch, arch_kwargs=options, num_classes=3, input_size=(3, size, size))
    return load_backbone("own", zoo={"own": card}, pretrained=False).eval()


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A zoo that holds a tiny ViT of 64 px and a tiny Swin of 64 px, with weights."""
    for name, (arch, options, size) in {"own_vit": VIT, "own_swin": SWIN}.items():
        torch.manual_seed(0)
        model = timm.create_model(arch, num_classes=3, **options)
        folder = tmp_path / "zoo" / name
        folder.mkdir(parents=True)
        save_file(
            {key: value.contiguous().clone() for key, value in model.state_dict().items()}, folder / "w.safetensors"
        )
        card = {
            "name": name, "arch": arch, "arch_kwargs": options, "num_classes": 3, "input_size": [3, size, size],
            "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "weights": {"file": "w.safetensors"},
        }  # fmt: skip
        (folder / "card.yaml").write_text(yaml.safe_dump(card))
    monkeypatch.setenv("FINETUNE_ZOO", str(tmp_path / "zoo"))
    return tmp_path / "zoo"


@NETWORKS
def test_at_the_size_of_pretraining_nothing_changes(network):
    backbone = backbone_of(network)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert fit_size(backbone, network[2]) == (network[2], "") == fit_size(backbone, None)
    after = backbone.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())
    assert backbone.network[1] == network[1]


@NETWORKS
def test_a_transformer_takes_another_size_after_timm_has_resampled_it(network):
    arch, options, own = network
    backbone = backbone_of(network)
    plain = timm.create_model(arch, num_classes=0, **options).eval()
    plain.load_state_dict(backbone.model.state_dict())
    size, told = fit_size(backbone, 2 * own)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # timm's own, on how it interpolates
        plain.set_input_size(img_size=(size, size))
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        assert torch.equal(backbone(images), plain.forward_head(plain.forward_features(images), pre_logits=True))
    assert size == 2 * own and f"resampled from {own} px" in told
    assert backbone.card.input_size == (3, size, size) and backbone.source_size == own


@NETWORKS
def test_the_same_network_is_built_again_at_the_new_size(network):
    backbone = backbone_of(network)
    size, _ = fit_size(backbone, 2 * network[2])
    arch, options = backbone.network
    card = Card(name="again", arch=arch, arch_kwargs=options, num_classes=3, input_size=(3, size, size))
    again = load_backbone("again", zoo={"again": card}, pretrained=False).eval()
    again.load_state_dict(backbone.state_dict())
    assert backbone.random_twin()(torch.zeros(1, 3, size, size)).shape == (1, backbone.num_features)
    images = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        assert torch.equal(backbone(images), again(images))


@pytest.mark.parametrize(("network", "unit"), [(VIT, 16), (SWIN, 16), (BEIT, 16), (EVA, 14)])
def test_sizes_are_multiples_of_patches_and_windows(network, unit):
    backbone = backbone_of(network)
    assert size_unit(backbone.model, network[2]) == unit
    size, told = fit_size(backbone, 2 * unit + 3)
    assert size == 2 * unit
    assert f"takes multiples of {unit} px, so {2 * unit + 3} px became {2 * unit}" in told


def test_the_nearest_multiple_is_never_nothing():
    assert [nearest_size(wish, 16) for wish in (1, 16, 23, 24, 40)] == [16, 16, 16, 32, 48]


def test_a_convolutional_network_takes_any_size_as_it_is():
    card = Card(name="own", arch="test_resnet", num_classes=3, input_size=(3, 64, 64))
    backbone = load_backbone("own", zoo={"own": card}, pretrained=False).eval()
    assert fit_size(backbone, 75) == (75, "")


def test_a_transformer_of_518_pixels_starts_at_a_size_that_people_can_train():
    options = {"img_size": 518, "depth": 1, "embed_dim": 24, "num_heads": 2}
    backbone = backbone_of(("vit_small_patch14_dinov2", options, 518))
    size, told = fit_size(backbone, None)
    assert size == TRAINABLE_PIXELS == 16 * 14
    assert "518 px, the size of pretraining" in told and "resampled from 518 px" in told
    assert fit_size(backbone_of(("vit_small_patch14_dinov2", options, 518)), 518) == (518, "")


def test_a_network_that_timm_cannot_resample_is_refused_with_the_size_it_takes():
    options = {"img_size": 64}
    backbone = backbone_of(("mixer_s32_224", options, 64))
    with pytest.raises(BackboneError, match=r"own does not take images of 96 px .*Set data.image_size to 64"):
        fit_size(backbone, 96)


def test_a_run_at_another_size_says_so_and_predicts_from_its_own_folder(shapes, tmp_path, zoo, monkeypatch):
    wishes = [
        "backbone=own_vit", "data.image_size=41", "train.strategy=full", "train.epochs=1", "train.batch_size=16",
        "tracking.enabled=false", "data.split.refit=false",
    ]  # fmt: skip
    run = ft.train(ft.load_recipe(str(shapes), wishes), runs=tmp_path / "runs", say=quiet)
    (reason,) = [one for one in run.plan.reasons if one.key == "data.image_size"]
    assert run.plan.view.size_pixels == 48 and reason.value == "48"
    assert "the recipe says 41" in reason.why and "multiples of 16" in reason.why and "resampled from 64" in reason.why
    assert read_card(run.file("card.yaml")).arch_kwargs["resized_to"] == 48
    assert ft.resume(run.path, say=quiet).plan == run.plan
    monkeypatch.delenv("FINETUNE_ZOO")
    paths = sorted(shapes.rglob("*.png"))[:4]
    assert all(answer.fault is None for answer in predict(run, paths))


def test_a_plan_for_a_window_transformer_at_another_size(shapes, zoo):
    facts, decided = plan(ft.load_recipe(str(shapes), ["backbone=own_swin", "data.image_size=48"]), say=quiet)
    assert decided.view.size_pixels == 48 and facts.backbone.input_size == 64
    assert "resampled from 64 px" in facts.size_note


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2.lvd142m", "swin_tiny_patch4_window7_224.ms_in1k"])
def test_names_of_timm_are_names_that_a_card_may_hold(name):
    assert ARCH.fullmatch(name)
    strange = [one for one in (*timm.list_models(), *timm.list_pretrained()) if not ARCH.fullmatch(one)]
    assert not strange
