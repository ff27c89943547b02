"""Names that other libraries do not promise: all are listed in docs/private_apis.md, and each is still what we use."""

import ast
import inspect
import io
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

import finetune

ROOT = Path(finetune.__file__).parent
PAGE = ROOT.parent / "docs" / "private_apis.md"
DOCUMENTED = {"_replace", "_asdict", "_fields", "_make"}
"""Of named tuples: Python documents them."""
UNDOCUMENTED = (
    "alembic.util",
    "mlflow.protos",
    "mlflow.server",
    "mlflow.store",
    "mlflow.tracking",
    "mlflow.utils",
    "pytorch_lightning.core",
    "pytorch_lightning.loops",
    "pytorch_lightning.trainer",
    "pytorch_lightning.utilities",
    "torch.nn.modules",
    "torch.nn.utils.fusion",
    "torch.ao",
)
ASKING_ROOMS = ("models", "features", "training", "inference", "ensembles", "evaluation", "export")


def listed(part: str) -> set[tuple[str, str]]:
    """Names and the files they stand in, of one table of the page."""
    rows = [line.split("|")[1:] for line in part.splitlines() if line.startswith("| `")]
    return {(row[0].strip("` "), place.strip("` ")) for row in rows for place in row[2].split(",")}


PRIVATE, ASKED = (listed(part) for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:])
LISTED = {name for name, _ in PRIVATE | ASKED}


def private_uses(text: str) -> set[str]:
    """Private names of others and undocumented modules in a file's text; what the file itself defines is its own."""
    tree = ast.parse(text)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_of_self(node)}
    found, aliases = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {name.asname or name.name.partition(".")[0]: name.name for name in node.names}
            found |= {place for name in node.names if (place := _undocumented(name.name))}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("finetune"):
            found |= {name for name in (*node.module.split("."), *(n.name for n in node.names)) if _is_private(name)}
            found |= {place for name in node.names if (place := _undocumented(f"{node.module}.{name.name}"))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if _is_private(node.attr) and node.attr not in own:
                found.add(node.attr)
            head, _, rest = ast.unparse(node).partition(".")
            if head in aliases and (place := _undocumented(f"{aliases[head].partition('.')[0]}.{rest}")):
                found.add(place)
        elif (name := _asked_for(node)) and _is_private(name):
            found.add(name)
    return found


def asked_names(text: str) -> set[str]:
    """Names that `getattr` and `hasattr` are called with."""
    return {name for node in ast.walk(ast.parse(text)) if (name := _asked_for(node))}


def _asked_for(node: ast.AST) -> str:
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
    asked = node.args[1] if is_call and len(node.args) > 1 else None
    return asked.value if isinstance(asked, ast.Constant) else ""


def _place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _is_of_self(node: ast.Attribute) -> bool:
    is_stored = isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)
    return is_stored and node.value.id not in ("torch", "timm", "pl", "mlflow")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def _undocumented(name: str) -> str:
    return next((place for place in UNDOCUMENTED if name == place or name.startswith(f"{place}.")), "")


def test_the_finder_finds_what_it_should_and_nothing_of_our_own():
    assert private_uses("from torch.nn.modules.batchnorm import _BatchNorm") == {"_BatchNorm", "torch.nn.modules"}
    assert private_uses("import torch\ntorch._foreach_abs([])\nx = getattr(image, '_im')") == {"_foreach_abs", "_im"}
    assert private_uses("from timm.models._registry import thing") == {"_registry"}
    assert private_uses("from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore") == {"mlflow.store"}
    assert private_uses("from mlflow import store") == {"mlflow.store"}
    assert private_uses("import torch\ntorch.nn.modules.batchnorm.BatchNorm2d") == {"torch.nn.modules"}
    own = "class A:\n  def __init__(self): self._x = 1\n  def _f(self, other): return other._x, other._f()"
    assert private_uses(own) == private_uses("pair._replace(b=1)") == set()
    assert asked_names("hasattr(model, 'bn2') and getattr(model, name)") == {"bn2"}


def test_every_use_of_a_private_name_is_listed_where_it_is_and_nothing_else_is():
    used = {(name, _place(path)) for path in ROOT.rglob("*.py") for name in private_uses(path.read_text())}
    assert len(used) > 3
    assert used == PRIVATE


def test_every_attribute_that_is_asked_for_by_name_is_listed_where_it_is():
    plain = {
        "__name__",
        "in_features",
        "groups",
        "track_running_stats",
        "strerror",
    }  # Python's and torch's own documented ones
    ours = {"channel_dropout"}
    used = {
        (name, _place(path))
        for room in ASKING_ROOMS
        for path in (ROOT / room).glob("*.py")
        for name in asked_names(path.read_text()) - plain - ours
        if not name.startswith("_")
    }
    assert len(used) > 10
    assert used | {("group_matcher", "models/stages.py")} == ASKED


PROVED: set[str] = set()


def proves(*names: str):
    """Mark a test as the one that fails when one of `names` moves."""
    PROVED.update(names)
    return lambda test: test


@proves("_forward_hooks", "_forward_pre_hooks")
def test_hooks_stand_where_we_look_for_them():
    layer, listener = nn.Linear(1, 1), lambda *_: None
    handles = layer.register_forward_hook(listener), layer.register_forward_pre_hook(listener)
    assert list(layer._forward_hooks.values()) == list(layer._forward_pre_hooks.values()) == [listener]
    for handle in handles:
        handle.remove()
    assert not layer._forward_hooks and not layer._forward_pre_hooks


@proves("_foreach_mul_", "_foreach_add_")
def test_sums_and_products_of_many_tensors_at_once():
    tensors = [torch.ones(2), torch.full((3,), 2.0)]
    torch._foreach_mul_(tensors, 3.0)
    torch._foreach_add_(tensors, [torch.ones(2), torch.ones(3)], alpha=0.5)
    assert [tensor.tolist() for tensor in tensors] == [[3.5, 3.5], [6.5, 6.5, 6.5]]


@proves("reset_parameters")
def test_layers_with_weights_draw_them_anew():
    layers = (nn.Linear(2, 2), nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.LayerNorm(1), nn.MultiheadAttention(2, 1))
    assert all(callable(layer.reset_parameters) for layer in layers[:-1])
    assert not hasattr(layers[-1], "reset_parameters")  # so its weights are shuffled


@proves("pytorch_lightning.utilities")
def test_lightning_warns_of_its_own_changes_by_this_class():
    from pytorch_lightning.utilities import rank_zero

    with pytest.warns(rank_zero.LightningDeprecationWarning):
        rank_zero.rank_zero_deprecation("soon")


@proves("alembic.util")
def test_a_migration_that_does_not_know_the_database_says_so_by_this_class(tmp_path):
    from alembic.script import ScriptDirectory
    from alembic.util.exc import CommandError

    with pytest.raises(CommandError):
        ScriptDirectory(str(tmp_path)).get_revision("unheard of")


@proves("_im")
def test_pillow_keeps_the_rows_it_decoded_before_a_file_broke_off():
    stored = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(stored, "PNG")
    image = Image.open(io.BytesIO(stored.getvalue()[:-1500]))
    with pytest.raises(OSError, match="truncated"):
        image.load()
    assert 0 < image._im.getbbox()[3] < 64


@proves("head_hidden_size", "num_features", "forward_head", "reset_classifier", "group_matcher", "pretrained_cfg")
def test_what_timm_tells_of_every_network():
    model = timm.create_model("mobilenetv3_small_050")
    assert (model.head_hidden_size, model.num_features) == (1024, 288)
    assert all(model.pretrained_cfg[name] for name in ("architecture", "tag", "mean", "std", "input_size"))
    assert "blocks" in str(model.group_matcher(coarse=True))
    model.reset_classifier(0)
    assert model.forward_head(torch.zeros(1, 288, 1, 1), pre_logits=True).shape == (1, 1024)


@proves("set_input_size", "patch_embed", "patch_size", "window_size")
def test_what_timm_tells_of_transformers():
    assert timm.create_model("test_vit").patch_embed.patch_size == (16, 16)
    assert callable(timm.create_model("test_vit").set_input_size)
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(1, 1))
    assert model.layers[0].blocks[0].window_size == (7, 7)


@proves("act", "drop", "zero_init_last", "shortcut", "init_weights")
def test_what_timm_tells_of_layers_and_blocks():
    norm = timm.create_model("test_efficientnet").bn1
    assert isinstance(norm.act, nn.Module) and isinstance(norm.drop, nn.Module)
    assert callable(timm.create_model("test_resnet").layer1[0].zero_init_last)
    block = next(module for module in timm.create_model("test_byobnet").modules() if hasattr(module, "shortcut"))
    assert "zero_init_last" in inspect.signature(block.init_weights).parameters


@proves("transform_input", "downsample", "bn2", "bn3", "proj", "f", "use_res_connect")
def test_what_torchvision_tells_of_networks_and_blocks():
    assert hasattr(torchvision.models.googlenet(init_weights=False), "transform_input")
    resnet = torchvision.models.resnet50(width_per_group=4)
    assert all(hasattr(resnet.layer1[0], name) for name in ("downsample", "bn2", "bn3"))
    block = torchvision.models.regnet_y_400mf().trunk_output[0][0]
    assert isinstance(block.proj, nn.Module) and isinstance(block.f, nn.Sequential)
    for model in (torchvision.models.mobilenet_v2(), torchvision.models.mobilenet_v3_small()):
        assert {module.use_res_connect for module in model.modules() if hasattr(module, "use_res_connect")} == {
            True,
            False,
        }


@proves("scaler")
def test_lightning_keeps_the_factor_of_the_loss_in_its_precision_plugin():
    from pytorch_lightning.plugins import MixedPrecision, Precision

    scaler = torch.amp.GradScaler("cpu")
    assert MixedPrecision("16-mixed", "cpu", scaler=scaler).scaler is scaler
    assert not hasattr(Precision(), "scaler")


@proves("monitor")
def test_callbacks_of_lightning_say_what_they_watch():
    from pytorch_lightning.callbacks import EarlyStopping

    assert EarlyStopping("val/loss").monitor == "val/loss"


def test_every_row_of_the_page_has_a_test():
    assert PROVED == LISTED
