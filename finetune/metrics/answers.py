"""What a solved probe says of images, as it is handed to those who judge it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ProbeAnswers:
    """Probabilities by role: of test by the probe that a run ends on, of the others by one that never saw them."""

    by_role: dict[str, torch.Tensor]
    """(N, K) in float32 of val, test and calibration, in the order of the data set."""
    out_of_fold: torch.Tensor | None = None
    """(M, K) in float64, each labelled image by a probe that was solved without it; None where no folds were made."""
    rows: tuple[int, ...] = ()
    """The M images that were answered so, by number in the data set."""
