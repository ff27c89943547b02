"""Modes of modules, lent: each module has its own again afterwards, whatever was done to it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Let modes be changed inside; `model.train(was_training)` would forget what part of it was in which."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch `model` to evaluation mode inside."""
    with modes_kept(model):
        model.eval()
        yield
