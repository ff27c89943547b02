"""A guess of how logistic regression bends, class by class: what makes conjugate gradients on it few.

The curvature of class k along its weights is the mean over images of p (1 - p) x x', p the chance of the class. Few
images make most of it: those that the class is confused on. They are taken as they are; the mean of all others is
p (1 - p) times the covariance of the features. With 1,000 classes this takes a fourth of the products that one guess
for all classes (feature directions x class directions) does: see `benchmarks/LOG.md`.
"""

from collections.abc import Callable

import torch

CONFUSED, LEAST_CONFUSED, MOST_CONFUSED = 2, 8, 64
"""Images of each class that are taken as they are: this many times those of a mean class, at least, and at most."""
TILT = 1e-4
"""Share of the largest curvature that is added where rounding could make it negative in float32."""


def guess_inverse(
    features: torch.Tensor, variance: torch.Tensor, chances: torch.Tensor, l2: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What divides a slope (R + 1, C), weights and then the bias, by a guess of the Hessian.

    The sum of a diagonal and a few images is inverted by the formula of Sherman, Morrison and Woodbury.

    Args:
        features: (N, R) in float32, centred, in coordinates where their covariance is diagonal.
        variance: (R,) along them.
        chances: (N, C) of the classes.
        l2: penalty of the weights; the bias has none.
    """
    num, classes = chances.shape
    bends = (chances * (1 - chances)).T.div(num)  # (C, N)
    most = max(LEAST_CONFUSED, min(MOST_CONFUSED, CONFUSED * num // classes))
    top = bends.topk(min(num, most), dim=1)  # (C, M)
    whole = bends.sum(1)
    rest = (whole - top.values.sum(1)).clamp(min=0)  # (C,)
    root = torch.cat([rest[:, None] * variance + l2, (rest + TILT * whole + 1e-12)[:, None]], 1).rsqrt()  # (C, R + 1)
    images = features.new_ones(classes, top.indices.shape[1], len(variance) + 1)
    images[..., :-1] = features[top.indices]
    images *= top.values.sqrt()[..., None]
    images *= root[:, None]  # (C, M, R + 1)
    inner = images @ images.transpose(1, 2)  # (C, M, M)
    diagonal = inner.diagonal(dim1=1, dim2=2)
    diagonal += 1 + TILT * diagonal.amax(1, keepdim=True)
    factor = torch.linalg.cholesky(inner)

    def divide(slope: torch.Tensor) -> torch.Tensor:
        # What all classes have in common bends nothing, and the rounding in it would be divided by nothing.
        scaled = ((slope - slope.mean(1, keepdim=True)).T * root)[..., None]  # (C, R + 1, 1)
        scaled = scaled - images.transpose(1, 2) @ torch.cholesky_solve(images @ scaled, factor)
        divided = (scaled[..., 0] * root).T
        return divided - divided.mean(1, keepdim=True)

    return divide
