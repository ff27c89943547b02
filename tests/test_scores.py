"""Scores as a value and as a file: one is the dump of the other, and files of older versions are read."""

import json
import re

import pytest
from made_scores import against_probe, make_scores, measure, split_scores

from finetune.config.scores import (
    AgainstCenter,
    AgainstOrdinary,
    AgainstTeacher,
    ByRole,
    ClassScore,
    Conformal,
    Difference,
    Draws,
    Experiment,
    MemberRow,
    Refit,
    Scores,
    SetScores,
    SplitScores,
    TeacherScores,
    Temperature,
    ViewRow,
    ViewsGain,
)
from finetune.errors import RunError
from finetune.runs.folder import RunFolder

ENDS = {"difference": 0.01, "low": -0.02, "high": 0.03, "n": 153}
TEMPERATURE = Temperature(
    value=1.3, n=40, log_loss_before=0.3, log_loss_after=0.2, ece_before=0.1, ece_after=0.05, held_out="by another"
)


def everything():
    """Scores with every part that any run may have."""
    balanced, share = Difference(**ENDS), split_scores().top1
    own, pair = (
        split_scores(held_out="by another", confusion=((70, 6), (9, 68))),
        against_probe(0.02, balanced=balanced),
    )
    center = AgainstCenter(**ENDS, only_final_right=3, only_center_right=1)
    drawn = AgainstOrdinary(**ENDS, only_draws_right=2, only_ordinary_right=1, log_loss_difference=measure(0.1))
    taught = AgainstTeacher(**ENDS, only_final_right=2, only_teacher_right=1)
    sets = SetScores(
        promised=0.9, threshold=0.8, num_calibration=40, coverage=share, expected=(0.8, 0.97), mean_size=measure(1.2),
        largest=2, single=100, single_right=90, empty=0,
    )  # fmt: skip
    row = MemberRow(
        name="a", num_members=1, log_loss=0.3, accuracy=0.9, interval=share, ece=0.1, disagreement=0, cost=1
    )
    return make_scores(
        own, probe=own, paired=pair, val=own, views="ten", views_note="mirrors are left out",
        refit=Refit(model=True, probe=True, num_images={"train": 9, "val": 3}, note="on all"), temperature=TEMPERATURE,
        conformal=Conformal(coverage=0.9, threshold=0.8, num_calibration=40, held_out="by another", test=sets),
        views_table=(ViewRow(name="center", top1=share, log_loss=measure(0.3)),), views_table_note="too large",
        center=ByRole[SplitScores](val=own, test=own), views_gain=ViewsGain(crops=10, val=center, test=center),
        teacher=TeacherScores(run="t", networks=2, views="ten", passes=20, student_passes=10, views_note="others",
                              val=own, test=own, paired=ByRole[AgainstTeacher](test=taught)),
        draws=Draws(n=5, temperature=TEMPERATURE, val=own, test=own, paired=ByRole[AgainstOrdinary](test=drawn),
                    entropy=ByRole[type(measure(1))](test=measure(0.4)), sentence="no difference",
                    mutual_information=ByRole[type(measure(1))](test=measure(0.1))),
        next=Experiment(key="train.epochs", value="9", why="more"), chosen_by_val=("probe: its penalty",),
        members=ByRole[tuple[MemberRow, ...]](test=(row,)),
    )  # fmt: skip


@pytest.mark.parametrize("scores", [everything(), make_scores(None), make_scores(split_scores())],
                         ids=["everything", "nothing", "a model alone"])  # fmt: skip
def test_a_file_gives_back_the_value_it_was_written_from(tmp_path, scores):
    run = RunFolder(tmp_path)
    run.write_json("scores.json", scores.model_dump(mode="json"))
    assert run.scores == scores
    again = RunFolder(tmp_path / "again")
    again.write_json("scores.json", run.scores.model_dump(mode="json"))
    assert again.file("scores.json").read_bytes() == run.file("scores.json").read_bytes()


def test_every_field_is_filled_somewhere_in_the_test_above():
    """So that a field that is new cannot be lost on the way to the file."""
    stored = everything().model_dump(mode="json")
    assert stored.keys() == Scores.model_fields.keys()
    parts = {"teacher": TeacherScores, "draws": Draws, "test": SplitScores, "conformal": Conformal}
    for name, kind in parts.items():
        assert kind.model_fields.keys() - stored[name].keys() <= {"note"}, name  # of a teacher that is not compared


def test_what_does_not_apply_is_left_out_and_what_there_is_none_of_is_null():
    stored = make_scores(split_scores(per_class=(ClassScore(name="a", n=0),))).model_dump(mode="json")
    assert list(stored) == ["views", "views_note", "classes", "temperature", "test", "next", "chosen_by_val"]
    assert stored["temperature"] is stored["next"] is stored["views_note"] is stored["test"]["top5"] is None
    assert stored["test"]["per_class"] == [{"name": "a", "n": 0, "precision": None, "recall": None, "f1": None}]


def test_files_of_older_versions_are_read(tmp_path):
    """Of before macro F1, paired balanced accuracy, and flags; with the centre's own count under another name."""
    found = everything().model_dump(mode="json")
    for gone in ("chosen_by_val", "next", "views_note"):
        del found[gone]
    del found["test"]["macro_f1"], found["test"]["majority"], found["paired"]["test"]["balanced"]
    for role in ("val", "test"):
        found["views_gain"][role]["only_probe_right"] = found["views_gain"][role].pop("only_center_right")
    (tmp_path / "scores.json").write_text(json.dumps(found))
    scores = RunFolder(tmp_path).scores
    assert (scores.chosen_by_val, scores.next, scores.test.macro_f1) == ((), None, None)
    assert scores.views_gain.test.only_center_right == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [({"tets": 1}, "tets"), ({"views": None}, "views"), ({"test": {"n": 3}}, "test.top1")],
    ids=["unknown key", "no views", "half a score"],
)
def test_anything_else_is_refused_with_the_key_and_the_way_out(tmp_path, change, said):
    stored = make_scores(split_scores()).model_dump(mode="json") | change
    (tmp_path / "scores.json").write_text(json.dumps(stored))
    with pytest.raises(RunError, match=rf"scores\.json holds no scores.*{re.escape(said)}: .*finetune evaluate"):
        RunFolder(tmp_path).scores  # noqa: B018
    (tmp_path / "scores.json").unlink()
    with pytest.raises(RunError, match=r"has no scores\.json yet"):
        RunFolder(tmp_path).scores  # noqa: B018


def test_what_logits_are_divided_by_is_one_where_nothing_was_fitted():
    assert make_scores(None).temperature_value == 1
    assert make_scores(None, temperature=TEMPERATURE).temperature_value == 1.3
    cold = TEMPERATURE.model_copy(update={"value": None})
    assert make_scores(None, temperature=cold).temperature_value == 1
