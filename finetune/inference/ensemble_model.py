"""Averages: several networks as one module."""

from collections.abc import Sequence

import torch
from torch import nn

from finetune.compute import exact
from finetune.config.card import View
from finetune.metrics.selection import AVERAGES


class Ensemble(nn.Module):
    """Several classifiers, and logits whose softmax is the average of what they say of the same tensor of images."""

    def __init__(
        self,
        members: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        average: str = "probability",
        views: Sequence[View] = (),
    ) -> None:
        """Hold `members`, weighted alike or by `weights`, and average as `finetune.metrics.selection.average` does.

        Args:
            members: one or more.
            weights: of each, positive; None: all alike.
            average: one of `AVERAGES`.
            views: how each looks at an image; none: it does not matter here.

        Raises:
            ValueError: if there is no member, not one positive weight or view each, or the average is unknown.
        """
        super().__init__()
        weights = [1.0] * len(members) if weights is None else list(weights)
        if not members or len(weights) != len(members) or min(weights) <= 0:
            raise ValueError(f"{len(members)} members need as many positive weights, got {weights}.")
        if views and len(views) != len(members):
            raise ValueError(f"{len(members)} members need as many views, got {len(views)}.")
        if average not in AVERAGES:
            raise ValueError(f"average must be one of {', '.join(AVERAGES)}, got {average!r}.")
        self.members, self.average, self.views = nn.ModuleList(members), average, tuple(views)
        shares = torch.tensor(weights, dtype=torch.float64)
        self.weights = shares / shares.sum()  # no buffer, for it stays in float64, which not every device has

    @property
    def backbone(self) -> nn.Module:
        """That of the first member, for whoever asks what kind of network this is."""
        return self.members[0].backbone  # type: ignore[return-value]

    @property
    def is_mixed(self) -> bool:
        """Whether members look at an image in different views, so that no one tensor suits them all."""
        return len(set(self.views)) > 1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, H, W) to logits (B, K), float32. Of one member, or equal ones, they are its own.

        Raises:
            ValueError: if the members look at images in different views.
        """
        if self.is_mixed:
            raise ValueError(
                "the members of this ensemble look at images of different sizes, crops or constants, so one tensor "
                "cannot suit them all; `open_viewer` prepares an image for each."
            )
        logits = torch.stack([exact(member(images)) for member in self.members])  # (M, B, K)
        weights = self.weights.to(logits.device)
        ahead = logits.log_softmax(2)
        ahead = ahead - ahead[:1]  # from the first member on, so that nothing is added to it where all say the same
        if self.average == "logit":
            gain = (weights[:, None, None] * ahead).sum(0)
        else:
            gain = torch.logsumexp(ahead + weights.log()[:, None, None], 0)
        return (logits[0] + gain).float().to(images.device)
