"""A card is data from anywhere: it may describe an architecture, and neither run code nor read what is not its own."""

import pickle

import pytest
import timm
import yaml

from finetune.config.card import ARCH_KWARGS, read_card
from finetune.errors import BackboneError
from finetune.models.backbones import load_backbone

PLAIN = {
    "name": "own", "arch": "test_resnet", "num_classes": 3, "input_size": [3, 32, 32], "mean": [0.5] * 3,
    "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0,
}  # fmt: skip


def written(folder, **changes):
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump({**PLAIN, **changes}))
    return path


class Plant:
    """Unpickled, it writes a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (type(self.trace).write_text, (self.trace, "ran"))


@pytest.fixture
def planted(tmp_path):
    """A pickle that leaves a trace where it is loaded, and the trace."""
    trace, path = tmp_path / "trace.txt", tmp_path / "planted.pth"
    path.write_bytes(pickle.dumps(Plant(trace)))
    return path, trace


def test_the_plant_would_run_where_pickles_are_loaded(planted):
    path, trace = planted
    pickle.loads(path.read_bytes())
    assert trace.read_text() == "ran"


def test_a_card_cannot_have_a_pickle_loaded(tmp_path, planted):
    path, trace = planted
    with pytest.raises(BackboneError, match="arch_kwargs holds checkpoint_path"):
        read_card(written(tmp_path, arch_kwargs={"checkpoint_path": str(path)}))
    assert not trace.exists()


def test_the_timm_we_ask_for_loads_no_pickle_either(planted):
    path, trace = planted
    with pytest.raises(Exception):  # noqa: B017 - whatever it says, it must not have run the file
        timm.create_model("test_resnet", checkpoint_path=str(path))
    assert not trace.exists()


def test_weights_beside_a_card_that_are_a_pickle_are_not_loaded(tmp_path, planted):
    path, trace = planted
    card = read_card(written(tmp_path, weights={"file": path.name}))
    with pytest.raises(BackboneError, match="not a readable safetensors file"):
        load_backbone("own", zoo={"own": card})
    assert not trace.exists()


@pytest.mark.parametrize(
    "arch",
    [
        "hf-hub:timm/resnet18", "hf_hub:timm/resnet18", "local-dir:/tmp/model", "https://host/model", "../model",
        "torchvision/../x", "timm/resnet18", "",
    ],
)  # fmt: skip
def test_an_architecture_is_a_name_and_no_address(tmp_path, arch):
    with pytest.raises(BackboneError, match="no address and no folder"):
        read_card(written(tmp_path, arch=arch))


@pytest.mark.parametrize(
    "key",
    [
        "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "cache_dir",
        "scriptable", "exportable", "no_jit", "features_only", "weights", "weights_backbone", "progress", "num_classes",
    ],
)  # fmt: skip
def test_what_loads_weights_or_changes_what_is_built_is_no_argument_of_a_card(tmp_path, key):
    assert key not in ARCH_KWARGS
    with pytest.raises(BackboneError, match=f"arch_kwargs holds {key}"):
        read_card(written(tmp_path, arch_kwargs={key: True}))


def test_values_are_numbers_and_names(tmp_path):
    card = read_card(written(tmp_path, arch_kwargs={"act_layer": "gelu", "depths": [1, 2], "img_size": 32}))
    assert card.arch_kwargs == {"act_layer": "gelu", "depths": [1, 2], "img_size": 32}
    for value in ("/etc/passwd", {"file": "x"}, ["hf-hub:x"]):
        with pytest.raises(BackboneError, match=r"arch_kwargs\.act_layer is"):
            read_card(written(tmp_path, arch_kwargs={"act_layer": value}))


@pytest.mark.parametrize("key", ["weights", "statistics", "classes"])
@pytest.mark.parametrize("name", ["/etc/hostname", "../other/file"])
def test_a_card_names_files_of_its_own_folder_only(tmp_path, key, name):
    value = name if key == "classes" else {"file": name, "sha256": "0"}
    with pytest.raises(BackboneError, match="does not lie beside the card"):
        read_card(written(tmp_path, **{key: value}))


@pytest.mark.parametrize("changes", [{"arch_kwargs": {"in_chans": 1}}, {"input_size": [1, 32, 32]}])
def test_a_backbone_of_one_channel_is_refused_in_words(tmp_path, changes):
    card = read_card(written(tmp_path, **changes))
    with pytest.raises(BackboneError, match=r"takes images of 1 channels.*grey images"):
        load_backbone("own", zoo={"own": card}, pretrained=False)
