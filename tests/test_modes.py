"""Evaluation mode that is lent."""

import pytest
from torch import nn

from finetune.models.modes import evaluating, modes_kept


@pytest.fixture
def model():
    """In training, but for a part that is held still."""
    made = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(1)))
    made.train()[1][1].eval()
    return made


def modes(model):
    return [module.training for module in model.modules()]


def test_every_module_evaluates_inside_and_has_its_own_mode_afterwards(model):
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model))
    assert modes(model) == before == [True, True, True, True, False]


def test_modes_come_back_after_an_error_too(model):
    before = modes(model)
    with pytest.raises(KeyError), modes_kept(model):
        model.train()
        raise KeyError
    assert modes(model) == before
