"""WiSE-FT: what ships lies on the line between the weights that training began from and those that it ended with.

Training at a rate that learns enough from few images also forgets: accuracy rises, and answers grow surer than they
are right. A mixture with the start, which is the pretrained backbone under its probe, keeps most of the gain and gives
back the calibration, at the cost of one network (Wortsman et al., CVPR 2022, equation 1,
https://arxiv.org/abs/2109.01903, whose start has a zero-shot head in the place of our probe).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from finetune.compute import exact


class StartMixture:
    """(1 - share) of the start and `share` of the trained weights, for those that train."""

    def __init__(self, start: Mapping[str, torch.Tensor], share: float) -> None:
        """Keep the start to mix with.

        Args:
            start: parameters by the classifier's names.
            share: of the trained weights, in (0, 1).

        Raises:
            ValueError: if `share` lies outside its range.
        """
        if not 0 < share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {share}.")
        self.share, self._start = share, dict(start)

    @contextmanager
    def swapped(self, classifier: nn.Module) -> Iterator[None]:
        """Within it, `classifier` holds the mixture; afterwards it is what it was, bit for bit."""
        live = {name: weight for name, weight in classifier.named_parameters() if weight.requires_grad}
        ends = {name: weight.detach().clone() for name, weight in live.items()}
        try:
            with torch.no_grad():
                for name, weight in live.items():
                    start = self._start[name].to(weight.device)
                    weight.copy_(torch.lerp(exact(start), exact(weight), self.share))
            yield
        finally:
            with torch.no_grad():
                for name, weight in live.items():
                    weight.copy_(ends[name])
