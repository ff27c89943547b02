"""Small classifiers and the steps that train them."""

import torch
from torch import nn

from finetune.config.decided import Rule
from finetune.config.plan import Stage
from finetune.models.classifier import Classifier
from finetune.training.losses import make_loss
from finetune.training.module import Finetuning, Step
from finetune.training.optimization import make_optimizer


class TinyBackbone(nn.Module):
    """Two stages with batch norm between them; the contract of a Backbone, as far as training reads it."""

    num_features, fixed_names = 4, frozenset()
    stages = ("stem", "top")

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.top = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        names = [name for name, _ in (*self.named_parameters(), *self.named_buffers())]
        self.stage_of = {name: 1 if name.startswith("top") else 0 for name in names}

    def forward(self, images):
        return self.top(self.norm(self.stem(images)).relu()).mean((2, 3))


def tiny_classifier(trainable_stages=2, batch_norm="frozen"):
    torch.manual_seed(0)
    classifier = Classifier(TinyBackbone(), nn.Linear(4, 3))
    classifier.freeze(trainable_stages, batch_norm=batch_norm)
    return classifier


STAGE = Stage(name="full", trainable_stages=2, epochs=2, lr_head=1e-2, lr_backbone=1e-3, batch_norm="frozen")


def _module(classifier, warnings, clip_norm=1e9):
    module = Finetuning(
        classifier,
        make_optimizer(classifier, STAGE, Rule(name="sgd", weight_decay=0.0)),
        Step(loss=make_loss("none", [7, 6, 6]), factor=lambda step: 1.0, clip_norm=clip_norm, seed=0),
        warn=warnings.append,
    )
    module.manual_backward = lambda loss: loss.backward()
    return module


class ShortOfMemory(nn.Module):
    """A model on a machine that holds `limit` images at a time."""

    def __init__(self, inner, limit):
        super().__init__()
        self.inner, self.limit, self.backbone = inner, limit, inner.backbone

    def forward(self, images):
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory (drill)")
        return self.inner(images)
