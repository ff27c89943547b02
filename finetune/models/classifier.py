"""The classifier: a backbone and a head, where what is frozen stays still.

Frozen means three things at once: no gradient (and no `grad` for decay or momentum to act on), batch
norm and dropout in evaluation mode, and both still so after anyone calls `train()`. Two questions are
asked apart: which part of the backbone is opened, and which tensors of that part train.
"""

from collections.abc import Sequence

import torch
from torch import nn

from finetune.errors import BackboneError, RecipeError, nearest
from finetune.models.backbones import Backbone
from finetune.models.layers import BatchNorm, Convolution, InstanceNorm
from finetune.models.lora import LowRankLinear

BATCH_NORM = ("frozen", "statistics", "train")
ONLY = ("all", "norm_only", "bitfit", "lora")


class Classifier(nn.Module):
    """A backbone and a head between images and logits. Begins with the whole backbone frozen."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self._stage_of_module = stages_of_modules(backbone)
        self.num_trainable_stages = 0
        self._still: frozenset[str] = frozenset()
        self.freeze(0)

    def freeze(
        self,
        num_trainable_stages: int,
        *,
        batch_norm: str = "frozen",
        only: str = "all",
        layers: Sequence[str] = (),
        freezes_first: bool = False,
    ) -> None:
        """Let the head and the opened part of the backbone train, and hold everything else still.

        Args:
            num_trainable_stages: 0 trains the head alone, `len(backbone.stages)` everything. Where `layers`
                are given, they say what is opened.
            batch_norm: of the opened part. `frozen` keeps it at its pretrained statistics (its scale and shift
                still train); `statistics` lets these follow the new images and holds scale and shift; `train`
                moves both.
            only: which tensors of the opened part train. `norm_only` are scales and shifts of all norm layers;
                `bitfit` all biases, which in a network whose convolutions have none are mostly the shifts of
                its norms (BitFit: Zaken et al., ACL 2022, https://arxiv.org/abs/2106.10199); `lora` the matrices
                that `add_lora` added.
            layers: names out of `backbone.stages`, or of layers as the architecture calls them, each with all
                it holds (surgical fine-tuning: Lee et al., ICLR 2023, https://arxiv.org/abs/2210.11466).
            freezes_first: hold the first convolution or patch embedding, whatever else trains (Kumar et al.,
                2022, https://arxiv.org/abs/2211.09359).

        Raises:
            ValueError: if there are fewer stages, a layer is not there, or `batch_norm` or `only` is unknown.
            BackboneError: if the opened part has no tensor of the kind that is to train.
        """
        for key, value, known in (("batch_norm", batch_norm, BATCH_NORM), ("only", only, ONLY)):
            if value not in known:
                raise ValueError(f"{key} must be one of {', '.join(known)}, got {value!r}.")
        stages, prefixes = self._opened(num_trainable_stages, layers)
        first = first_layer(self.backbone) if freezes_first else None
        held = self.backbone.fixed_names | self._not_of_kind(only, batch_norm)
        trained = {
            name
            for name, _ in self.backbone.named_parameters()
            if (self.backbone.stage_of[name] in stages or _is_within(name, prefixes))
            and name not in held
            and name.rpartition(".")[0] != first
        }
        if only != "all" and not trained:
            raise BackboneError(self._nothing_trains(only, batch_norm, is_open=bool(stages or prefixes)))
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in trained)
            if name not in trained:
                parameter.grad = None  # a left-over gradient would let decay and momentum move it
        self.num_trainable_stages = num_trainable_stages
        self._still = frozenset(
            name
            for name, module in self.backbone.named_modules()
            if not (self._stage_of_module[name] in stages or _is_within(name, prefixes))
            or (batch_norm == "frozen" and isinstance(module, BatchNorm))
            or name == first
        )
        self.train(self.training)

    def _opened(self, num_trainable_stages: int, layers: Sequence[str]) -> tuple[set[int], tuple[str, ...]]:
        """Stages that are opened as a whole, and names of modules that are."""
        names, total = self.backbone.stages, len(self.backbone.stages)
        if not 0 <= num_trainable_stages <= total:
            raise ValueError(f"num_trainable_stages must lie in 0 to {total}, got {num_trainable_stages}.")
        if not layers:
            return set(range(total - num_trainable_stages, total)), ()
        holders = {name for name, module in self.backbone.model.named_modules() if name and _holds_weights(module)}
        if unknown := [name for name in layers if name not in names and name not in holders]:
            own = f"Its stages are {', '.join(names)}."
            hints = [f"{name!r} is neither. {nearest(name, [*names, *holders], otherwise=own)}" for name in unknown]
            raise ValueError(f"layers must be stages of {self.backbone.card.name} or layers in it. {' '.join(hints)}")
        modules = tuple(f"model.{name}" for name in layers if name not in names)
        return {names.index(name) for name in layers if name in names}, modules

    def _not_of_kind(self, only: str, batch_norm: str) -> set[str]:
        """Names of the backbone's parameters that do not train, wherever they are."""
        held = set()
        for prefix, module in self.backbone.named_modules():
            for own, _ in module.named_parameters(recurse=False):
                trains = {
                    "all": True,
                    "norm_only": is_norm(module),
                    "bitfit": own == "bias" or own.endswith("_bias"),
                    "lora": isinstance(module, LowRankLinear) and own in LowRankLinear.ADDED,
                }[only]
                if not trains or (batch_norm == "statistics" and isinstance(module, BatchNorm)):
                    held.add(f"{prefix}.{own}")
        return held

    def _nothing_trains(self, only: str, batch_norm: str, *, is_open: bool) -> str:
        if not is_open:
            return f"only {only!r} chooses among opened stages, but num_trainable_stages is 0; open some."
        found, do = {
            "norm_only": ("norms", "Train whole stages"),
            "bitfit": ("biases", "Train whole stages"),
            "lora": ("low-rank matrices", "Call add_lora first"),
        }[only]
        held = " that train with batch_norm 'statistics'" if batch_norm == "statistics" else ""
        return f"what is opened of {self.backbone.card.name} has no {found}{held}. {do}."

    def train(self, mode: bool = True) -> "Classifier":
        """Switch mode, but leave what is frozen in evaluation mode: its statistics must not drift."""
        super().train(mode)
        for name, module in self.backbone.named_modules():
            if name in self._still:
                module.training = False
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, H, W) to logits (B, K)."""
        return self.head(self.backbone(images))

    def trainable_names(self) -> tuple[str, ...]:
        """Names of the parameters that train, head and backbone, in the order of registration."""
        return tuple(name for name, parameter in self.named_parameters() if parameter.requires_grad)

    def trainable_parameters(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """The parameters that train, with their names, under `head` and `backbone`."""
        parts: dict[str, list[tuple[str, nn.Parameter]]] = {"head": [], "backbone": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parts[name.partition(".")[0]].append((name, parameter))
        return parts


def refuse_layers(backbone: Backbone, layers: Sequence[str]) -> None:
    """Nothing, where every name is a stage of the backbone or a layer in it.

    Raises:
        RecipeError: naming those that are not, with the nearest that are.
    """
    try:
        Classifier(backbone, nn.Identity()).freeze(0, layers=layers)
    except ValueError as fault:
        raise RecipeError(f"train.layers: {fault}") from fault


def stages_of_modules(backbone: Backbone) -> dict[str, int]:
    """The topmost stage that a module holds tensors of; without tensors, that of its surroundings.

    A dropout inside a block belongs to the block. One between stages (timm's `pos_drop`, `act1`) belongs
    to the stage that was registered before it.
    """
    stages: dict[str, int] = {}
    spans: dict[str, set[int]] = {}
    for name, stage in backbone.stage_of.items():
        parts = name.split(".")[:-1]
        for depth in range(len(parts) + 1):
            spans.setdefault(".".join(parts[:depth]), set()).add(stage)
    before = 0
    for name, _ in backbone.named_modules():
        parent = name.rpartition(".")[0]
        if name in spans:
            stages[name] = max(spans[name])
            before = min(spans[name]) if len(spans[name]) > 1 else stages[name]
        elif len(spans.get(parent, ())) > 1:
            stages[name] = before
        else:
            stages[name] = stages[parent]
    return stages


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a norm layer of torch, timm or torchvision, not a block that holds one."""
    if isinstance(module, BatchNorm | InstanceNorm | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return True
    # the others share no class, only a name; blocks that bear it too have layers inside
    return "Norm" in type(module).__name__ and not any(map(_holds_weights, module.children()))


def first_layer(backbone: Backbone) -> str:
    """Name of the module through which images come in: the first convolution, or what embeds patches."""
    stages = stages_of_modules(backbone)
    layers = (name for name, module in backbone.named_modules() if isinstance(module, Convolution | nn.Linear))
    return min(layers, key=lambda name: stages[name])


def _holds_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_within(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
