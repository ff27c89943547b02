"""Where to operate: the stage of the backbone whose weights the new images pull at hardest.

A shift of the pixels calls for the low stages, one of the classes for the high ones; gradients tell which,
measured against the weights they would move.
"""

import itertools
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch.func import functional_call

from finetune.models.classifier import Classifier
from finetune.models.layers import BatchNorm
from finetune.models.modes import evaluating


def relative_gradients(
    classifier: Classifier, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], *, num_batches: int = 5
) -> dict[str, float]:
    """How large gradients are for the weights they would move, by stage of the backbone from the stem.

    The mean over batches of ||gradient|| / ||weight||, for every tensor, averaged over the tensors of a stage: Auto-RGN
    of Lee et al., ICLR 2023, https://arxiv.org/abs/2210.11466. Gradients are those of cross-entropy in evaluation mode.
    The head, batch norm, and tensors that are zero or that the loss does not reach are left out, and so are stages
    without any other. Only proportions mean something: a loss twice as large doubles every answer.

    Args:
        classifier: with a head that has been solved for these classes, such as the probe's: a zero head sends no
            gradient down. No weight, buffer, gradient or mode of it is changed.
        batches: images (B, 3, H, W) and labels (B,), on the classifier's device.
        num_batches: how many are looked at, at most.

    Raises:
        ValueError: if there are no batches.
    """
    backbone = classifier.backbone
    skipped = {
        f"{prefix}.{own}"
        for prefix, module in backbone.named_modules()
        if isinstance(module, BatchNorm)
        for own, _ in module.named_parameters(recurse=False)
    } | backbone.fixed_names
    # twins that share the memory, so that the classifier's own tensors keep what they require and hold
    weights = {
        name: parameter.detach().requires_grad_()
        for name, parameter in backbone.named_parameters()
        if name not in skipped and bool(parameter.any())
    }
    sums: dict[str, float] = {}
    seen = 0
    with evaluating(classifier):
        for images, labels in itertools.islice(batches, num_batches):
            seen += 1
            for name, ratio in _ratios(classifier, weights, images, labels).items():
                sums[name] = sums.get(name, 0.0) + ratio
    if not seen:
        raise ValueError("batches is empty, so there are no gradients to compare.")
    by_stage: dict[str, list[float]] = {stage: [] for stage in backbone.stages}
    for name, total in sums.items():
        by_stage[backbone.stages[backbone.stage_of[name]]].append(total / seen)
    return {stage: sum(ratios) / len(ratios) for stage, ratios in by_stage.items() if ratios}


def _ratios(
    classifier: Classifier, weights: Mapping[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor
) -> dict[str, float]:
    swapped = {f"backbone.{name}": weight for name, weight in weights.items()}
    with torch.enable_grad():
        loss = F.cross_entropy(functional_call(classifier, swapped, (images,)), labels)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {
        name: float(gradient.norm() / weight.detach().norm())
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        if gradient is not None
    }
