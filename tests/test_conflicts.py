"""Contradictions: every row of the tables is reached, told by the planner, and names keys that exist."""

import re

import pytest
from made_facts import make_facts

import finetune as ft
from finetune.config.facts import TeacherFacts
from finetune.config.own import OwnThing
from finetune.config.recipe import recipe_keys
from finetune.errors import RecipeError
from finetune.planning.case import Case
from finetune.planning.conflicts import AFTER_ADVICE, CONFLICTS, LBFGS_NEEDS, refuse_after_advice

FACTS = make_facts().model_copy(update={"labelled": (600, 600, 600)})
TEACHER = TeacherFacts(
    run="runs/teacher",
    networks=1,
    weights_digest="w" * 64,
    split_digest=FACTS.split_digest,
    classes=FACTS.classes,
    view=FACTS.view,
    crop_pct=FACTS.crop_pct,
    imbalances=("none",),
)
OWN_LOSS = {"own": (OwnThing(argument="loss", name="mine.focal"),)}
LBFGS = "train.optimizer.name=lbfgs augment.preset=none train.batch_size=1500"
CASES = [
    "train.strategy=partial train.depth=9",
    "train.reinit=9",
    "train.strategy=full train.depth=2",
    "train.strategy=full train.layers=[layer4]",
    "train.layers=[layer4] train.depth=2",
    "pretrained=false train.strategy=probe",
    "pretrained=false regularization.l2_sp=0.1",
    "train.strategy=surgical",
    "train.strategy=lora regularization.l2_sp=0.1",
    "regularization.fractional_pooling=true",
    "train.reinit=1 train.batch_norm=frozen",
    "train.reinit=1 pretrained=false",
    "train.reinit=1 train.strategy=norm_only",
    "train.reinit=2 train.depth=1",
    "train.reinit=1 train.layers=[layer4]",
    "train.reinit=1 head.init=probe",
    "train.averaging.snapshots=3 train.schedule.cycles=4",
    "train.averaging.snapshots=3 train.schedule.name=cosine",
    "train.averaging.kind=swa train.schedule.name=one_cycle",
    "train.strategy=lora train.averaging.keep_last=2",
    "train.averaging.wise_ft=0.5 train.reinit=1",
    ("data.split.refit=true", {"labelled": (500, 500, 500)}),
    "data.split.refit=true train.schedule.name=plateau",
    f"{LBFGS} head.dropout=0.5",
    ("train.distillation.teacher=runs/teacher train.strategy=probe", {"teacher": TEACHER}),
    "train.distillation.teacher=runs/teacher",
    ("train.distillation.teacher=runs/teacher", {"teacher": TEACHER.model_copy(update={"classes": ("x", "y")})}),
    ("train.distillation.teacher=runs/teacher", {"teacher": TEACHER.model_copy(update={"split_digest": "other"})}),
    ("train.distillation.teacher=runs/teacher", {"teacher": TEACHER.model_copy(update={"crop_pct": 1.0})}),
    "pretrained=false head.init=probe",
    "train.strategy=probe head.kind=mlp",
    "head.kind=cosine head.init=zero",
    "head.kind=mlp head.init=probe",
    "head.kind=mlp head.activation=softmax",
    "evaluate.mc_samples=5",
    "data.flip_label_pairs=[[a,z]]",
    "data.flip_label_pairs=[[a,b],[a,c]]",
    "data.flip_label_pairs=[[a,b]] data.invariances=[vflip,rot90]",
    ("train.strategy=probe", OWN_LOSS),
    ("train.imbalance.kind=focal", OWN_LOSS),
    ("regularization.label_smoothing=0.1", OWN_LOSS),
]
"""In the order of the table: wishes, and facts that go with them."""
ADVISED = [
    ("train.depth=2", "full"),
    ("train.layers=[layer4]", "full"),
    ("train.reinit=1", "probe"),
    ("train.distillation.teacher=runs/teacher", "probe"),
    ("evaluate.mc_samples=5 head.dropout=0.5", "probe"),
]
"""Wishes, and what was advised."""
NEEDS = [
    "augment.preset=light",
    "augment.cutout=0.5",
    "hardware.precision=bf16",
    "augment.mixup=0.2",
    "head.dropout=0.5",
    "regularization.stochastic_depth=0.1",
    "train.batch_size=64",
    "train.batch_norm=train",
    "train.imbalance.kind=sampler",
    "train.optimizer.weight_decay=0.1",
]
KEYS = {*recipe_keys(), *(key.rsplit(".", cut)[0] for key in recipe_keys() for cut in range(key.count(".") + 1))}


def case_of(row, strategy=None):
    wishes, known = row if isinstance(row, tuple) else (row, {})
    recipe = ft.load_recipe(None, wishes.split())
    facts = FACTS.model_copy(update=known)
    return Case(recipe=recipe, facts=facts, strategy=strategy or recipe.train.strategy, why="the advice says why")


def names_keys(told):
    """Whether everything in a message that looks like a key is one."""
    text = re.sub(r"`[^`]*`|runs/\S+", "", told)
    named = re.findall(r"\b[a-z_]+(?:\.[a-z][a-z0-9_]*)+", text)
    return set(named) <= KEYS and (named or "pretrained" in text)


def test_no_row_has_no_case():
    assert (len(CASES), len(ADVISED), len(NEEDS)) == (len(CONFLICTS), len(AFTER_ADVICE), len(LBFGS_NEEDS))
    assert not names_keys("train.strateggy is full") and not names_keys("there is no key in this")


@pytest.mark.parametrize(
    ("row", "example"), [*zip(CONFLICTS, CASES, strict=True)], ids=[str(one)[:60] for one in CASES]
)
def test_every_conflict_is_reached_and_told_by_the_planner(row, example):
    case, (is_so, told) = case_of(example), row
    assert is_so(case)
    with pytest.raises(RecipeError) as found:
        ft.make_plan(case.recipe, case.facts)
    text = told(case)
    assert text in str(found.value).splitlines()
    assert names_keys(text), text


@pytest.mark.parametrize(
    ("row", "example"), [*zip(AFTER_ADVICE, ADVISED, strict=True)], ids=[one[0] for one in ADVISED]
)
def test_every_conflict_with_the_advice_is_reached_and_told(row, example):
    wishes, strategy = example
    case, (is_so, told) = case_of(wishes, strategy), row
    assert is_so(case)
    with pytest.raises(RecipeError) as found:
        refuse_after_advice(case.recipe, case.facts, strategy, case.why)
    assert str(found.value).splitlines() == [told(case)]
    assert "the advice" in str(found.value) and names_keys(str(found.value))


@pytest.mark.parametrize(("row", "wish"), [*zip(LBFGS_NEEDS, NEEDS, strict=True)], ids=NEEDS)
def test_every_need_of_lbfgs_is_asked_for(row, wish):
    wishes = {word.split("=")[0]: word for word in (*LBFGS.split(), wish)}
    case, (is_so, told) = case_of(" ".join(wishes.values())), row
    assert is_so(case) and not is_so(case_of(LBFGS))
    with pytest.raises(RecipeError, match="needs the same loss at every look: .*" + re.escape(told(case))):
        ft.make_plan(case.recipe, case.facts)


def test_a_recipe_without_wishes_meets_no_conflict():
    case = case_of("")
    assert not [told for is_so, told in CONFLICTS if is_so(case)]
    for strategy in ("probe", "partial", "full"):
        refuse_after_advice(case.recipe, case.facts, strategy, "")
