"""Depth profiles as a survey would give them."""

from finetune.config.facts import DepthFacts, ProfileFacts
from finetune.config.measures import Proportion


def share(value, half=0.03, n=400):
    return Proportion(value=value, low=max(0.0, value - half), high=min(1.0, value + half), n=n)


def make_profile(values=(0.42, 0.61, 0.83, 0.91, 0.88), *, stages=None, lead=0.03, lead_error=0.01):
    names = stages or ["stem", *(f"blocks.{i}" for i in range(1, len(values)))]
    depths = tuple(
        DepthFacts(stage=name, width=64, probe=share(v), ridge=share(max(0.0, v - 0.05)),
                   neighbours=share(max(0.0, v - 0.12)))
        for name, v in zip(names, values, strict=True)
    )  # fmt: skip
    best = max(range(len(values)), key=lambda i: values[i])
    judged = {"num_images": 1900, "judged": "cross-validation"}
    return ProfileFacts(depths=depths, best=best, lead=lead, lead_error=lead_error, **judged)
