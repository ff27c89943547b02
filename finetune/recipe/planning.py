"""Planning: wishes and facts become a plan, each decision with its reason. Pure: no file, no clock."""

from typing import Any

from finetune.errors import RecipeError
from finetune.recipe.advice import advise, partial_depth
from finetune.recipe.facts import Facts, ProfileFacts
from finetune.recipe.forecasts import with_forecasts
from finetune.recipe.plan import Plan, Reason, Stage
from finetune.recipe.schema import Recipe

BUDGETS = {"cpu": 20_000, "cuda": 200_000}
"""Images that a default run trains on in all, epochs times images."""
EPOCHS_RANGE = (3, 20)
"""Fewest and most epochs that the planner chooses."""
LEARNING_RATES = {"adamw": 1e-3, "sgd": 1e-2}
"""Peak rate of the head by optimizer, at 64 images per step."""
LARGEST_RATE = 1.0
"""However large the batch."""
BACKBONE_RATIO = 0.3
"""Rate of pretrained weights over that of the head: see `benchmarks/LOG.md`."""
WEIGHT_DECAY = 0.01
LEAST_CALIBRATION = 100
"""With fewer images a single confident mistake decides the temperature."""
LEAST_VAL = 100
"""With fewer val images the noise between epochs is larger than what training changes."""
PRESETS = {"small": "medium", "large": "light"}
"""Augmentation by size: little data needs more variation."""


def make_plan(recipe: Recipe, facts: Facts) -> Plan:
    """The plan for `recipe` on data and backbone as measured in `facts`.

    Raises:
        RecipeError: if wishes contradict each other or the facts.
    """
    reasons: list[Reason] = []
    advice = advise(facts)

    def decide(key: str, wish: Any, choice: Any, why: str) -> Any:
        value = choice if wish is None or wish == "auto" else wish
        why = why if wish is None or wish == "auto" else "the recipe says so"
        reasons.append(Reason(key=key, value=_words(value), why=why))
        return value

    _refuse_contradictions(recipe, facts)
    if facts.profile is not None and facts.profile.earlier is not None:
        reasons.append(_propose_cut(facts.profile))
    if facts.ranking is not None:
        reasons.append(Reason(key="backbone", value=facts.backbone.name, why=facts.ranking.why))
    strategy = decide("train.strategy", recipe.train.strategy, advice.strategy, f"{advice.why} [{advice.cell}]")
    if recipe.train.depth is not None and strategy != "partial":
        raise RecipeError(
            f"train.depth belongs to strategy partial, but the advice is {strategy}: {advice.why}. "
            "Set train.strategy to partial, or remove train.depth."
        )
    name = recipe.name or facts.root.rstrip("/").rsplit("/", 1)[-1] or "data"
    data = _decide_data(recipe, facts, decide)
    hardware = _decide_hardware(recipe, facts, decide)
    train = _decide_train(recipe, facts, strategy, hardware["devices"], decide)
    is_probe = strategy == "probe"
    preset = decide(
        "augment.preset",
        None if is_probe else recipe.augment.preset,
        "none" if strategy == "probe" else PRESETS["small" if advice.cell.startswith("small") else "large"],
        "a probe looks at plain images"
        if strategy == "probe"
        else (
            "little data asks for more variation"
            if advice.cell.startswith("small")
            else "enough data asks for mild variation"
        ),
    )
    init = decide(
        "head.init",
        None if is_probe else recipe.head.init,
        "probe" if facts.probe else "zero",
        "the probe is the head, and the whole of what is learned"
        if is_probe
        else "fine-tuning from the probe keeps good features from being torn by a random head"
        if facts.probe
        else "without a probe: zero weights, so the first loss is exactly log K",
    )
    if is_probe:
        reasons += _inactive(recipe)
    plan = Plan.model_validate(
        {
            **recipe.model_dump(),
            "name": name,
            "backbone": facts.backbone.name,
            "data": data,
            "augment": {"preset": preset},
            "head": {**recipe.head.model_dump(), "init": init},
            "train": train,
            "evaluate": _decide_evaluate(recipe, facts, data["invariances"], decide),
            "hardware": hardware,
            "tracking": {
                "enabled": recipe.tracking.enabled,
                "uri": recipe.tracking.uri or "beside the runs",
                "experiment": recipe.tracking.experiment or name,
            },
            "classes": facts.classes,
            "split_digest": facts.split_digest,
            "weights_digest": facts.backbone.weights_digest,
            "stages": _stages(strategy, train, facts),
            "advice": with_forecasts(advice, facts, epochs=_epochs(recipe, facts, hardware["devices"])),
            "reasons": reasons,
        }
    )
    return plan


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


def _inactive(recipe: Recipe) -> list[Reason]:
    """What the recipe sets and a probe does not use, said aloud."""
    set_keys = [f"augment.{key}" for key in sorted(recipe.augment.model_fields_set)]
    set_keys += [f"head.{key}" for key in sorted(recipe.head.model_fields_set - {"kind"})]
    set_keys += [f"train.{key}" for key in sorted(recipe.train.model_fields_set - {"strategy"})]
    why = "inactive: the probe is the model, and it is solved exactly, without steps"
    return [Reason(key=key, value="(as the recipe says)", why=why) for key in set_keys]


def _refuse_contradictions(recipe: Recipe, facts: Facts) -> None:
    faults = []
    stages = len(facts.backbone.stages)
    if recipe.train.depth is not None and recipe.train.depth > stages:
        faults.append(f"train.depth is {recipe.train.depth}, but {facts.backbone.name} has {stages} stages.")
    if recipe.train.depth is not None and recipe.train.strategy in ("probe", "full"):
        faults.append(
            f"train.depth belongs to strategy partial, not to {recipe.train.strategy}; remove one of the two."
        )
    if not recipe.pretrained and recipe.train.strategy in ("probe", "partial"):
        faults.append(
            f"pretrained is false, so strategy {recipe.train.strategy} would freeze random weights; use full."
        )
    if not recipe.pretrained and recipe.head.init == "probe":
        faults.append("pretrained is false, so there is no probe to begin from; set head.init to zero.")
    faults += _swap_faults(recipe, facts)
    if faults:
        raise RecipeError("\n".join(faults))


def _swap_faults(recipe: Recipe, facts: Facts) -> list[str]:
    pairs, known = recipe.data.label_swap, ", ".join(facts.classes)
    named = [name for pair in pairs for name in pair]
    once = list(dict.fromkeys(named))
    faults = [
        f"data.label_swap names {name!r}, which is no class; they are {known}."
        for name in once
        if name not in facts.classes
    ]
    faults += [
        f"data.label_swap names {name!r} twice, but a mirror image has one class; leave out a class that keeps its own."
        for name in once
        if named.count(name) > 1
    ]
    if pairs and {"vflip", "rot90"} <= set(recipe.data.invariances or ()):
        faults.append(
            "data.invariances names vflip and rot90, which together mirror an image and keep its label, "
            "but data.label_swap says that its label changes; remove one of the three."
        )
    return faults


def _decide_data(recipe: Recipe, facts: Facts, decide: Any) -> dict[str, Any]:
    wish, view = recipe.data, facts.view
    own = f"as {facts.backbone.name} was pretrained"
    size = decide("data.image_size", wish.image_size, view.size_pixels, f"{own} ({facts.backbone.input_size} px)")
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
    invariances = decide("data.invariances", wish.invariances, *_safe_changes(recipe, facts))
    if wish.label_swap:
        decide("data.label_swap", wish.label_swap, None, "")
    return {
        **wish.model_dump(),
        "root": facts.root,
        "image_size": size,
        "crop_pct": facts.crop_pct,
        "interpolation": view.interpolation,
        "normalize": normalize,
        "mean": view.mean,
        "std": view.std,
        "invariances": invariances,
    }


def _safe_changes(recipe: Recipe, facts: Facts) -> tuple[tuple[str, ...], str]:
    """What may be done to an image without changing its label, where the recipe does not say; and why."""
    seen = facts.chirality
    if recipe.data.label_swap:
        return (), "data.label_swap says what a flip does to labels"
    if recipe.train.strategy == "probe" or seen is None:
        return (), "none is declared, and whether mirroring shows was not measured"
    if seen.sided:
        pairs = ", ".join("/".join(pair) for pair in seen.sided[:3])
        return (), f"classes are named by side ({pairs}); if a flip swaps them, declare data.label_swap"
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
    if wish.devices == "cuda" and machine.device != "cuda":
        raise RecipeError("hardware.devices is cuda, but torch sees no GPU here; use auto or cpu.")
    device = decide("hardware.devices", wish.devices, machine.device, f"torch sees {machine.device}")
    on_gpu = device == "cuda"
    best = "bf16" if machine.has_bf16 else "fp16" if machine.has_fp16 else "32"
    precision = decide(
        "hardware.precision",
        wish.precision,
        best if on_gpu else "32",
        f"the fastest this GPU trains well in is {best}" if on_gpu else "a CPU repeats 32-bit training to the last bit",
    )
    if precision == "fp16" and not on_gpu:
        raise RecipeError("hardware.precision is fp16, which needs a GPU; use 32 or bf16 on a CPU.")
    workers = decide(
        "hardware.workers",
        wish.workers,
        min(8, max(1, machine.cores - 1)) if on_gpu else 0,
        "loader processes feed the GPU" if on_gpu else "decoded images are kept, so a loader would only take cores",
    )
    return {**wish.model_dump(), "devices": device, "precision": precision, "workers": workers}


def _decide_train(recipe: Recipe, facts: Facts, strategy: str, device: str, decide: Any) -> dict[str, Any]:
    wish, num_train = recipe.train, sum(facts.counts["train"])
    stages = len(facts.backbone.stages)
    depth = partial_depth(stages, facts.profile) if strategy == "partial" else stages
    chosen = {"strategy": strategy, "depth": wish.depth or depth, "batch_size": min(wish.batch_size, num_train)}
    defaults = {"epochs": 1, "schedule": "cosine", "patience": 1, "keep": "best", "batch_norm": "frozen"}
    rule = wish.optimizer.name or "adamw"
    ratio = BACKBONE_RATIO if recipe.pretrained else 1.0
    optimizer = {**wish.optimizer.model_dump(), "name": rule}
    batch = min(wish.batch_size, num_train)
    optimizer["lr"] = wish.optimizer.lr or min(LARGEST_RATE, LEARNING_RATES[rule] * batch / 64)
    optimizer["backbone_lr_ratio"] = wish.optimizer.backbone_lr_ratio or ratio
    optimizer["weight_decay"] = WEIGHT_DECAY if wish.optimizer.weight_decay is None else wish.optimizer.weight_decay
    if strategy == "probe":
        given = {key: getattr(wish, key) or value for key, value in defaults.items()}
        return {**wish.model_dump(), **chosen, **given, "optimizer": optimizer}
    if strategy == "partial":
        decide(
            "train.depth",
            wish.depth,
            depth,
            f"the top third of {stages} stages"
            + (" and all above the best depth" if depth > partial_depth(stages) else "")
            + "; the rest stays as it was pretrained",
        )
    decide("train.optimizer.name", wish.optimizer.name, rule, "robust to the rate on small data")
    decide("train.optimizer.lr", wish.optimizer.lr, optimizer["lr"], f"for {rule} at {batch} images per step")
    if batch < wish.batch_size:
        decide("train.batch_size", None, batch, "there are no more training images than these")
    decide(
        "train.optimizer.backbone_lr_ratio",
        wish.optimizer.backbone_lr_ratio,
        ratio,
        "random weights have nothing to keep"
        if not recipe.pretrained
        else "pretrained weights move gently, or what they know is lost",
    )
    epochs = decide(
        "train.epochs",
        wish.epochs,
        _epochs(recipe, facts, device),
        f"about {BUDGETS[device]:,} images in all for {num_train:,} training images, within {EPOCHS_RANGE[0]} to "
        f"{EPOCHS_RANGE[1]}",
    )
    schedule = decide("train.schedule", wish.schedule, "cosine", "the rate falls to zero, so the last epochs settle")
    patience = decide(
        "train.patience",
        wish.patience,
        max(3, epochs // 2),
        "half of the epochs without a lower val loss: the rate must have time to fall",
    )
    num_val = sum(facts.counts["val"])
    keep = decide(
        "train.keep",
        wish.keep,
        "best" if num_val >= LEAST_VAL else "last",
        f"{num_val} val images {'are enough' if num_val >= LEAST_VAL else f'(< {LEAST_VAL}) are too few'} "
        "to tell epochs apart",
    )
    norm = "train" if not recipe.pretrained and facts.backbone.has_batch_norm else "frozen"
    norm = decide(
        "train.batch_norm",
        wish.batch_norm,
        norm,
        "the backbone has no batch norm"
        if not facts.backbone.has_batch_norm
        else "random weights need their own statistics"
        if not recipe.pretrained
        else "the statistics of pretraining fit, and do not depend on the batch",
    )
    return {
        **wish.model_dump(),
        **chosen,
        "optimizer": optimizer,
        "epochs": epochs,
        "schedule": schedule,
        "patience": patience,
        "keep": keep,
        "batch_norm": norm,
    }


def _epochs(recipe: Recipe, facts: Facts, device: str) -> int:
    least, most = EPOCHS_RANGE
    return recipe.train.epochs or min(most, max(least, round(BUDGETS[device] / sum(facts.counts["train"]))))


def _decide_evaluate(recipe: Recipe, facts: Facts, invariances: Any, decide: Any) -> dict[str, Any]:
    wish = recipe.evaluate
    views, calibrate = wish.views, wish.calibrate
    if views == "ten" and "hflip" not in invariances and not recipe.data.label_swap:
        views = "five"
        why = "ten crops mirror the image, and hflip is not among data.invariances"
        decide("evaluate.views", None, views, why)
    count = sum(facts.counts["calibration"])
    if calibrate and count < LEAST_CALIBRATION:
        calibrate = False
        why = f"{count} calibration images, fewer than {LEAST_CALIBRATION}, say too little about a temperature"
        decide("evaluate.calibrate", None, calibrate, why)
    return {"views": views, "calibrate": calibrate}


def _stages(strategy: str, train: dict[str, Any], facts: Facts) -> list[Stage]:
    if strategy == "probe":
        return []
    optimizer = train["optimizer"]
    return [
        Stage(
            name="partial" if strategy == "partial" else "full",
            trainable_stages=min(train["depth"], len(facts.backbone.stages)),
            epochs=train["epochs"],
            lr_head=optimizer["lr"],
            lr_backbone=optimizer["lr"] * optimizer["backbone_lr_ratio"],
            batch_norm=train["batch_norm"],
        )
    ]


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_words(part) for part in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
