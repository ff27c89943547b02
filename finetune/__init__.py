"""Fine-tuning without surprises: measured choices, right defaults, honest scores.

Names are loaded when first used, so that `import finetune` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from finetune import zoo
    from finetune.evaluation.serving import predict
    from finetune.features.survey import survey
    from finetune.pipeline import evaluate, report, resume, train
    from finetune.recipe.plan import Plan
    from finetune.recipe.planning import make_plan
    from finetune.recipe.reading import load_recipe
    from finetune.recipe.runs import RunFolder
    from finetune.recipe.schema import Recipe

_HOMES = {
    "load_recipe": "finetune.recipe.reading",
    "Recipe": "finetune.recipe.schema",
    "survey": "finetune.features.survey",
    "make_plan": "finetune.recipe.planning",
    "Plan": "finetune.recipe.plan",
    "train": "finetune.pipeline",
    "resume": "finetune.pipeline",
    "RunFolder": "finetune.recipe.runs",
    "evaluate": "finetune.pipeline",
    "predict": "finetune.evaluation.serving",
    "report": "finetune.pipeline",
}

__all__ = [
    "Plan",
    "Recipe",
    "RunFolder",
    "evaluate",
    "load_recipe",
    "make_plan",
    "predict",
    "report",
    "resume",
    "survey",
    "train",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name == "zoo":
        return import_module("finetune.zoo")
    if name not in _HOMES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
