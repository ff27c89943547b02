"""Batches whose images are blends or collages of two, with targets that say how much of each.

Each image of a batch draws a share of its own. The papers' code draws one per batch; the expected loss is the same,
but then a step is blended as a whole or hardly at all, and fine-tuning has too few steps to even that out. All is
drawn from a generator made of the seed. Torchvision's transforms move the global one, and so the dropout of every
later step, and below an alpha of 0.01 torch's Beta gives one half where it should give 0 or 1.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Mixing:
    """Mixup, CutMix, or for every batch one of the two.

    Zhang et al., ICLR 2018, https://arxiv.org/abs/1710.09412, and Yun et al., ICCV 2019,
    https://arxiv.org/abs/1905.04899. Mix a whole batch before it is cut into pieces: partners come from all of it.
    """

    mixup: float
    """Alpha of the Beta distribution of shares in a blend; 0: never."""
    cutmix: float
    """The same for pasted rectangles, by area before they are clipped at the border."""
    num_classes: int

    def __post_init__(self) -> None:
        if not (self.mixup >= 0 and self.cutmix >= 0):
            raise ValueError(f"mixup and cutmix must not be negative, got {self.mixup} and {self.cutmix}.")

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and targets (B, K) in float32, mixed; a function of the arguments alone, on any device.

        Args:
            images: (B, C, H, W), floating; left as they are.
            labels: (B,), integers in [0, K).
            seed: not negative; another one for every batch.

        Raises:
            ValueError: if the lengths differ, or images are not floating: bytes would be rounded.
        """
        if len(images) != len(labels):
            raise ValueError(f"there are {len(images)} images but {len(labels)} labels; they must match.")
        if not images.is_floating_point():
            raise ValueError(f"images must be floating to be mixed, got {images.dtype}; normalise them first.")
        targets = F.one_hot(labels, self.num_classes).float()  # (B, K)
        if not self.mixup and not self.cutmix:
            return images, targets
        random = np.random.Generator(np.random.PCG64(seed))
        pastes = random.random() < 0.5 if self.mixup and self.cutmix else self.cutmix > 0
        order = torch.from_numpy(random.permutation(len(images))).to(images.device)
        alpha = self.cutmix if pastes else self.mixup
        shares = random.beta(alpha, alpha, len(images))  # (B,), of the image itself
        if pastes:
            boxes, shares = _draw_boxes(random, shares, *images.shape[2:])
            mixed = torch.where(_inside(boxes, images), images[order], images)
        else:
            mixed = torch.lerp(images[order], images, _column(shares, images)[:, None, None])
        return mixed, torch.lerp(targets[order], targets, _column(shares, targets))


def _draw_boxes(
    random: np.random.Generator, shares: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (4, B) as top, bottom, left, right, and what their clipped areas leave of each image."""
    sides = []
    for length in (height, width):
        half = (length * np.sqrt(1 - shares) / 2).astype(np.int64)
        center = random.integers(0, length, len(shares))
        sides += [np.maximum(center - half, 0), np.minimum(center + half, length)]
    top, bottom, left, right = sides
    return np.stack(sides), 1 - (bottom - top) * (right - left) / (height * width)


def _inside(boxes: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W), true in the box of each image."""
    top, bottom, left, right = (torch.from_numpy(side).to(images.device)[:, None] for side in boxes)
    rows, columns = (torch.arange(length, device=images.device) for length in images.shape[2:])
    is_row, is_column = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (is_row[:, :, None] & is_column[:, None, :])[:, None]


def _column(shares: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """Shares as (B, 1), of the type and on the device of `like`."""
    return torch.from_numpy(shares).to(like)[:, None]
