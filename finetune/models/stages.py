"""Stages: every tensor of a network belongs to one of a few parts, from stem to top.

By timm's own grouping where the architecture brings one, else by the order of its children.
"""

import re
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn


def num_parameters(module: nn.Module) -> int:
    """Of all parameters, trained or not."""
    return sum(parameter.numel() for parameter in module.parameters())


def divide_into_stages(model: nn.Module) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names of the stages from stem to top, and the stage of every parameter and buffer of `model`.

    A tensor that no stage claims (class token, final norm, buffers of a root) joins the one registered before it.
    """
    names = list(_tensor_names(model))
    claimed = _claim_by_matcher(model, names) or _claim_by_children(model, names)
    order = {key: index for index, key in enumerate(sorted(set(claimed.values())))}
    stage_of, current = {}, 0
    for name in names:
        current = order[claimed[name]] if name in claimed else current
        stage_of[name] = current
    labels: list[str] = []
    for stage in range(len(order)):
        first = next(name for name in names if name in claimed and order[claimed[name]] == stage)
        label = _stage_label(first) if stage else "stem"
        labels.append(label if label not in labels else f"{label}-{stage}")
    return tuple(labels), stage_of


def _stage_label(name: str) -> str:
    parts = name.split(".")[:-1] or [name]
    numbered = next((i for i, part in enumerate(parts) if re.search(r"\d", part)), 0)
    return ".".join(parts[: numbered + 1])


def _tensor_names(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        own = {"recurse": False, "remove_duplicate": False}
        for name, _ in (*module.named_parameters(**own), *module.named_buffers(**own)):
            yield f"{prefix}.{name}" if prefix else name


def _claim_by_matcher(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """By timm's own grouping; empty where the architecture brings none."""
    try:
        matcher = model.group_matcher(coarse=True)  # type: ignore[operator]
    except (
        AttributeError,
        AssertionError,
    ):  # over all of timm: three families have none, one refuses to group coarsely
        return {}
    from timm.models import group_parameters

    nothing = "~"  # a name that no pattern matches, to learn where timm puts such names
    listed: Any = SimpleNamespace(named_parameters=lambda: [(name, None) for name in (*names, nothing)])  # buffers too
    claimed = group_parameters(listed, matcher, reverse=True)
    unclaimed = claimed.pop(nothing)
    return {name: stage for name, stage in claimed.items() if stage != unclaimed}


def _claim_by_children(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """By the order of children, containers opened until there are four.

    A child with at most one weight matrix (a norm, a downsampling) opens the stage after it.
    """
    sections = [(name, child) for name, child in model.named_children() if num_parameters(child)]
    while len(sections) < 4 and (open_ := [s for s in sections if any(num_parameters(c) for c in s[1].children())]):
        at = sections.index(max(open_, key=lambda section: num_parameters(section[1])))
        prefix, container = sections[at]
        sections[at : at + 1] = [(f"{prefix}.{n}", c) for n, c in container.named_children() if num_parameters(c)]
    matrices = [sum(p.ndim > 1 for p in child.parameters()) for _, child in sections]
    plain = 1 if sum(m > 1 for m in matrices) > 1 else 0  # a chain of single layers, as VGG, is one stage each
    stage_of_section: dict[str, int] = {}
    stage, waiting = 0, []
    for (prefix, _), matrix in zip(sections, matrices, strict=True):
        waiting.append(prefix)
        if matrix > plain:
            stage += bool(stage_of_section) or len(waiting) > 1
            leading = waiting[:-1] if not stage_of_section else []
            stage_of_section |= {p: 0 for p in leading} | {p: stage for p in waiting if p not in leading}
            waiting = []
    stage_of_section |= dict.fromkeys(waiting, stage)
    claim = {name: [stage_of_section[p] for p in stage_of_section if name.startswith(f"{p}.")] for name in names}
    return {name: stages[0] for name, stages in claim.items() if stages} or dict.fromkeys(names, 0)
