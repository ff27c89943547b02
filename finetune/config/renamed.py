"""Names that keys and values of a recipe had before: refused with the new one in a recipe, read in an old plan."""

from collections.abc import Mapping
from typing import Any

KEYS = {
    "data.label_swap": "data.flip_label_pairs",
    "evaluate.draws": "evaluate.mc_samples",
    "train.choose": "train.monitor",
    "train.keep": "train.checkpoint",
    "train.stop_ratio": "train.divergence_threshold",
}
VALUES = {
    "train.imbalance.kind": {"logits": "logit_adjustment"},
    "train.schedule.name": {"growing": "cosine_restarts"},
    "train.strategy": {"biases": "bitfit", "norms": "norm_only"},
}
_OF_STAGES = {
    "name": VALUES["train.strategy"],
    "trains": VALUES["train.strategy"],
    "schedule.name": VALUES["train.schedule.name"],
}


def with_new_names(plan: dict[str, Any]) -> dict[str, Any]:
    """What the file of a plan holds, with the names of today."""
    renamed = _renamed(plan, KEYS, VALUES)
    stages = renamed.get("stages")
    if isinstance(stages, list):
        renamed["stages"] = [_renamed(one, {}, _OF_STAGES) if isinstance(one, dict) else one for one in stages]
    return renamed


def _renamed(
    found: dict[str, Any], keys: Mapping[str, str], values: Mapping[str, Mapping[str, str]], prefix: str = ""
) -> dict[str, Any]:
    made = {}
    for name, value in found.items():
        path = f"{prefix}{name}"
        new = value
        if isinstance(value, dict):
            new = _renamed(value, keys, values, f"{path}.")
        elif isinstance(value, str):
            new = values.get(path, {}).get(value, value)
        made[keys[path].rpartition(".")[2] if path in keys else name] = new
    return made
