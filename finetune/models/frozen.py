"""A backbone made fast for looking: convolutions fused with batch norm, and every depth seen in one forward pass.

Which convolution feeds which batch norm is watched, not guessed from names, and the fused network must give what the
whole one gives or it is not used; so any architecture may come.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_weights

from finetune.models.backbones import Backbone
from finetune.models.classifier import stages_of_modules
from finetune.models.folding import TOLERANCE, example_images, layers_after, watch_pairs
from finetune.models.layers import BatchNorm


class FrozenBackbone:
    """Pooled features of every stage, in evaluation mode, without gradients. Holds a copy where it fuses."""

    def __init__(self, backbone: Backbone, *, size_pixels: int, device: str | torch.device) -> None:
        self.depths = len(backbone.stages)
        """Answers per image: one for each stage from the stem, where the last is the pooled top."""
        self._model = _fused(backbone.eval().to(device), example_images(size_pixels, device))
        self._model.to(memory_format=torch.channels_last)
        self._ends = _stage_ends(backbone, self._model)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Map images (B, 3, H, W) to features (B, D_k) for each depth k, in float32; the last is the pooled top.

        A stage that shows no tensor of its own repeats the one below it.
        """
        seen: dict[int, torch.Tensor] = {}

        def remember(stage: int) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if isinstance(output, torch.Tensor) and output.ndim >= 2:
                    seen[stage] = output  # the last one of a stage stays

            return hook

        handles = [module.register_forward_hook(remember(stage)) for module, stage in self._ends]
        try:
            top = self._model(images)
        finally:
            for handle in handles:
                handle.remove()
        answers: list[torch.Tensor] = []
        for stage in range(self.depths - 1):
            answers.append(pool(seen[stage]).float() if stage in seen else answers[-1] if answers else top.float())
        return [*answers, top.float()]


def pool(features: torch.Tensor) -> torch.Tensor:
    """Mean over positions: (B, C, H, W), (B, H, W, C) or (B, T, C) to (B, C). Square maps are taken for granted."""
    if features.ndim == 4:
        is_channels_last = features.shape[1] == features.shape[2] != features.shape[3]
        return features.mean((1, 2) if is_channels_last else (2, 3))
    return features.mean(1) if features.ndim == 3 else features.flatten(1)


def _stage_ends(backbone: Backbone, model: nn.Module) -> list[tuple[nn.Module, int]]:
    """The largest modules that belong to one stage as a whole; the last of them to run gives the stage's output."""
    spans: dict[str, set[int]] = {}
    for name, stage in stages_of_modules(backbone).items():
        parts = name.split(".")
        for length in range(len(parts) + 1):
            spans.setdefault(".".join(parts[:length]), set()).add(stage)
    whole = {name: next(iter(stages)) for name, stages in spans.items() if len(stages) == 1}
    return [
        (module, whole[name])
        for name, module in model.named_modules()
        if name in whole and name.rpartition(".")[0] not in whole
    ]


def _fused(backbone: Backbone, example: torch.Tensor) -> Backbone:
    """`backbone` with its convolutions fused; itself where there is nothing to fuse or it does not come out right."""
    names = {module: name for name, module in backbone.named_modules()}
    stage_of = stages_of_modules(backbone)
    with torch.no_grad():
        watched, expected = watch_pairs(backbone, example)
        pairs = [(names[conv], names[norm]) for conv, norm in watched]
        # between two stages the convolution's own output is what the lower one shows
        pairs = [(conv, norm) for conv, norm in pairs if stage_of[conv] == stage_of[norm]]
        if not pairs:
            return backbone
        fused = copy.deepcopy(backbone)
        for conv, norm in pairs:
            _fuse(fused, conv, norm)
        error = (fused(example) - expected).abs().max() / expected.std().clamp(min=1e-12)
    return fused if float(error) < TOLERANCE else backbone


def _fuse(model: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNorm)
    assert norm.running_mean is not None and norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.weight, conv.bias = weight, bias
    rest = layers_after(norm)
    parent, _, leaf = norm_name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Sequential(*rest) if rest else nn.Identity())
