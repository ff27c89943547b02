"""Facts as a survey would give them, for tests of what follows from them."""

from finetune.config.card import View
from finetune.config.facts import (
    BackboneFacts,
    Facts,
    MachineFacts,
    NeighbourFacts,
    PerClass,
    ProbeFacts,
    SimilarityFacts,
)
from finetune.config.measures import Proportion


def make_facts(
    *, per_class=500, similarity=0.9, probe=0.9, low=0.85, device="cpu", has_batch_norm=True, calibration=60, val=70
):
    share = Proportion(value=probe, low=low, high=min(1.0, probe + 0.05), n=200)
    return Facts(
        root="/data/flowers",
        kind="folders",
        classes=("a", "b", "c"),
        counts={
            "train": (per_class,) * 3,
            "val": (val,) * 3,
            "calibration": (calibration // 3,) * 3,
            "test": (70,) * 3,
        },
        num_images=3 * per_class + 480,
        split_digest="d" * 32,
        median_width=320,
        median_height=240,
        images_per_class=PerClass(min=per_class, median=per_class, max=per_class),
        backbone=BackboneFacts(
            name="resnet18",
            params_m=11.2,
            num_features=512,
            stages=("stem", "layer1", "layer2", "layer3", "layer4"),
            pretrained_on="ImageNet-1k",
            input_size=224,
            licence="Apache-2.0",
            has_batch_norm=has_batch_norm,
            weights_digest="w" * 64,
        ),
        view=View(size_pixels=128, shorter_pixels=146, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3),
        crop_pct=0.875,
        normalize="weights",
        overridden=("image_size",),
        chance=1 / 3,
        majority=0.34,
        probe=ProbeFacts(val=share, train=share, log_loss=0.3, l2=1e-3, l2_at_edge=False),
        knn=NeighbourFacts(val=share, k=10),
        similarity=None if similarity is None else SimilarityFacts(value=similarity, low=similarity, high=similarity),
        machine=MachineFacts(device=device, cores=2, has_bf16=device == "cuda", has_fp16=device == "cuda"),
        features={"hits": 0, "misses": 10},
    )
