"""Keys of a recipe: how training images vary, the new head, and what holds training back."""

from typing import Annotated, Literal

from pydantic import Field

from finetune.config.section import Section, Share, Text

Preset = Literal["none", "light", "medium", "heavy"]
Domain = Literal["natural", "document", "medical", "fine", "tiny"]


class AugmentSpec(Section):
    """How training images are varied. Flips and rotations follow `data.invariances` and `data.flip_label_pairs`."""

    preset: Preset | None = None
    """Strength of the random changes."""
    domain: Domain | None = None
    """Kind of images, which sets what is changed at all: photos, documents, medical or other images without an up,
    classes that differ in details, or tiny images."""
    crop: Literal["area", "scale"] = "area"
    """Random part of the image and of its shape, resized; or the whole image at a random scale, then a crop."""
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation to either side; corners mirror the image."""
    pca_color: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Deviation of shifts along the principal colours of the training images (AlexNet: 0.1)."""
    policy: Literal["none", "trivial", "rand"] = "none"
    """Automatic policy: one random operation at random strength, or two at a fixed one."""
    cutout: Share = 0.0
    """Side of a grey square (cutout) over that of the image; the preset `heavy` has one of its own."""
    mixup: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Alpha of the Beta distribution from which blends of two images and their labels are drawn; 0: never."""
    cutmix: Annotated[float, Field(ge=0, le=10)] = 0.0
    """The same for pasting a rectangle of one image into another."""


class HeadSpec(Section):
    """The new classification layer."""

    kind: Literal["linear", "mlp", "cosine"] = "linear"
    """One linear layer; one hidden layer and a linear one; or the cosine to one direction per class, scaled."""
    hidden: Annotated[int, Field(ge=1)] = 512
    """Units of the hidden layer of `mlp`."""
    activation: Text = "relu"
    """Of the hidden layer of `mlp`."""
    init: Literal["probe", "zero", "small", "uniform", "xavier", "kaiming", "model"] | None = None
    """Start from the probe, from zero, from N(0, 0.01^2), from a named rule, or from the architecture's own."""
    bias: float = 0.0
    """Of the hidden units of `mlp` at the start; a little above 0 keeps ReLU units awake."""
    dropout: Share = 0.0
    """Share of features dropped before each linear layer, in training only."""
    drop_connect: Share = 0.0
    """Share of the head's weights dropped, anew for every image, in training only."""


class RegularizationSpec(Section):
    """What holds training back; all of it is off at test."""

    label_smoothing: Share = 0.0
    """Share of the target that goes to all classes alike."""
    stochastic_depth: Share = 0.0
    """Share of passes in which the last residual block is skipped; lower blocks in proportion to their depth."""
    channel_dropout: Share = 0.0
    """Share of whole feature maps dropped between the trained stages of the backbone."""
    fractional_pooling: bool = False
    """Pool the last maps over regions that move in training and are fixed at test; for tops drawn anew."""
    l2_sp: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Pull of pretrained weights back to where they began, instead of to zero."""
