"""What a Python program hands in for training: its own change of images, its own loss, and listeners of Lightning's."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune.training.losses import Loss
from finetune.training.setup import Vary

OwnLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From logits (B, K) and labels (B,), or targets (B, K) where images are mixed, to losses (B,) or their mean."""


@dataclass(frozen=True, kw_only=True)
class OwnTraining:
    """Handed in by a program; nothing of it is kept."""

    vary: Vary | None = None
    loss: OwnLoss | None = None
    callbacks: tuple[object, ...] = ()
    """Of Lightning, as `callbacks.refuse_callbacks` lets them pass."""
    logger: object | None = None
    """Of Lightning, or several."""
    states: tuple[dict[str, Any], ...] = ()
    """Of each callback, when it was handed in: every stage begins with it."""


NOTHING = OwnTraining()


def loss_by_image(loss: OwnLoss) -> Loss:
    """A loss that was handed in, as losses (B,) in float32: a mean counts for each image of a pass.

    A module is copied, and its copy follows the logits to their device.

    Raises:
        ValueError: from the loss, if its answer is neither.
    """
    own = copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss

    def by_image(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if isinstance(own, nn.Module):
            own.to(logits.device)
        answer = own(logits, targets)
        if not isinstance(answer, torch.Tensor) or answer.shape not in ((), (len(logits),)):
            got = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
            raise ValueError(
                f"loss= answers {got} for logits {tuple(logits.shape)} and targets {tuple(targets.shape)}; give a loss "
                f"for each image, ({len(logits)},), or their mean, a tensor without dimensions."
            )
        return answer.float().expand(len(logits))

    return by_image
