"""Verbs that plan and train."""

from typing import Annotated

import typer

from finetune.cli.words import (
    Backbone,
    Epochs,
    ImageSize,
    Json,
    Rate,
    Run,
    Runs,
    Seed,
    Strategy,
    Wish,
    finish,
    read_wish,
)


def demo(as_json: Json = False, runs: Runs = None) -> None:
    """Fine-tune the bundled backbone on bundled handwritten digits, offline, in under a minute."""
    from finetune.demo import run_demo

    finish(run_demo(runs), as_json, "")


def train(
    wish: Wish = None,
    backbone: Backbone = None,
    strategy: Strategy = None,
    epochs: Epochs = None,
    lr: Rate = None,
    image_size: ImageSize = None,
    seed: Seed = None,
    as_json: Json = False,
    runs: Runs = None,
) -> None:
    """From images, by a recipe or by the file of a plan, to a scored, tracked, reported run."""
    recipe = read_wish(
        wish,
        takes_plan=True,
        backbone=backbone,
        train__strategy=strategy,
        train__epochs=epochs,
        train__optimizer__lr=lr,
        data__image_size=image_size,
        seed=seed,
    )
    from finetune.pipeline import summarize
    from finetune.pipeline import train as start

    finish(summarize(start(recipe, runs=runs)), as_json, "")


def plan(
    wish: Wish = None,
    backbone: Backbone = None,
    strategy: Strategy = None,
    epochs: Epochs = None,
    lr: Rate = None,
    image_size: ImageSize = None,
    seed: Seed = None,
    pilot: Annotated[
        float | None, typer.Option(help="Seconds for short trainings of the closest candidates, which then decide.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="Such as 2/8: only look at that part of the images, for a later plan or train.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure and decide, but do nothing: Facts, and the Plan with its reasons."""
    recipe = read_wish(
        wish,
        backbone=backbone,
        train__strategy=strategy,
        train__epochs=epochs,
        train__optimizer__lr=lr,
        data__image_size=image_size,
        seed=seed,
    )
    if part is not None:
        from finetune.preparing import extract

        seen = extract(recipe, part)
        finish(seen, as_json, f"part {part}: {seen.misses:,} images looked at, {seen.hits:,} known before")
        return
    from finetune.preparing import plan as decide
    from finetune.reporting.text import facts_text, plan_text

    facts, decided = decide(recipe, pilot_seconds=pilot)
    found = {"facts": facts.model_dump(mode="json"), "plan": decided.model_dump(mode="json")}
    finish(found, as_json, f"{facts_text(facts)}\n{plan_text(decided)}")


def resume(
    run: Run,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="data.root=FOLDER where the images have moved; other keys, such as train.epochs=40, make another run "
            "that begins from the weights of a finished one.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Go on with a stopped run, to the same end; or from a finished one, as another run."""
    from finetune.pipeline import resume as go_on
    from finetune.pipeline import summarize

    finish(summarize(go_on(run, overrides or ())), as_json, "")
