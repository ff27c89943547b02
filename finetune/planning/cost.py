"""What each strategy is expected to cost here: arithmetic on timed steps and the number of images."""

from finetune.config.facts import Facts
from finetune.config.plan import Advice, Forecast
from finetune.planning.advisor import expected_gain, partial_depth

START_SECONDS = 3.0
"""Of loading Lightning and starting a fit."""
EPOCH_SECONDS = 0.15
"""Of writing the state after an epoch."""


def predict_seconds(facts: Facts, *, trains: str, epochs: int, is_refit: bool = False) -> float | None:
    """Seconds of a training and its evaluation, without the survey; None where nothing was timed.

    A teacher is not timed: each of its networks is taken to look at images as fast as the student's own backbone.

    Args:
        facts: hold the timing of steps on this machine.
        trains: a number of top stages, `norm_only`, or `0` for the probe, which the survey has solved already.
        epochs: passes over the training images.
        is_refit: the same is then trained again on all labelled images.
    """
    forward = facts.forward_images_per_second
    speeds = {row.trains: row.images_per_second for row in facts.timing}
    if not forward or (trains != "0" and trains not in speeds):
        return None
    num = {role: sum(facts.counts[role]) for role in facts.counts}
    if trains == "0":
        return 0.0
    judged = (num["test"] + num["val"] + num["calibration"]) / forward
    each = num["train"] / speeds[trains] + num["val"] / forward + EPOCH_SECONDS
    if is_refit:
        each += sum(facts.labelled) / speeds[trains] + EPOCH_SECONDS
    if facts.teacher is not None:
        taught = num["train"] + (sum(facts.labelled) if is_refit else 0)
        each += taught * facts.teacher.networks / forward
    return START_SECONDS + (epochs * each) + num["val"] / forward + judged


def predict_memory(facts: Facts, *, trains: str, at_once: int) -> float | None:
    """Megabytes that a training step needs beside the weights; None where nothing was timed.

    Args:
        facts: hold what a step of `batch_size` images was counted to keep.
        trains: as for `predict_seconds`.
        at_once: images that pass through the network together; those that wait their turn keep nothing.
    """
    if trains == "0":
        return 0.0
    rows = (row for row in facts.timing if row.trains == trains)
    return next((row.memory_mb - row.image_mb * max(0, row.batch_size - at_once) for row in rows), None)


def with_forecasts(advice: Advice, facts: Facts, *, epochs: int, at_once: int, is_refit: bool = False) -> Advice:
    """The advice with what each strategy is expected to give and to cost; as it is where nothing was timed.

    `at_once` is as for `predict_memory`, the rest as for `predict_seconds`.
    """
    stages = len(facts.backbone.stages)
    keys = {
        "probe": "0",
        "partial": str(partial_depth(stages, facts.profile)),
        "full": str(stages),
        "norm_only": "norm_only",
    }
    rows = []
    for strategy, trains in keys.items():
        seconds = predict_seconds(facts, trains=trains, epochs=epochs, is_refit=is_refit)
        memory = predict_memory(facts, trains=trains, at_once=at_once)
        if seconds is not None and memory is not None:
            gain, low, high = expected_gain(facts, strategy) or (0.0, 0.0, 0.0)
            rows.append(
                Forecast(
                    strategy=strategy,
                    gain=gain,
                    gain_low=low,
                    gain_high=high,
                    seconds=seconds,
                    memory_mb=memory,
                    is_gain_known=trains != "norm_only",
                )
            )
    return advice.model_copy(update={"forecasts": tuple(rows)})
