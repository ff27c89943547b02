"""Planning: wishes and facts become a plan, each decision with its reason. Pure: no file, no clock."""

from typing import Any

from finetune.compute import Compute
from finetune.config.addresses import HOW_TO_LOG_IN, split_login
from finetune.config.decided import shared_by_stages
from finetune.config.facts import Facts, MachineFacts, ProfileFacts, RangeFacts
from finetune.config.own import ALWAYS
from finetune.config.plan import Advice, Plan, Reason
from finetune.config.reading import Wish, as_recipe
from finetune.config.recipe import Recipe
from finetune.planning.advisor import advise, is_small
from finetune.planning.conflicts import refuse_after_advice, refuse_conflicts
from finetune.planning.cost import with_forecasts
from finetune.planning.inactive_keys import idle_reasons
from finetune.planning.micro_batch import decide_micro_batch, images_at_once
from finetune.planning.refit import Refit, decide_refit, is_cross_fitted, with_refit
from finetune.planning.stages import decide_train, epochs_for, make_stages

LEAST_CALIBRATION = 100
"""With fewer images a single confident mistake decides the temperature."""
PRESETS = {"small": "medium", "large": "light"}
"""Augmentation by size: little data needs more variation."""


def make_plan(recipe: Wish, facts: Facts) -> Plan:
    """The plan for `recipe` (or a folder of images) on data and backbone as measured in `facts`.

    Raises:
        RecipeError: if wishes contradict each other or the facts.
    """
    reasons: list[Reason] = []
    advice = advise(facts, as_recipe(recipe).train.prefer)

    def decide(key: str, wish: Any, choice: Any, why: str) -> Any:
        value = choice if wish is None or wish == "auto" else wish
        why = why if wish is None or wish == "auto" else "the recipe says so"
        reasons.append(Reason(key=key, value=_words(value), why=why))
        return value

    recipe = as_recipe(recipe)
    refuse_conflicts(recipe, facts)
    if facts.profile is not None and facts.profile.earlier is not None:
        reasons.append(_propose_cut(facts.profile))
    if facts.ranking is not None:
        reasons.append(Reason(key="backbone", value=facts.backbone.name, why=facts.ranking.why))
    strategy = decide("train.strategy", recipe.train.strategy, *_strategy(recipe, advice))
    refuse_after_advice(recipe, facts, strategy, advice.why)
    name = recipe.name or facts.root.rstrip("/").rsplit("/", 1)[-1] or "data"
    refit = decide_refit(recipe, facts, strategy)
    data = _decide_data(recipe, facts, refit, decide)
    hardware = _decide_hardware(recipe, facts, decide)
    train = decide_train(recipe, facts, strategy, hardware["devices"], decide)
    hardware["micro_batch"] = decide_micro_batch(recipe, facts, train, hardware["devices"], decide)
    is_probe = strategy == "probe"
    reasons += _own_reasons(facts, is_probe=is_probe)
    augment = _decide_augment(recipe, facts, is_probe=is_probe, decide=decide)
    init = decide("head.init", None if is_probe else recipe.head.init, *_first_head(recipe, facts, is_probe))
    stages = make_stages(strategy, train, facts)
    plan = Plan.model_validate(
        {
            **recipe.model_dump(),
            "name": name,
            "backbone": facts.backbone.name,
            "arch": facts.backbone.arch,
            "arch_kwargs": facts.backbone.arch_kwargs,
            "data": data,
            "augment": augment,
            "head": {**recipe.head.model_dump(), "init": init},
            "train": shared_by_stages(train),
            "evaluate": _decide_evaluate(recipe, facts, data["invariances"], refit if is_probe else None, decide),
            "hardware": hardware,
            "tracking": _decide_tracking(recipe, facts, name, decide),
            "own": facts.own,
            "classes": facts.classes,
            "split_digest": facts.split_digest,
            "weights_digest": facts.backbone.weights_digest,
            "probe_on": refit.probe_on,
            "stages": with_refit(stages) if data["split"]["refit"] else stages,
            "advice": with_forecasts(
                advice,
                facts,
                epochs=epochs_for(recipe, facts, hardware["devices"]),
                at_once=images_at_once(recipe, facts, train, hardware["devices"]),
                is_refit=decide_refit(recipe, facts, "full").is_refit,
            ),
            "reasons": reasons,
        }
    )
    return plan.model_copy(update={"reasons": (*plan.reasons, *idle_reasons(recipe, plan, facts))})


def _strategy(recipe: Recipe, advice: Advice) -> tuple[str, str]:
    """What trains where the recipe does not name a strategy; and why. A depth or layers can only mean `partial`."""
    key = "train.depth" if recipe.train.depth is not None else "train.layers"
    if advice.strategy == "full" and (recipe.train.depth is not None or recipe.train.layers):
        return "partial", f"{key} says what trains; otherwise {advice.strategy}: {advice.why} [{advice.cell}]"
    return advice.strategy, f"{advice.why} [{advice.cell}]"


def _own_reasons(facts: Facts, *, is_probe: bool) -> list[Reason]:
    """A line for everything that was handed in."""
    told, idle = "handed in from Python", "inactive: the probe is the model, and it is solved exactly, without steps"
    return [
        Reason(key=f"own.{own.argument}", value=str(own), why=idle if is_probe and own.argument not in ALWAYS else told)
        for own in facts.own
    ]


def _propose_cut(profile: ProfileFacts) -> Reason:
    """What follows where an earlier depth tells the classes better than the top does."""
    assert profile.earlier is not None
    names = [depth.stage for depth in profile.depths]
    lead, error = 100 * profile.lead, 100 * profile.lead_error
    why = (
        f"leads {names[-1]}, the top, by {lead:.1f} points (standard error {error:.1f}): "
        f"cut there, and re-initialise or train hardest {', '.join(names[profile.earlier + 1 :])}"
    )
    return Reason(key="best depth", value=names[profile.earlier], why=why)


def _decide_augment(recipe: Recipe, facts: Facts, *, is_probe: bool, decide: Any) -> dict[str, Any]:
    wish = recipe.augment
    if is_probe:
        why = "a probe looks at plain images"
        return {**wish.model_dump(), "preset": decide("augment.preset", None, "none", why), "domain": "natural"}
    size, why = (
        ("small", "little data asks for more variation")
        if is_small(facts)
        else ("large", "enough data asks for mild variation")
    )
    preset = decide("augment.preset", wish.preset, PRESETS[size], why)
    domain = decide("augment.domain", wish.domain, "natural", "the recipe names no other kind of images")
    return {**wish.model_dump(), "preset": preset, "domain": domain}


def _first_head(recipe: Recipe, facts: Facts, is_probe: bool) -> tuple[str, str]:
    """What the head begins from where the recipe does not say; and why."""
    if is_probe:
        return "probe", "the probe is the head, and the whole of what is learned"
    if recipe.head.kind == "cosine" and (facts.probe is None or recipe.train.reinit):
        return "small", "without a probe: directions drawn at random"
    if facts.probe is None:
        return "zero", "without a probe: zero weights, so the first loss is exactly log K"
    if recipe.train.reinit:
        return "zero", "the features that a probe would fit are drawn anew"
    if recipe.head.kind == "mlp":
        return "zero", "a hidden layer has no probe; with zero weights above it the first loss is exactly log K"
    return "probe", "fine-tuning from the probe keeps good features from being torn by a random head"


def _decide_data(recipe: Recipe, facts: Facts, refit: Refit, decide: Any) -> dict[str, Any]:
    wish, view = recipe.data, facts.view
    own = f"as {facts.backbone.name} was pretrained"
    if facts.size_note and wish.image_size is not None:
        size = decide(
            "data.image_size", None, view.size_pixels, f"the recipe says {wish.image_size}; {facts.size_note}"
        )
    else:
        why = facts.size_note or f"{own} ({facts.backbone.input_size} px)"
        size = decide("data.image_size", wish.image_size, view.size_pixels, why)
    for key in facts.overridden:
        if key != "image_size":
            decide(f"data.{key}", getattr(view, key, getattr(wish, key, None)), None, "")
    source = (
        "the constants that the weights were trained with"
        if recipe.pretrained
        else "random weights have none of theirs"
    )
    normalize = decide(
        "data.normalize",
        wish.normalize or (facts.normalize if "recipe" in facts.normalize else None),
        facts.normalize,
        source,
    )
    if (found := facts.value_range) is not None:
        decide("data.value_range", wish.value_range, view.value_range, _measured(found))
    if facts.several_frames:
        decide("data.frame", None, wish.frame, facts.frames_text)
    invariances = decide("data.invariances", wish.invariances, *_safe_changes(recipe, facts))
    if wish.splits is not None:
        named = [f"{role}: {', '.join(names)}" for role, names in wish.splits.items()]
        decide("data.splits", "; ".join(named) or "none", None, "")
    for what, name in wish.columns.named.items():
        decide(f"data.columns.{what}", name, None, "")
    if wish.flip_label_pairs:
        decide("data.flip_label_pairs", wish.flip_label_pairs, None, "")
    is_refit = decide("data.split.refit", wish.split.refit, refit.is_refit, refit.why)
    seed = recipe.seed if wish.split.seed is None else wish.split.seed
    return {
        **wish.model_dump(),
        "split": {**wish.split.model_dump(), "seed": seed, "refit": is_refit},
        "root": None if facts.kind == "dataset" else facts.root,
        "image_size": size,
        "crop_pct": facts.crop_pct,
        "interpolation": view.interpolation,
        "normalize": normalize,
        "mean": view.mean,
        "std": view.std,
        "value_range": view.value_range,
        "invariances": invariances,
    }


def _measured(found: RangeFacts) -> str:
    if found.lowest is None or found.highest is None:
        return found.why
    seen = f"{found.lowest:g} to {found.highest:g}"
    return f"{found.why}: {found.num_images:,} training images of more than 8 bits hold values {seen}"


def _safe_changes(recipe: Recipe, facts: Facts) -> tuple[tuple[str, ...], str]:
    """What may be done to an image without changing its label, where the recipe does not say; and why."""
    seen = facts.chirality
    if recipe.data.flip_label_pairs:
        return (), "data.flip_label_pairs says what a flip does to labels"
    if recipe.train.strategy == "probe" or seen is None:
        return (), "none is declared, and whether mirroring shows was not measured"
    if seen.sided:
        pairs = ", ".join("/".join(pair) for pair in seen.sided[:3])
        return (), f"classes are named by side ({pairs}); if a flip swaps them, declare data.flip_label_pairs"
    if seen.share is None:
        return (), "too few images to tell whether mirroring shows; declare [hflip] where it does not"
    told = f"{100 * seen.share.value:.0f} % of {seen.share.n} originals are told from their mirror images"
    verdicts = {
        True: f"mirroring goes unnoticed: {told}, where guessing gives 50 %",
        False: f"mirroring shows: {told}, or labels suffer; declare [hflip] if that does not matter",
        None: f"whether mirroring shows cannot be told ({told}); declare [hflip] where it does not",
    }
    return ("hflip",) if seen.is_safe else (), verdicts[seen.is_safe]


def _decide_hardware(recipe: Recipe, facts: Facts, decide: Any) -> dict[str, Any]:
    wish, machine = recipe.hardware, facts.machine
    compute = Compute.decide(wish, machine)
    decide("hardware.devices", wish.devices, compute.device, f"torch sees {machine.device}")
    best = "32" if recipe.train.optimizer.name == "lbfgs" else compute.precision
    precision = decide("hardware.precision", wish.precision, best, compute.why)
    workers = decide("hardware.workers", wish.workers, *_loaders(machine, compute.device))
    return {**wish.model_dump(), "devices": compute.device, "precision": precision, "workers": workers}


def _loaders(machine: MachineFacts, device: str) -> tuple[int, str]:
    """How many loader processes where the recipe does not say; and why."""
    if device == "cpu":
        return 0, "decoded images are kept, so a loader would only take cores"
    if not machine.can_fork:
        return 0, "this system starts every loader process anew, without the images that are decoded already"
    return min(8, max(1, machine.cores - 1)), "loader processes feed the GPU"


def _decide_evaluate(
    recipe: Recipe, facts: Facts, invariances: Any, refit: Refit | None, decide: Any
) -> dict[str, Any]:
    """The section; `refit` is that of a probe which is the model, and whose temperature may be cross-fitted."""
    wish = recipe.evaluate
    views, calibrate = wish.views, wish.calibrate
    if views == "ten" and "hflip" not in invariances and not recipe.data.flip_label_pairs:
        views = "five"
        why = "ten crops mirror the image, and hflip is not among data.invariances"
        decide("evaluate.views", None, views, why)
    count, kind = sum(facts.counts["calibration"]), "calibration"
    if refit is not None and refit.probe_on == "labelled" and is_cross_fitted(facts):
        count, kind = sum(facts.labelled), "labelled"
    if calibrate and count < LEAST_CALIBRATION:
        calibrate = False
        why = f"{count} {kind} images, fewer than {LEAST_CALIBRATION}, say too little about a temperature"
        decide("evaluate.calibrate", None, calibrate, why)
    return {**wish.model_dump(), "views": views, "calibrate": calibrate}


def _decide_tracking(recipe: Recipe, facts: Facts, name: str, decide: Any) -> dict[str, Any]:
    """The recipe, else the environment, else the store beside the runs; said where the environment has a word."""
    wish, machine = recipe.tracking, facts.machine
    uri, login = split_login(wish.uri) if wish.uri else (None, None)
    experiment = wish.experiment
    if wish.enabled and machine.tracking_uri:
        uri = decide("tracking.uri", uri, machine.tracking_uri, "MLFLOW_TRACKING_URI is set")
    if wish.enabled and machine.tracking_experiment:
        why = "MLFLOW_EXPERIMENT_NAME is set"
        experiment = decide("tracking.experiment", experiment, machine.tracking_experiment, why)
    if wish.enabled and login is not None:
        decide("tracking login", None, "not kept", f"no file holds it; to resume this run, {HOW_TO_LOG_IN}")
    return {"enabled": wish.enabled, "uri": uri or "beside the runs", "experiment": experiment or name}


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_words(part) for part in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
