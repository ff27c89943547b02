"""Small networks for tests of averaging."""

import torch

from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import make_head


def make_classifier(name="test_resnet", *, batch_norm="train", stages=None):
    torch.manual_seed(0)
    backbone = load_backbone(name, zoo={}, pretrained=False)
    classifier = Classifier(backbone, make_head(backbone.num_features, 3, init="small"))
    classifier.freeze(len(backbone.stages) if stages is None else stages, batch_norm=batch_norm)
    return classifier.train()


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_same(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
