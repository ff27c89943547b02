"""Advice and planning are pure: facts in, decisions and reasons out."""

from typing import get_args

import pytest
import yaml
from made_facts import make_facts
from pydantic import BaseModel, ValidationError

from finetune.config.decided import OF_STAGES, RATES
from finetune.config.facts import ChiralityFacts, DepthFacts, ProfileFacts
from finetune.config.measures import Measure, Proportion
from finetune.config.plan import Plan, Stage, read_plan
from finetune.config.reading import load_recipe
from finetune.config.recipe import recipe_keys
from finetune.errors import RecipeError
from finetune.planning.advisor import (
    SIMILAR,
    SMALL_PER_CLASS,
    advise,
    expected_gain,
    partial_depth,
    similarity_of_probes,
    similarity_of_shift,
)
from finetune.planning.planner import make_plan
from finetune.runs.plan_files import load_plan


def cell(per_class, similarity, **more):
    advice = advise(make_facts(per_class=per_class, similarity=similarity, **more))
    return advice.cell, advice.strategy


@pytest.mark.technique("T009")
@pytest.mark.parametrize(
    ("per_class", "similarity", "probe", "trains", "name"),
    [
        pytest.param(8, 1.0, 0.96, False, "small, similar", marks=pytest.mark.technique("T010")),
        pytest.param(20, 0.1, 0.8, True, "small, different", marks=pytest.mark.technique("T012")),
        pytest.param(900, 0.9, 0.85, True, "large, similar", marks=pytest.mark.technique("T011")),
        pytest.param(900, 0.1, 0.85, True, "large, different", marks=pytest.mark.technique("T014")),
    ],
)
def test_each_cell_of_the_grid_has_its_strategy(per_class, similarity, probe, trains, name):
    advice = advise(make_facts(per_class=per_class, similarity=similarity, probe=probe))
    assert (advice.strategy != "probe", advice.cell) == (trains, name)
    assert f"similarity {similarity:.2f}" in advice.why and f"wrong on {100 * (1 - probe):.1f} %" in advice.why
    assert advice.runner_up != advice.strategy


@pytest.mark.technique("T009")
@pytest.mark.technique("T007")
def test_more_data_never_freezes_all_again():
    for similarity in (0.0, 0.3, 0.5, 0.8, 1.0):
        for probe in (0.5, 0.7, 0.9, 0.95):
            trains = [cell(n, similarity, probe=probe)[1] != "probe" for n in (1, 3, 10, 30, 100, 1000, 10_000)]
            assert trains == sorted(trains)
        assert trains[-1]


@pytest.mark.technique("T014")
def test_who_prefers_accuracy_trains_as_deep_or_deeper_and_who_prefers_speed_no_deeper():
    depth = {"probe": 0, "partial": 1, "full": 2}
    seen = set()
    for per_class in (2, 8, 20, 50, 200, 900):
        for similarity in (0.0, 0.5, 1.0):
            for probe in (0.6, 0.85, 0.95):
                facts = make_facts(per_class=per_class, similarity=similarity, probe=probe)
                chosen = [advise(facts, prefer).strategy for prefer in ("accuracy", "balanced", "speed")]
                assert [depth[name] for name in chosen] == sorted((depth[name] for name in chosen), reverse=True)
                seen.add(tuple(chosen))
    assert len(seen) > 2


def test_less_similar_data_never_freezes_all_again():
    for per_class in (2, 5, 20, 100):
        trains = [cell(per_class, similarity, probe=0.9)[1] != "probe" for similarity in (1.0, 0.7, 0.4, 0.1)]
        assert trains == sorted(trains)


def test_the_thresholds_belong_to_the_larger_side():
    assert cell(SMALL_PER_CLASS, 0.9)[0].startswith("large")
    assert cell(SMALL_PER_CLASS, SIMILAR)[0].endswith("similar")


def test_a_solved_problem_needs_no_more_than_the_probe():
    assert cell(5000, 0.2, probe=0.999, low=0.99)[1] == "probe"


def test_a_gain_has_an_interval_and_is_no_more_than_the_probe_gets_wrong():
    for strategy in ("partial", "full"):
        for probe in (0.6, 0.8, 0.97):
            gain = expected_gain(make_facts(probe=probe), strategy)
            assert gain.low < gain.value and gain.value <= gain.high <= 1 - probe + 1e-9
    assert expected_gain(make_facts(), "probe") == (0, 0, 0)
    assert expected_gain(make_facts(), "norm_only") is None


def test_a_small_val_set_is_not_believed_where_images_were_left_out():
    facts = make_facts(probe=0.5)
    left_out = Proportion(value=0.9, low=0.85, high=0.95, n=300)
    better = facts.model_copy(update={"probe": facts.probe.model_copy(update={"left_out": left_out})})
    assert expected_gain(better, "full") == expected_gain(make_facts(probe=0.9), "full")


@pytest.mark.technique("T016")
def test_similarity_falls_with_the_shift_of_early_batch_norms_alone():
    at = lambda *values: [Measure(value=v, low=0.9 * v, high=1.1 * v, n=100) for v in values]  # noqa: E731
    near, far = similarity_of_shift(at(0.02, 0.02, 0.5, 0.5, 0.5)), similarity_of_shift(at(0.5, 0.5, 0.02, 0.02, 0.02))
    assert near[0] > 0.9 > 0.1 > far[0]
    assert near[1] < near[0] < near[2]
    assert similarity_of_shift(at(-0.001, 0.0))[0] == 1.0


def test_without_batch_norm_similarity_is_zero_at_chance_and_one_at_perfection():
    at = lambda value: Proportion(value=value, low=0, high=1, n=100)  # noqa: E731
    assert similarity_of_probes(at(1 / 3), at(1 / 3), 1 / 3) == (0, 0, 1)
    assert similarity_of_probes(at(1.0), at(1.0), 1 / 3) == (1, 0, 1)
    assert similarity_of_probes(at(0.1), at(0.2), 1 / 3) == (0, 0, 1)
    assert similarity_of_probes(at(0.9), at(0.7), 0.5)[0] == pytest.approx((0.8 + 0.4) / 2)


def test_a_plan_leaves_nothing_open_and_says_why():
    plan = make_plan(load_recipe(None, []), make_facts())
    assert {"train.strategy", "train.epochs", "augment.preset", "hardware.precision"} <= {r.key for r in plan.reasons}
    assert all(reason.why for reason in plan.reasons)
    for section, key in (("train", "patience"), ("data", "image_size"), ("head", "init"), ("hardware", "workers")):
        whole = plan.model_dump()
        with pytest.raises(ValidationError, match=rf"{section}\.{key}"):
            Plan.model_validate(whole | {section: whole[section] | {key: None}})


NULLS = {"data.root", "data.splits", "data.columns.image", "data.columns.label", "data.columns.split"}
"""Of a plan: there is none."""


def test_no_field_of_a_plan_may_be_null_but_where_that_says_there_is_none():
    def open_fields(model, prefix=""):
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from open_fields(kind, f"{prefix}{name}.")
            elif type(None) in get_args(kind) or "auto" in get_args(kind):
                yield prefix + name

    assert set(open_fields(Plan)) == {*NULLS, "train.distillation.teacher"}
    assert not [*open_fields(Stage)]


def test_rates_epochs_depth_schedule_and_batch_norm_stand_in_the_stages_alone():
    keys = {key.rsplit(".", 1)[-1] for key in recipe_keys(Plan) if key.startswith(("train.optimizer", "train."))}
    assert keys & {*OF_STAGES, *RATES, *Stage.model_fields} == {"name", "batch_norm"}  # of a rule, of an average
    assert {"train.averaging.batch_norm", "train.optimizer.name"} < {*recipe_keys(Plan)}


def test_a_plan_that_held_rates_and_epochs_twice_is_read_as_it_was_carried_out(tmp_path):
    wishes = ["train.strategy=gradual", "train.optimizer.lr=0.02", "train.epochs=5"]
    plan = make_plan(load_recipe(None, wishes), make_facts())
    older = plan.model_dump(mode="json")
    older["train"] |= {"prefer": "balanced", "depth": 4, "layers": [], "reinit": 0, "freezes_first": False, "epochs": 9}
    older["train"] |= {"schedule": {"name": "linear"}, "batch_norm": "train"}
    older["train"]["optimizer"] |= {"lr": 0.5, "backbone_lr_ratio": 0.1, "layer_decay": 1.0}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(older), encoding="utf-8")
    assert read_plan(tmp_path / "plan.yaml") == plan
    older = plan.model_dump(mode="json")
    older["train"]["epochs"] = 9  # a new plan, and somebody's mistake
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(older), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"train.epochs is no key of a plan. It is written stages.0.epochs"):
        load_plan(tmp_path / "plan.yaml")


def test_a_plan_survives_its_file(tmp_path):
    plan = make_plan(load_recipe(None, ["train.strategy=partial"]), make_facts())
    (tmp_path / "plan.yaml").write_text(plan.to_yaml(), encoding="utf-8")
    assert read_plan(tmp_path / "plan.yaml") == plan


def test_every_wish_is_kept_and_said_to_be_one():
    wishes = [
        "train.strategy=full",
        "train.epochs=7",
        "augment.preset=heavy",
        "train.optimizer.lr=0.02",
        "train.optimizer.name=sgd",
        "train.batch_norm=train",
        "data.invariances=[vflip]",
        "train.patience=2",
    ]
    plan = make_plan(load_recipe(None, wishes), make_facts())
    (stage,) = plan.stages
    assert (stage.epochs, plan.augment.preset, stage.lr_head) == (7, "heavy", 0.02)
    assert (plan.train.optimizer.name, stage.batch_norm, plan.data.invariances) == ("sgd", "train", ("vflip",))
    said = {reason.key for reason in plan.reasons if reason.why == "the recipe says so"}
    assert {wish.split("=")[0] for wish in wishes} <= said


@pytest.mark.technique("T008")
def test_pretrained_weights_move_slower_than_the_head():
    for strategy in ("gradual", "full"):
        stage = make_plan(load_recipe(None, [f"train.strategy={strategy}"]), make_facts()).stages[-1]
        assert stage.lr_backbone == pytest.approx(0.3 * stage.lr_head)
    ladder = ["train.strategy=full", "train.optimizer.layer_decay=0.5"]
    assert make_plan(load_recipe(None, ladder), make_facts()).stages[0].layer_decay == 0.5


@pytest.mark.parametrize(
    ("wishes", "ratio"),
    [
        (["train.strategy=full"], 0.3),
        (["train.strategy=partial"], 0.5),
        (["train.strategy=partial", "train.depth=3"], 0.5),
        (["train.strategy=partial", "train.depth=2"], 1.0),  # the top third alone
        (["train.strategy=partial", "train.depth=2", "train.optimizer.backbone_lr_ratio=0.1"], 0.1),
        (["train.strategy=partial", "train.layers=[layer4]"], 1.0),
    ],
)
def test_the_fewer_stages_train_the_nearer_their_rate_comes_to_that_of_the_head(wishes, ratio):
    stage = make_plan(load_recipe(None, wishes), make_facts()).stages[0]
    assert stage.lr_backbone == pytest.approx(ratio * stage.lr_head)


def test_epochs_follow_the_number_of_images():
    epochs = [
        make_plan(load_recipe(None, ["train.strategy=full"]), make_facts(per_class=n)).epochs
        for n in (10, 400, 100_000)
    ]
    assert epochs == [20, 7, 3]  # 8,000 images in all on a CPU, within 3 to 20 epochs


@pytest.mark.technique("T007")
def test_partial_leaves_the_lowest_quarter_alone_and_full_nothing():
    facts = make_facts()
    assert make_plan(load_recipe(None, ["train.strategy=partial"]), facts).stages[0].trainable_stages == 4
    assert (
        make_plan(load_recipe(None, ["train.strategy=partial", "train.depth=3"]), facts).stages[0].trainable_stages == 3
    )
    assert [partial_depth(stages) for stages in (1, 2, 3, 4, 5, 8, 13)] == [1, 1, 2, 3, 4, 6, 10]
    assert make_plan(load_recipe(None, ["train.strategy=full"]), facts).stages[0].trainable_stages == 5
    assert make_plan(load_recipe(None, ["train.strategy=probe"]), facts).stages == ()


@pytest.mark.technique("T147")
def mirrored(is_safe, *, sided=(), share=0.5):
    known = None if share is None else Proportion(value=share, low=share - 0.05, high=share + 0.05, n=300)
    facts = make_facts().model_copy(update={"chirality": ChiralityFacts(share=known, is_safe=is_safe, sided=sided)})
    plan = make_plan(load_recipe(None, ["train.strategy=full"]), facts)
    return plan.data.invariances, next(reason.why for reason in plan.reasons if reason.key == "data.invariances")


@pytest.mark.technique("T147")
def test_images_are_mirrored_only_where_it_was_measured_to_be_safe():
    assert mirrored(True) == (("hflip",), mirrored(True)[1])
    for is_safe, more, why in (
        (False, {"share": 0.9}, "mirroring shows: 90 % of 300"),
        (None, {}, "cannot be told"),
        (None, {"share": None}, "too few images"),
        (False, {"sided": (("left", "right"),)}, "named by side (left/right)"),
    ):
        invariances, said = mirrored(is_safe, **more)
        assert invariances == ()
        assert why in said
    plan = make_plan(load_recipe(None, ["train.strategy=full"]), make_facts())
    assert plan.data.invariances == ()  # not measured


@pytest.mark.technique("T155")
def test_ten_crops_become_five_where_mirroring_is_not_declared():
    plan = make_plan(load_recipe(None, ["evaluate.views=ten", "data.invariances=[]"]), make_facts())
    assert plan.evaluate.views == "five"
    assert any(r.key == "evaluate.views" and "hflip" in r.why for r in plan.reasons)
    assert (
        make_plan(load_recipe(None, ["evaluate.views=ten", "data.invariances=[hflip]"]), make_facts()).evaluate.views
        == "ten"
    )


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (["train.depth=9", "train.strategy=partial"], "has 5 stages"),
        (["train.depth=2", "train.strategy=probe"], "belongs to strategy partial"),
        (["train.reinit=2", "train.strategy=surgical"], "the strategy is surgical"),
        (["pretrained=false", "train.strategy=probe"], "would freeze random weights"),
        (["hardware.devices=cuda"], "no GPU here"),
        (["hardware.precision=fp16"], "needs a GPU"),
    ],
)
def test_wishes_that_contradict_are_refused(wishes, message):
    with pytest.raises(RecipeError, match=message):
        make_plan(load_recipe(None, wishes), make_facts())


@pytest.mark.parametrize("wishes", [["train.depth=2"], ["train.layers=[layer4]"], ["train.reinit=1"]])
def test_a_depth_is_refused_where_the_advice_is_the_probe(wishes):
    solved = make_facts(probe=0.999, low=0.99)
    with pytest.raises(RecipeError, match=r"but the advice is probe: the probe.s interval on val starts at 0\.990"):
        make_plan(load_recipe(None, wishes), solved)
    chosen = make_plan(load_recipe(None, wishes), make_facts()).train.strategy
    assert chosen == "partial" or (chosen == "full" and wishes == ["train.reinit=1"])


def test_a_gpu_gets_bf16_and_loaders():
    hardware = make_plan(load_recipe(None, []), make_facts(device="cuda")).hardware
    assert (hardware.devices, hardware.precision) == ("cuda", "bf16")
    assert hardware.workers
    assert make_plan(load_recipe(None, []), make_facts()).hardware.precision == "32"


def test_batch_statistics_are_learned_only_where_they_are_needed():
    def norm(*wishes, **facts):
        return make_plan(load_recipe(None, ["train.strategy=full", *wishes]), make_facts(**facts)).stages[0].batch_norm

    assert norm() == "frozen"
    assert norm("pretrained=false", similarity=None) == "train"
    assert norm("pretrained=false", similarity=None, has_batch_norm=False) == "frozen"


@pytest.mark.parametrize(("per_class", "preset"), [(20, "medium"), (900, "light")])
def test_variation_follows_the_images_and_not_who_chose_the_strategy(per_class, preset):
    facts = make_facts(per_class=per_class, similarity=None)
    assert make_plan(load_recipe(None, ["train.strategy=full"]), facts).augment.preset == preset
    assert make_plan(load_recipe(None, []), make_facts(per_class=per_class, probe=0.7)).augment.preset == preset


@pytest.mark.parametrize(
    ("val", "wishes", "keep"),
    [
        (33, [], "last"),
        (34, [], "settled"),
        (34, ["train.averaging.snapshots=2"], "settled"),
        (34, ["train.schedule.name=constant"], "best"),  # no epoch is at rest
        (34, ["train.schedule.name=plateau"], "best"),
        (33, ["train.schedule.name=constant"], "last"),
    ],
)
def test_which_epoch_is_kept_follows_the_schedule_and_the_number_of_val_images(val, wishes, keep):
    plan = make_plan(load_recipe(None, ["train.strategy=full", *wishes]), make_facts(val=val))
    assert plan.train.checkpoint == keep


def test_what_a_probe_does_not_use_is_said_to_be_inactive():
    wishes = ["train.strategy=probe", "train.epochs=20", "head.dropout=0.5", "augment.preset=heavy"]
    plan = make_plan(load_recipe(None, wishes), make_facts())
    inactive = {reason.key for reason in plan.reasons if reason.why.startswith("inactive")}
    assert inactive == {"train.epochs", "head.dropout", "augment.preset"}
    assert plan.augment.preset == "none"


def test_a_batch_is_no_larger_than_the_data_and_the_rate_follows_the_real_one():
    plan = make_plan(load_recipe(None, ["train.strategy=full", "train.batch_size=100000"]), make_facts(per_class=64))
    assert plan.train.batch_size == 192
    assert plan.stages[0].lr_head == pytest.approx(3e-3 / 3**0.5)
    few = make_plan(load_recipe(None, ["train.strategy=full"]), make_facts(per_class=5))
    assert few.train.batch_size == 15 and few.stages[0].lr_head == pytest.approx(1e-3)
    small = make_plan(load_recipe(None, ["train.strategy=full", "train.batch_size=16"]), make_facts(per_class=64))
    assert small.stages[0].lr_head == pytest.approx(1e-3 / 2)
    huge = ["train.strategy=full", "train.batch_size=100000", "train.optimizer.name=sgd"]
    assert make_plan(load_recipe(None, huge), make_facts(per_class=100_000)).stages[0].lr_head == 1.0


def test_where_an_earlier_depth_leads_the_plan_proposes_the_cut():
    share = Proportion(value=0.8, low=0.7, high=0.9, n=200)
    depths = tuple(
        DepthFacts(stage=stage, width=8, probe=share, ridge=share, neighbours=share)
        for stage in ("stem", "layer1", "layer2", "layer3", "layer4")
    )
    made = []
    for lead in (0.05, 0.01):
        profile = ProfileFacts(depths=depths, num_images=300, judged="val", best=1, lead=lead, lead_error=0.02)
        facts = make_facts().model_copy(update={"profile": profile})
        made.append(make_plan(load_recipe(None, ["train.strategy=partial"]), facts))
    (cut,) = [reason for reason in made[0].reasons if reason.key == "best depth"]
    assert cut.value == "layer1"
    assert "re-initialise or train hardest layer2, layer3, layer4" in cut.why
    assert [partial_depth(13, ProfileFacts(depths=depths, num_images=300, judged="val", best=1, lead=lead,
                                           lead_error=0.02)) for lead in (0.05, 0.01)] == [11, 10]  # fmt: skip
    assert all(reason.key != "best depth" for reason in made[1].reasons)


def tracking_of(*overrides, uri=None, experiment=None):
    machine = {"tracking_uri": uri, "tracking_experiment": experiment}
    facts = make_facts()
    facts = facts.model_copy(update={"machine": facts.machine.model_copy(update=machine)})
    plan = make_plan(load_recipe(None, [*overrides]), facts)
    said = {reason.key: f"{reason.value}: {reason.why}" for reason in plan.reasons if reason.key.startswith("tracking")}
    return plan.tracking, said


def test_runs_are_tracked_where_the_recipe_says_then_where_the_environment_says_then_beside_the_runs():
    assert tracking_of()[0].uri == "beside the runs"
    assert tracking_of()[1] == {}
    spec, said = tracking_of(uri="http://host", experiment="ours")
    assert (spec.uri, spec.experiment) == ("http://host", "ours")
    assert said == {
        "tracking.uri": "http://host: MLFLOW_TRACKING_URI is set",
        "tracking.experiment": "ours: MLFLOW_EXPERIMENT_NAME is set",
    }
    spec, said = tracking_of(
        "tracking.uri=http://mine", "tracking.experiment=mine", uri="http://host", experiment="ours"
    )
    assert (spec.uri, spec.experiment) == ("http://mine", "mine")
    assert said["tracking.uri"] == "http://mine: the recipe says so"
    assert tracking_of("tracking.enabled=false", uri="http://host")[1] == {}


def test_the_plan_says_that_a_login_is_not_kept_and_what_gives_it_back():
    spec, said = tracking_of("tracking.uri=http://me:secret@host")
    assert spec.uri == "http://host"
    assert "MLFLOW_TRACKING_PASSWORD" in said["tracking login"] and "~/.mlflow/credentials" in said["tracking login"]
    assert "secret" not in str(spec) + str(said)


@pytest.mark.parametrize("mode", ["train", "statistics"])
def test_batch_norm_on_single_images_is_refused_with_what_to_set(mode):
    wishes = ["train.strategy=full", "train.batch_size=1", f"train.batch_norm={mode}"]
    with pytest.raises(RecipeError, match=r"train.batch_size is 1, .*Set train.batch_size to 2 or more.*frozen"):
        make_plan(load_recipe(None, wishes), make_facts())


def test_random_weights_learn_their_own_statistics_so_single_images_are_refused_there_too():
    facts = make_facts().model_copy(update={"probe": None, "knn": None, "similarity": None})
    with pytest.raises(RecipeError, match=r"train\.batch_norm=train"):
        make_plan(load_recipe(None, ["pretrained=false", "train.batch_size=1"]), facts)


@pytest.mark.parametrize(
    ("wishes", "has_batch_norm"),
    [
        (["train.strategy=full", "train.batch_norm=frozen"], True),
        (["train.strategy=full", "train.batch_norm=train"], False),
        (["train.strategy=probe", "train.batch_norm=train"], True),
        (["train.strategy=full", "train.batch_norm=train", "train.batch_size=2"], True),
    ],
)
def test_single_images_are_no_trouble_where_no_batch_norm_trains(wishes, has_batch_norm):
    plan = make_plan(load_recipe(None, ["train.batch_size=1", *wishes]), make_facts(has_batch_norm=has_batch_norm))
    assert plan.train.batch_size == (2 if "train.batch_size=2" in wishes else 1)
