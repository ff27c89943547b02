"""The loss of each training image, and what it does about classes that have far more images than others.

Losses come per image and are summed over a batch and divided by its size, never by its weights: then a batch cut into
pieces has the gradient of the whole, and the weights, whose mean over the training images is 1, leave the rate its
meaning. Torch divides by the weights of the piece at hand.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

Kind = Literal["none", "inverse", "effective", "sampler", "logit_adjustment", "focal"]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From logits (B, K) and labels (B,) or targets (B, K) to the losses (B,), in nats."""


def make_loss(
    kind: Kind, counts: Sequence[int], *, smoothing: float = 0.0, gamma: float = 2.0, beta: float = 0.999
) -> Loss:
    """Cross-entropy, changed as `kind` says, from logits (B, K) and labels (B,) or targets (B, K) to losses (B,).

    `none` and `sampler` change nothing. `inverse` and `effective` weight images by class: see `class_weights`.
    `logit_adjustment` adds `log_priors` to the logits, in training only, so that the bare logits rank classes as if all
    were equally common: Menon et al., ICLR 2021, https://arxiv.org/abs/2007.07314, section 5. `focal` turns down images
    that are already right, by (1 - p)^gamma: Lin et al., ICCV 2017, https://arxiv.org/abs/1708.02002, over the softmax
    instead of sigmoids, and without class weights. A mixed target is weighted share by share, as if the image stood
    in the batch once for each of its labels.

    Args:
        kind: one of `ImbalanceSpec.kind`.
        counts: training images of each of the K classes.
        smoothing: share of every target that goes to all classes alike, after weighting: Szegedy et al., CVPR 2016,
            https://arxiv.org/abs/1512.00567, section 7. Torch weights afterwards, and a common class is then told
            that its images are mostly of the rare one.
        gamma: of `focal`; 0 is plain cross-entropy.
        beta: of `effective`.

    Raises:
        ValueError: if an argument is out of its range; from the loss, if logits or targets do not have K columns.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1), got {smoothing}.")
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}.")
    weights = class_weights(kind, counts, beta=beta)
    shift = log_priors(counts) if kind == "logit_adjustment" else torch.zeros(len(counts))
    power = gamma if kind == "focal" else 0.0

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        shares = F.one_hot(targets, len(counts)) if targets.ndim == 1 else targets
        if not logits.shape == shares.shape == (len(logits), len(counts)):
            raise ValueError(
                f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit {len(counts)} classes."
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weighted = shares * weights.to(logits)  # (B, K)
        smoothed = torch.lerp(weighted, weighted.mean(1, keepdim=True).expand_as(weighted), smoothing)
        if power:
            smoothed = smoothed * _doubt(logits) ** power
        return F.cross_entropy(logits + shift.to(logits), smoothed, reduction="none")

    return loss


def class_weights(kind: Kind, counts: Sequence[int], *, beta: float = 0.999) -> torch.Tensor:
    """(K,) in float64: what an image of each class counts, 1 on average over the training images; 0 if there are none.

    `inverse`: one over the images of the class. `effective`: one over their effective number (1 - beta^n) / (1 - beta),
    which grows no further once new images only repeat old ones: Cui et al., CVPR 2019,
    https://arxiv.org/abs/1901.05555. All other kinds weight all images alike.

    Raises:
        ValueError: if no class has an image, a count is negative, or `beta` is not in [0, 1).
    """
    if min(counts, default=0) < 0 or not any(counts):
        raise ValueError(f"counts must hold an image and nothing negative, got {list(counts)}.")
    if not 0 <= beta < 1:
        raise ValueError(f"beta must lie in [0, 1), got {beta}.")
    images = torch.tensor(counts, dtype=torch.float64)
    if kind == "inverse":
        weights = 1 / images
    elif kind == "effective":
        weights = -1 / torch.expm1(images * torch.tensor(beta, dtype=torch.float64).log())
    else:
        weights = torch.ones_like(images)
    weights = torch.where(images > 0, weights, 0.0)
    return weights * images.sum() / (weights @ images)


def log_priors(counts: Sequence[int]) -> torch.Tensor:
    """(K,) in float64: log of the share of each class among the training images.

    Taken from the bias of a model that was trained plainly, it gives what `logit_adjustment` trains for: Menon et al.,
    section 4. A class without images counts as if it had one, for minus infinity could not be trained.
    """
    images = torch.tensor(counts, dtype=torch.float64).clamp(min=1)
    return (images / images.sum()).log()


def _doubt(logits: torch.Tensor) -> torch.Tensor:
    """1 - p by class, (B, K), with full precision near 0, and never 0: roots have no gradient there."""
    return (-torch.expm1(logits.log_softmax(1))).clamp(min=torch.finfo(logits.dtype).tiny)
