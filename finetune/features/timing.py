"""What a training step costs on this machine, by how much of the network trains: a few real steps on real images.

The steps are taken by a copy, so nothing is learned. Memory is counted, not guessed: what the backward pass keeps, and
what gradients and optimizer need.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from finetune.compute import Compute
from finetune.config.card import View
from finetune.config.facts import TimingFacts
from finetune.data.loading import normalize
from finetune.models.backbones import Backbone
from finetune.models.classifier import Classifier
from finetune.models.folding import fold

SECONDS = 1.0
"""About what the timing of one depth may take; larger networks are timed on fewer images."""
STEPS = 2
"""Timed after one that warms up; the faster counts."""
NORMS = "norm_only"
"""Instead of a number of stages: norms and biases everywhere, and the head (Zaken et al., BitFit, ACL 2022)."""


def time_training(
    backbone: Backbone,
    crops: np.ndarray,
    view: View,
    *,
    num_classes: int,
    depths: Sequence[int],
    batch_size: int,
    compute: Compute,
) -> tuple[float, tuple[TimingFacts, ...]]:
    """Images per second of a forward pass, and the cost of a training step for each number of top stages.

    Args:
        backbone: stays as it is.
        crops: (N, H, W, 3) uint8; repeated where there are fewer than a batch.
        view: how they are normalised.
        num_classes: K, the outputs of the head.
        depths: numbers of trained top stages; norms and biases alone are timed last, whatever these are.
        batch_size: images per step that memory is counted for.
        compute: where, and in which precision.
    """
    device = compute.device
    model = copy.deepcopy(backbone).to(device).to(memory_format=torch.channels_last)
    classifier = Classifier(model, nn.Linear(model.num_features, num_classes).to(device))
    few = _take(crops, 4, view, device)
    with torch.no_grad(), compute.autocast():
        classifier(few)
        speed = 4 / _seconds(lambda: classifier(few), compute)
        size = max(2, min(batch_size, int(speed * SECONDS / (4 * (STEPS + 1)))))
        images = _take(crops, size, view, device)
        forward = size / min(_seconds(lambda: classifier(images), compute) for _ in range(STEPS))
        folding = fold(model, size_pixels=few.shape[-1], device=device, precision=compute.precision)
    labels = torch.arange(size, device=device) % num_classes
    rows = []
    wanted: list[int | str] = [*depths, NORMS]
    for depth in wanted:
        _set_trainable(classifier, depth)
        parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-9)
        kept = [_step(classifier, images, labels, optimizer, compute, folding)]  # warms up, and is counted
        best = min(
            _seconds(lambda: _step(classifier, images, labels, optimizer, compute, folding), compute)  # noqa: B023
            for _ in range(STEPS)
        )
        own = 4 * 3 * sum(parameter.numel() for parameter in parameters)  # gradient and two moments
        rows.append(
            TimingFacts(
                trains=str(depth),
                images_per_second=size / best,
                memory_mb=(kept[0][0] / size * batch_size + kept[0][1] + own) / 1e6,
                image_mb=kept[0][0] / size / 1e6,
                batch_size=batch_size,
            )
        )
    return forward, tuple(rows)


def _step(
    classifier: Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    compute: Compute,
    folding: Callable[[], AbstractContextManager[None]],
) -> tuple[int, int]:
    """One step as training takes it; bytes that its backward pass kept of the images, and beside them.

    Weights are not counted, but folded ones are: they are made anew in each step.
    """
    of_images: dict[int, int] = {}
    beside: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in classifier.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kind = of_images if tensor.shape[:1] == images.shape[:1] else beside
            kind[storage.data_ptr()] = storage.nbytes()
        return tensor

    classifier.train()
    optimizer.zero_grad(set_to_none=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        compute.autocast(),
        folding(),
    ):
        loss = F.cross_entropy(classifier(images).float(), labels)
    loss.backward()
    nn.utils.clip_grad_norm_((group for group in optimizer.param_groups[0]["params"]), math.inf)
    optimizer.step()
    return sum(of_images.values()), sum(size for place, size in beside.items() if place not in of_images)


def _set_trainable(classifier: Classifier, depth: int | str) -> None:
    if depth != NORMS:
        classifier.freeze(int(depth))
        return
    classifier.freeze(len(classifier.backbone.stages))
    for parameter in classifier.backbone.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.ndim <= 1)


def _take(crops: np.ndarray, count: int, view: View, device: str) -> torch.Tensor:
    rows = np.arange(count) % len(crops)
    return normalize(torch.from_numpy(crops[rows]).to(device), view)


def _seconds(work: Callable[[], object], compute: Compute) -> float:
    compute.wait()
    began = time.perf_counter()
    work()
    compute.wait()
    return time.perf_counter() - began
