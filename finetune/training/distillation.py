"""Distillation: the word of a finished classifier in the loss of one that trains.

The teacher looks at the very pixels of the step, varied and mixed, and never at stored answers for plain images: it
then teaches a function and not a table (Beyer et al., CVPR 2022, https://arxiv.org/abs/2106.05237, section 3).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from finetune.compute import Compute
from finetune.config.card import View
from finetune.config.plan import Plan


class Teacher(nn.Module):
    """A finished classifier that answers to the student's images: always in eval mode, and without gradients."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, network: nn.Module, own: View, student: View) -> None:
        """Hold `network`, which knows images as `own` normalises them and is given those of `student`."""
        super().__init__()
        self.network = network.requires_grad_(False)
        self.is_normalized_alike = (own.mean, own.std) == (student.mean, student.std)
        constants = torch.tensor([own.mean, own.std, student.mean, student.std], dtype=torch.float64)
        mean, std, given_mean, given_std = constants[:, :, None, None]  # (3, 1, 1) each
        self.register_buffer("scale", (given_std / std).float(), persistent=False)
        self.register_buffer("shift", ((given_mean - mean) / std).float(), persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode, whatever is asked for."""
        return super().train(False)

    @torch.no_grad()  # answers under inference_mode could not be kept for the student's gradient
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map the student's images (B, C, H, W) to logits (B, K), float32."""
        if not self.is_normalized_alike:
            images = torch.addcmul(self.shift, images, self.scale)
        logits: torch.Tensor = self.network(images)
        return logits.float()


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a teacher makes of the loss of each image."""

    teacher: Callable[[torch.Tensor], torch.Tensor]
    """From images (B, C, H, W) to logits (B, K)."""
    temperature: float
    weight: float
    """Share of the teacher's term, in [0, 1]."""

    def __call__(self, losses: torch.Tensor, logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Losses (B,) of the labels, mixed with those of the teacher.

        Args:
            losses: (B,), in nats.
            logits: (B, K) of the student, as it will be shipped: without the priors that a loss may add.
            images: (B, C, H, W), which the student has seen.
        """
        soft = soft_losses(logits, self.teacher(images), self.temperature)
        return (1 - self.weight) * losses + self.weight * soft


def soft_losses(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """(B,) in nats: `T^2 KL(teacher || student)`, both softened by the temperature T.

    Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2. Their cross-entropy has the same gradient; the
    divergence is 0 where the two agree. T^2 keeps the size of gradients, which soften as 1/T^2.

    Args:
        logits: (B, K) of the student.
        teacher_logits: (B, K).
        temperature: T, above 0.

    Raises:
        ValueError: if the shapes differ: one row would silently be compared with all.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and the teacher's {tuple(teacher_logits.shape)} must match.")
    kind = torch.promote_types(logits.dtype, torch.float32)
    ours, theirs = ((part.to(kind) / temperature).log_softmax(1) for part in (logits, teacher_logits))
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)


def make_distillation(plan: Plan, teacher: nn.Module | None) -> Distillation | None:
    """What the plan wants of `teacher`, which is moved to the plan's device; None where it wants none.

    Raises:
        ValueError: if the plan names a teacher and none is given, or the other way round.
    """
    spec = plan.train.distillation
    if (spec.teacher is None) != (teacher is None):
        raise ValueError(f"the plan's teacher is {spec.teacher}, and the one given is {type(teacher).__name__}.")
    if teacher is None:
        return None
    device = Compute.of(plan.hardware).device
    return Distillation(teacher=teacher.to(device), temperature=spec.temperature, weight=spec.weight)
