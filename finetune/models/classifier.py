"""The classifier: a backbone and a head, where what is frozen stays still.

Frozen means three things at once: no gradient (and no `grad` for decay or momentum to act on), batch
norm and dropout in evaluation mode, and both still so after anyone calls `train()`.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.models.backbones import Backbone

BATCH_NORM = ("frozen", "train")


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

    def freeze(self, num_trainable_stages: int, *, batch_norm: str = "frozen") -> None:
        """Let the head and the top stages train, and hold everything below them still.

        Args:
            num_trainable_stages: 0 trains the head alone, `len(backbone.stages)` everything.
            batch_norm: `frozen` keeps batch norm of trainable stages at its pretrained statistics
                (its scale and shift still train); `train` lets the statistics follow the new images.

        Raises:
            ValueError: if there are fewer stages, or `batch_norm` is unknown.
        """
        total = len(self.backbone.stages)
        if not 0 <= num_trainable_stages <= total:
            raise ValueError(f"num_trainable_stages must lie in 0 to {total}, got {num_trainable_stages}.")
        if batch_norm not in BATCH_NORM:
            raise ValueError(f"batch_norm must be one of {', '.join(BATCH_NORM)}, got {batch_norm!r}.")
        first = total - num_trainable_stages
        for name, parameter in self.backbone.named_parameters():
            trains = self.backbone.stage_of[name] >= first and name not in self.backbone.fixed_names
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None  # a left-over gradient would let decay and momentum move it
        self.num_trainable_stages = num_trainable_stages
        self._still = frozenset(
            name
            for name, module in self.backbone.named_modules()
            if self._stage_of_module[name] < first or (batch_norm == "frozen" and isinstance(module, _BatchNorm))
        )
        self.train(self.training)

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
