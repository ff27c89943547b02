"""Fine-tuning without surprises: measured choices, right defaults, honest scores.

Names are loaded when first used, so that `import finetune` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from finetune.config.plan import Plan
    from finetune.config.reading import load_recipe
    from finetune.config.recipe import Recipe
    from finetune.ensembling import ensemble
    from finetune.evaluation.compare import compare
    from finetune.inference.batch_predict import predict
    from finetune.model_selection import zoo
    from finetune.models.own import Network
    from finetune.pipeline import evaluate, report, resume, train
    from finetune.planning.planner import make_plan
    from finetune.preparing import open_dataset, plan, survey
    from finetune.run import Run, load_run

_HOMES = {
    "Network": "finetune.models.own",
    "Plan": "finetune.config.plan",
    "Recipe": "finetune.config.recipe",
    "Run": "finetune.run",
    "compare": "finetune.evaluation.compare",
    "ensemble": "finetune.ensembling",
    "evaluate": "finetune.pipeline",
    "load_recipe": "finetune.config.reading",
    "load_run": "finetune.run",
    "make_plan": "finetune.planning.planner",
    "open_dataset": "finetune.preparing",
    "plan": "finetune.preparing",
    "predict": "finetune.inference.batch_predict",
    "report": "finetune.pipeline",
    "resume": "finetune.pipeline",
    "survey": "finetune.preparing",
    "train": "finetune.pipeline",
}

__all__ = [
    "Network",
    "Plan",
    "Recipe",
    "Run",
    "compare",
    "ensemble",
    "evaluate",
    "load_recipe",
    "load_run",
    "make_plan",
    "open_dataset",
    "plan",
    "predict",
    "report",
    "resume",
    "survey",
    "train",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name == "zoo":
        return import_module("finetune.model_selection.zoo")
    if name not in _HOMES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
