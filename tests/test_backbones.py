"""Backbones: the right weights or a clear error, the source's own features, and stages that cover all."""

import hashlib
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from finetune.config.card import Card, read_card
from finetune.errors import BackboneError
from finetune.models import weights
from finetune.models.backbones import load_backbone

ARCHITECTURES = (
    "test_resnet", "test_efficientnet", "test_convnext", "test_vit", "test_vit3", "test_vit_relpos", "test_byobnet",
    "test_maxvit", "test_mambaout", "test_nfnet", "resnet18", "mobilenetv2_100", "mobilenetv3_small_050",
    "torchvision/resnet18", "torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5",
)  # fmt: skip
MOBILENETS = (
    "mobilenetv2_100.imagenet_keras", "mobilenetv2_100.imagenet_slim", "mobilenetv2_100.inat_bird",
    "mobilenetv2_100.inat_insect",
)  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    """A card and half-precision weights of a network with 7 classes."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    return _card(tmp_path / "tiny", state)


def _card(folder, state, arch="test_resnet", **changes):
    folder.mkdir()
    save_file(state, folder / "weights.safetensors")
    sha256 = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    fields = {
        "name": folder.name, "arch": arch, "num_classes": 7, "input_size": [3, 160, 160], "mean": [0.5] * 3,
        "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 0.95, "sha256": sha256,
        "weights": {"file": "weights.safetensors"},
    }  # fmt: skip
    (folder / "card.yaml").write_text(yaml.safe_dump(fields | changes))
    return read_card(folder / "card.yaml")


@pytest.mark.technique("T001")
@pytest.mark.shared
@pytest.mark.parametrize("name", MOBILENETS)
def test_source_logits_are_those_of_the_plain_snippet(shared, name):
    folder = shared / "zoo" / name
    card = read_card(folder / "card.yaml")
    backbone = load_backbone(name, zoo={name: card}).eval()
    plain = timm.create_model(card.arch, num_classes=card.num_classes, **card.arch_kwargs).eval()
    plain.load_state_dict(load_file(folder / "weights.safetensors"))
    images = torch.randn(2, *card.input_size, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.inference_mode():
        expected = plain(images)
        torch.testing.assert_close(backbone.source_logits(images), expected, rtol=0, atol=1e-5)
        assert backbone(images).shape == (2, 1280) == (2, backbone.num_features)
    assert float(expected.std()) > 0.1
    assert backbone.stages == ("stem", *(f"blocks.{i}" for i in range(7)))


@pytest.mark.technique("T001")
def test_weights_beside_a_card_are_loaded_whole_and_in_single_precision(tiny):
    backbone = load_backbone("tiny", zoo={"tiny": tiny}).eval()
    plain = timm.create_model("test_resnet", num_classes=7).eval()
    plain.load_state_dict(load_file(tiny.weights))
    images = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(backbone.source_logits(images), plain(images), rtol=0, atol=1e-5)
    assert all(p.dtype == torch.float32 for p in backbone.parameters())
    assert backbone.card == Card(**{**vars(tiny), "params_m": backbone.card.params_m})
    assert backbone.card.params_m == pytest.approx(sum(p.numel() for p in plain.parameters()) / 1e6, abs=1e-3)


@pytest.mark.parametrize("name", [n for n in timm.list_models("test_*")])
def test_features_and_source_head_together_are_the_whole_network(name, tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=7).eval()
    size = list(plain.pretrained_cfg["input_size"])
    card = _card(tmp_path / "whole", plain.state_dict(), arch=name, input_size=size)
    backbone = load_backbone("whole", zoo={"whole": card}).eval()
    with torch.inference_mode():
        images = torch.randn(2, *size)
        torch.testing.assert_close(backbone.source_logits(images), plain(images), rtol=0, atol=1e-5)


def test_torchvision_weights_beside_a_card_are_loaded_too(tmp_path):
    from torchvision.models import get_model

    torch.manual_seed(0)
    plain = get_model("mobilenet_v3_small", num_classes=7, width_mult=0.5).eval()
    options = {"arch": "torchvision/mobilenet_v3_small", "arch_kwargs": {"width_mult": 0.5}}
    card = _card(tmp_path / "tv", plain.state_dict(), **options)
    backbone = load_backbone("tv", zoo={"tv": card}).eval()
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(backbone.source_logits(images), plain(images), rtol=0, atol=1e-5)


@pytest.mark.technique("T007")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stages_cover_every_parameter_and_buffer(name):
    backbone = load_backbone(name, zoo={}, pretrained=False)
    names = {key for key, _ in (*backbone.named_parameters(), *backbone.named_buffers())}
    assert backbone.stage_of.keys() == names
    assert set(backbone.stage_of.values()) == set(range(len(backbone.stages)))
    assert backbone.stages[0] == "stem"
    assert 4 <= len(backbone.stages) <= 13
    assert len(set(backbone.stages)) == len(backbone.stages)
    first = next(key for key, p in backbone.named_parameters() if p.ndim == 4)
    assert backbone.stage_of[first] == 0


@pytest.mark.parametrize("name", ["torchvision/resnet18", "resnet18"])
def test_a_resnet_has_the_same_stages_wherever_it_comes_from(name):
    backbone = load_backbone(name, zoo={}, pretrained=False)
    assert backbone.stages == ("stem", "layer1", "layer2", "layer3", "layer4")
    for key, stage in backbone.stage_of.items():
        found = re.match(r"model\.layer(\d)", key)
        assert stage == (int(found[1]) if found else 0), key


def test_the_source_classifier_is_no_part_of_the_backbone(tiny):
    backbone = load_backbone("tiny", zoo={"tiny": tiny})
    state = load_file(tiny.weights)
    features = {f"model.{name}" for name in state if not name.startswith("fc.")}
    assert backbone.state_dict().keys() == features
    assert isinstance(backbone.source_head, torch.nn.Linear)
    assert id(backbone.source_head.weight) not in {id(p) for p in backbone.parameters()}
    assert not backbone.source_head.weight.requires_grad


def test_the_digest_knows_the_weights_and_nothing_else(tiny):
    one, other = (load_backbone("tiny", zoo={"tiny": tiny}) for _ in range(2))
    assert re.fullmatch("[0-9a-f]{64}", one.weights_digest)
    assert one.weights_digest == other.weights_digest
    assert one.weights_digest == one.to(memory_format=torch.channels_last).weights_digest
    with torch.no_grad():
        other.model.bn1.running_mean[0] += 1e-6
    assert one.weights_digest != other.weights_digest


@pytest.mark.technique("T001")
def test_the_contract_is_that_of_timm():
    for name in ("resnet18.a1_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "mobilenetv2_100"):
        card = load_backbone(name, zoo={}, pretrained=False).card
        theirs = timm.data.resolve_model_data_config(timm.create_model(name))
        ours = (card.input_size, card.mean, card.std, card.interpolation, card.crop_pct)
        assert ours == tuple(theirs[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct"))
    assert card.name == "mobilenetv2_100.ra_in1k"
    assert card.licence == "apache-2.0"


@pytest.mark.technique("T001")
@pytest.mark.parametrize(
    ("name", "size", "shorter", "interpolation"),
    [
        ("torchvision/resnet18", 224, 256, "bilinear"),
        ("torchvision/resnet50.IMAGENET1K_V1", 224, 256, "bilinear"),
        ("torchvision/resnet50", 224, 232, "bilinear"),
        ("torchvision/swin_t", 224, 232, "bicubic"),
    ],
)
def test_the_contract_is_that_of_the_torchvision_weights(name, size, shorter, interpolation):
    view = load_backbone(name, zoo={}, pretrained=False).card.view()
    assert (view.size_pixels, view.shorter_pixels, view.interpolation) == (size, shorter, interpolation)


def test_random_weights_keep_the_contract_and_claim_no_pretraining(tiny):
    backbone = load_backbone("tiny", zoo={"tiny": tiny}, pretrained=False)
    assert backbone.card.view() == tiny.view()
    assert "random" in backbone.card.pretrained_on
    assert backbone.source_head is None
    assert backbone.weights_digest != load_backbone("tiny", zoo={"tiny": tiny}).weights_digest
    with pytest.raises(BackboneError, match="no source classifier"):
        backbone.source_logits(torch.zeros(1, 3, 64, 64))


@pytest.mark.technique("T001")
def test_a_flipped_byte_is_noticed_before_it_is_loaded(tiny):
    content = bytearray(tiny.weights.read_bytes())
    content[-1] ^= 1
    tiny.weights.write_bytes(content)
    with pytest.raises(BackboneError, match=rf"weights\.safetensors .*expected {tiny.sha256}, got [0-9a-f]{{64}}"):
        load_backbone("tiny", zoo={"tiny": tiny})


def test_weights_of_another_network_are_refused(tiny, tmp_path):
    for changes, found in (({"arch": "test_vit"}, "Missing key"), ({"num_classes": 8}, "size mismatch")):
        wrong = Card(**{**vars(tiny), **changes})
        with pytest.raises(BackboneError, match=f"does not fit .*{found}"):
            load_backbone("tiny", zoo={"tiny": wrong})
    with pytest.raises(BackboneError, match="cannot be built"):
        load_backbone("tiny", zoo={"tiny": Card(**{**vars(tiny), "arch_kwargs": {"pad": 1}})})


def test_a_card_without_its_weights_says_which_file_is_missing_and_what_else_there_is(tiny):
    tiny.weights.unlink()
    with pytest.raises(BackboneError, match=r"weights\.safetensors.*Put it into .*tiny.*at hand: other\.$"):
        load_backbone("tiny", zoo={"tiny": tiny, "other": tiny})


@pytest.mark.technique("T001")
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("test_resnet.r160_in1k", "model.safetensors of .*timm/test_resnet.r160_in1k"),
        ("torchvision/resnet18", "resnet18-f37"),
    ],
)
def test_without_a_network_one_paragraph_comes_at_once(tiny, name, file, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("FINETUNE_ZOO", "/my/zoo")
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("the network was asked"))
    began = time.perf_counter()
    with pytest.raises(BackboneError, match=file) as caught:
        load_backbone(name, zoo={"tiny": tiny})
    message = str(caught.value)
    assert time.perf_counter() - began < 5
    assert "HF_HUB_OFFLINE" in message
    assert ("/my/zoo" if "timm" in message else "hub/checkpoints") in message
    assert message.endswith("at hand: tiny.")
    assert "\n" not in message


def test_an_unreachable_hub_is_asked_once_and_not_again(monkeypatch):
    asked = []

    def refuse(address, timeout):
        asked.append((address, timeout))
        raise TimeoutError("timed out")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(weights, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(BackboneError, match=r"huggingface\.co cannot be reached"):
        load_backbone("test_resnet", zoo={})
    assert asked == [(("huggingface.co", 443), weights.CONNECT_SECONDS)]


@pytest.mark.technique("T001")
def test_timm_weights_in_the_hub_cache_are_used_without_a_network(monkeypatch, tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model("test_resnet").eval()
    repo = tmp_path / "models--timm--test_resnet.r160_in1k"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    save_file(plain.state_dict(), repo / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    backbone = load_backbone("test_resnet.r160_in1k", zoo={}).eval()
    images = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(backbone.source_logits(images), plain(images), rtol=0, atol=1e-5)
    assert backbone.card.pretrained_on == "ImageNet-1k"


@pytest.mark.technique("T001")
def test_torchvision_weights_in_the_checkpoint_folder_are_used_and_checked(monkeypatch, tmp_path):
    from torchvision.models import get_model

    torch.manual_seed(0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    plain = get_model("shufflenet_v2_x0_5").eval()
    torch.save(plain.state_dict(), folder / "shufflenetv2_x0.5-f707e7126e.pth")
    with pytest.raises(BackboneError, match="sha256 expected f707e7126e, got"):
        load_backbone("torchvision/shufflenet_v2_x0_5", zoo={})
    monkeypatch.setattr(weights, "check_sha256", lambda path, expected: None)
    backbone = load_backbone("torchvision/shufflenet_v2_x0_5", zoo={}).eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(backbone.source_logits(images), plain(images), rtol=0, atol=1e-5)
    assert backbone.card.name == "torchvision/shufflenet_v2_x0_5.IMAGENET1K_V1"


def test_a_checkpoint_that_wants_to_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(BackboneError, match=r"trap\.pth is not a readable checkpoint"):
        weights.read_checkpoint(tmp_path / "trap.pth")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet81", "resnet18"),
        ("resnet18.a1_in2k", r"resnet18\.a1_in1k"),
        ("tinny", "tiny"),
        ("torchvision/resnet81", "torchvision/resnet18"),
        ("torchvision/resnet18.V9", "IMAGENET1K_V1"),
        ("torchvision/squeezenet1_0", "does not end in one linear classifier"),
    ],
)
def test_names_that_cannot_be_had_point_to_some_that_can(tiny, name, near):
    with pytest.raises(BackboneError, match=near):
        load_backbone(name, zoo={"tiny": tiny}, pretrained=False)


@pytest.mark.slow
def test_importing_the_room_imports_no_timm():
    code = "import sys, finetune.models.backbones as b; assert not {'timm', 'torchvision'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


class Files(BaseHTTPRequestHandler):
    """Gives a file, or half of what it promises."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "8")
        self.end_headers()
        self.wfile.write(b"12345678" if "whole" in self.path else b"1234")

    def log_message(self, *rest):
        pass


def test_a_file_is_fetched_whole_or_not_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    server = HTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    try:
        assert weights.fetch_from_url("net", f"{place}/whole.pth", {}).read_bytes() == b"12345678"
        with pytest.raises(BackboneError, match=r"half\.pth broke off after 4 of 8 bytes\. What is missing is"):
            weights.fetch_from_url("net", f"{place}/half.pth", {})
    finally:
        server.shutdown()
        server.server_close()
    assert [path.name for path in (tmp_path / "hub" / "checkpoints").iterdir()] == ["whole.pth"]
