"""Handing in: what a Python program gives to `train` and its kin instead of naming it, checked, opened and described.

It is used as it is and never kept; the plan names it, and a run that goes on is refused without the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from finetune.config.own import OwnThing, describe, qualified_name
from finetune.config.plan import Plan
from finetune.config.recipe import DataSpec, Recipe
from finetune.data.torch_datasets import Handed, digest_contents, open_datasets
from finetune.errors import RecipeError
from finetune.models.own import NOTHING, Given, Model, Network, open_network
from finetune.saying import every_few_seconds
from finetune.training.own import NOTHING as NO_TRAINING
from finetune.training.own import OwnLoss, OwnTraining
from finetune.training.setup import Vary


@dataclass(frozen=True, kw_only=True)
class Own:
    """All that was handed in, ready for use."""

    given: Given = NOTHING
    training: OwnTraining = NO_TRAINING
    things: tuple[OwnThing, ...] = ()
    """What the plan says of it."""


def hand_in(
    begins: Recipe | Plan,
    *,
    model: Model | None = None,
    dataset: Handed | None = None,
    loss: OwnLoss | None = None,
    callbacks: Sequence[object] = (),
    logger: object | None = None,
    vary: Vary | None = None,
    say: Callable[[str], None],
) -> Own:
    """What is handed in beside a recipe or a plan; every image of a data set is read.

    Raises:
        RecipeError: if it names what is handed in, or says how to read a folder; or as `callbacks.checked`.
        BackboneError: as `open_network`.
        DataError: as `open_datasets`.
    """
    things: list[OwnThing] = []
    source, backbone = None, None
    if model is not None:
        if isinstance(begins, Recipe):
            _refuse_named_backbone(begins)
        backbone = open_network(model)
        module = model.module if isinstance(model, Network) else model
        things.append(OwnThing(argument="model", name=qualified_name(module), digest=backbone.digest))
    if dataset is not None:
        _refuse_named_images(begins.data)
        progress = every_few_seconds(say)
        source = open_datasets(dataset, lambda done, total: progress("images", done, total))
        parts = dataset.values() if isinstance(dataset, Mapping) else [dataset]
        names = dict.fromkeys(map(qualified_name, parts))
        things.append(OwnThing(argument="dataset", name=" + ".join(names), digest=digest_contents(source)))
    training = OwnTraining(vary=vary, loss=loss, callbacks=tuple(callbacks), logger=logger)
    if callbacks or logger is not None:
        from finetune.training.callbacks import checked  # here, for Lightning is slow to load

        training = checked(training)
    things += _describe_training(training)
    return Own(given=Given(source=source, backbone=backbone), training=training, things=tuple(things))


def _describe_training(own: OwnTraining) -> Iterator[OwnThing]:
    if own.loss is not None:
        yield describe("loss", own.loss)
    for callback in own.callbacks:
        yield describe("callbacks", callback, has_settings=False)
    loggers = own.logger if isinstance(own.logger, list | tuple) else [own.logger] if own.logger is not None else []
    for one in loggers:
        yield describe("logger", one, has_settings=False)
    if own.vary is not None:
        yield describe("vary", own.vary)


def _refuse_named_backbone(recipe: Recipe) -> None:
    """Raises RecipeError where the network is named twice, or what only a named one knows is asked of it."""
    faults = []
    if recipe.backbone is not None:
        faults.append(f"backbone is {recipe.backbone}, and model= hands in another network; leave one out.")
    if not recipe.pretrained:
        faults.append("pretrained is false, but model= is used with the weights it has: give it random ones instead.")
    if recipe.head.init == "model":
        faults.append("head.init is model, but a network that was handed in does not say how it draws its head.")
    if faults:
        raise RecipeError("\n".join(faults))


def _refuse_named_images(data: DataSpec) -> None:
    """Raises RecipeError where the images are named twice, or a key speaks of folders and files."""
    faults = []
    if data.root is not None:
        faults.append(
            f"data.root is {data.root}, and dataset= hands in images: these are two sets of images. Leave one out; a "
            "recipe of its own, such as the shipped 'quick', or none may stand first, and name=NAME names the run."
        )
    if data.splits is not None:
        faults.append("data.splits names folders, and dataset= has none: give a data set for each role, as a dict.")
    if data.columns.named:
        faults.append("data.columns names columns of a table, and dataset= has none; remove it.")
    if data.frame != "first":
        faults.append(f"data.frame is {data.frame}, but an image of a data set has one frame; remove it.")
    if faults:
        raise RecipeError("\n".join(faults))
