"""Changes of a view that we make ourselves: principal colours, the user's own function, cutout.

Each takes a view (S, S, 3) uint8 and a generator, draws from that generator alone, and leaves the view as it is.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np

CUTOUT_GREY = 127

OwnChange = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""The user's function: a view (S, S, 3) uint8 and a generator in, such a view out."""


@dataclass(frozen=True, kw_only=True)
class ColorShift:
    """A random shift of all pixels along the principal colours of the training images.

    Krizhevsky et al., NeurIPS 2012, section 4.1,
    https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks.
    albumentations' `FancyPCA` fits the colours of each image anew, which is another thing. Eigenvalues are variances,
    so the formula depends on the unit of colour: here it is pixels / 255.
    """

    eigenvalues: tuple[float, float, float]
    """Of the covariance of red, green and blue, in units of pixels / 255."""
    eigenvectors: tuple[tuple[float, float, float], ...]
    """Rows are red, green and blue; column k belongs to eigenvalue k."""
    deviation: float
    """Standard deviation of the weights; 0.1 in the paper."""

    def draw(self, numbers: np.random.Generator) -> np.ndarray:
        """One shift (3,), in units of pixels / 255: `P (a * lambda)` with `a ~ N(0, deviation^2)`."""
        weights = numbers.normal(0.0, self.deviation, 3)
        shift: np.ndarray = np.asarray(self.eigenvectors) @ (weights * np.asarray(self.eigenvalues))
        return shift

    def change(self, view: np.ndarray, numbers: np.random.Generator) -> np.ndarray:
        """`view` (S, S, 3) uint8 with one shift added to every pixel; values end at 0 and 255."""
        changed: np.ndarray = np.clip(np.rint(view + 255 * self.draw(numbers)), 0, 255).astype(np.uint8)
        return changed


class CheckedChange:
    """The user's change, held to its contract; seeds are tried at the first call of each process."""

    def __init__(self, change: OwnChange, name: str) -> None:
        self.change = change
        self.name = name
        self.is_proven = False

    def __call__(self, view: np.ndarray, numbers: np.random.Generator) -> np.ndarray:
        """The changed view.

        Raises:
            ValueError: if the answer is no view, or at the first call differs between two equal generators.
        """
        answer = self._run(view, deepcopy(numbers))
        if not self.is_proven:
            if not np.array_equal(answer, self._run(view, deepcopy(numbers))):
                raise self._fault("gives two answers for one image and one seed", "draw from its second argument alone")
            if answer.max() == 1 and view.max() > 1:
                raise self._fault(f"turns values up to {view.max()} into 0 and 1", "multiply by 255 at the end")
            self.is_proven = True
        return answer

    def _run(self, view: np.ndarray, numbers: np.random.Generator) -> np.ndarray:
        answer = self.change(view.copy(), numbers)  # it may write; the view may be the store's own pixels
        if not isinstance(answer, np.ndarray):
            raise self._fault(f"returns {type(answer).__name__}", "return an array")
        if answer.shape != view.shape:
            raise self._fault(f"turns shape {view.shape} into {answer.shape}", "keep the shape")
        if answer.dtype != np.uint8:
            got = f"returns {answer.dtype} from {answer.min()} to {answer.max()} instead of uint8 from 0 to 255"
            raise self._fault(got, "round, clip to [0, 255] and return .astype(np.uint8)")
        return answer

    def _fault(self, got: str, do: str) -> ValueError:
        return ValueError(f"augmentation, own change {self.name}: it {got}; {do}.")


def cut_out(view: np.ndarray, numbers: np.random.Generator, side: int) -> np.ndarray:
    """`view` with one grey square; its centre may be any pixel, so that it may be clipped."""
    height, width = view.shape[:2]
    top, left = numbers.integers(0, height) - side // 2, numbers.integers(0, width) - side // 2
    answer = view.copy()
    answer[max(top, 0) : top + side, max(left, 0) : left + side] = CUTOUT_GREY
    return answer
