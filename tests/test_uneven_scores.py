"""What a terminal, a page and a tracker say where classes are uneven: what counts classes alike comes first."""

import re

import pytest
import torch
from made_facts import make_facts
from made_profiles import make_profile
from made_scores import make_scores

from finetune.config.measures import Measure
from finetune.config.other_data import RunElsewhere, RunFittedOn, Seen
from finetune.config.scores import AgainstProbe
from finetune.metrics.classification import score_predictions
from finetune.metrics.significance import answered_right
from finetune.reporting.decision import depth_figure
from finetune.reporting.text import elsewhere_text, facts_text, scores_text
from finetune.reporting.verdict import judge
from finetune.reporting.wording import baseline, lost_classes, measure_rows
from finetune.tracking.state import final_values

CLASSES = ("healthy", "sick")
UNEVEN, EVEN = (31, 2), (17, 16)


def answer(labels, wrong):
    """Probabilities (N, 2) that are right but for the first `wrong[k]` images of each class k."""
    said = labels.clone()
    for label, count in enumerate(wrong):
        said[torch.nonzero(labels == label)[:count, 0]] = 1 - label
    return torch.tensor([0.8, 0.2]).repeat(len(labels), 1).where(said[:, None] == 0, torch.tensor([0.2, 0.8]))


def scored(counts, wrong, probe_wrong=(0, 0)):
    """Scores of a final model and a probe on test images."""
    labels = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
    final, probe = answer(labels, wrong), answer(labels, probe_wrong)
    test, beside = (score_predictions(said, labels, CLASSES) for said in (final, probe))
    return make_scores(test, probe=beside, paired=answered_right(AgainstProbe, final, probe, labels), classes=CLASSES)


def one_line(text):
    return re.sub(r"\s+", " ", text)


def test_the_terminal_begins_with_what_counts_classes_alike():
    text = scores_text(scored(UNEVEN, wrong=(2, 1), probe_wrong=(0, 2)))
    rows = [line.split()[1:4] for line in text.splitlines() if line.startswith("  test ")]
    assert [" ".join(row) for row in rows] == [
        "final balanced accuracy",
        "probe balanced accuracy",
        "final top-1 90.9",
        "probe top-1 93.9",
    ]
    assert "macro F1 67.5 % [" in text and all(len(line) <= 100 for line in text.splitlines())
    told = one_line(text)
    assert "always naming healthy, the largest class, would give top-1 93.9 %, and balanced accuracy 50.0 %" in told
    assert "final minus probe in balanced accuracy on test: +21.8 % [" in told
    assert "final minus probe in top-1 on test: -3.0 % [" in told


def test_where_classes_are_even_the_terminal_says_what_it_said():
    text = scores_text(scored(EVEN, wrong=(2, 1)))
    assert not re.search("balanced|macro|always naming|in top-1", text)
    assert "  final minus probe on test: " in text


@pytest.mark.parametrize(
    ("wrong", "lost"),
    [
        ((0, 2), ["sick (0 of 2, and 0 of 31 others were called so)"]),
        ((31, 0), ["healthy (0 of 31, and 0 of 2 others were called so)", "sick (2 of 2, and 31 of 31 others"]),
        ((0, 0), []),
        ((2, 0), []),
    ],
)
def test_classes_found_by_chance_alone_are_named(wrong, lost):
    scores = scored(UNEVEN, wrong)
    said = lost_classes(scores.test)
    assert all(part in said for part in lost) and bool(said) == bool(lost)
    assert (said in one_line(scores_text(scores))) and bool(lost) == ("no better than by chance" in scores_text(scores))


def test_the_page_speaks_of_balanced_accuracy_and_says_what_the_majority_gives():
    verdict = judge(scored(UNEVEN, wrong=(2, 1), probe_wrong=(0, 2)), is_probe_only=False)
    assert verdict.headline.startswith("Balanced accuracy 71.8 % on 33 test images (95 % interval ")
    assert "The probe alone gets 50.0 %; " in verdict.comparison
    assert any("top-1 is 90.9 %, where always naming healthy" in note for note in verdict.notes)
    even = judge(scored(EVEN, wrong=(2, 1)), is_probe_only=False)
    assert even.headline.startswith("90.9 % of 33 test images right") and not any("majority" in n for n in even.notes)


def test_a_gain_for_the_small_class_is_no_loss_on_the_page_though_fewer_images_are_right():
    verdict = judge(scored((300, 60), wrong=(50, 0), probe_wrong=(0, 40)), is_probe_only=False)
    assert verdict.tone == "better"


def test_trackers_get_all_of_it():
    told = dict(final_values(scored(UNEVEN, wrong=(0, 2))))
    assert told["test/majority"] == pytest.approx(31 / 33) and told["test/balanced_accuracy"] == 0.5
    assert told["test/macro_f1"] == pytest.approx(62 / 64 / 2) and told["test/macro_f1_low"] < told["test/macro_f1"]


def test_a_run_on_other_images_is_judged_alike():
    own = {"weights": "train", "chosen_by_val": (), "split_digest": "d", "constants": "weights"}
    found = RunElsewhere(
        run="r", role="test", data="d", n=33, views="center", classes={}, missing_classes=(), warnings=(),
        bad_images=(),
        scores=scored(UNEVEN, wrong=(2, 1)).test, fitted_on=RunFittedOn(**own), seen=Seen(n=0),
    )  # fmt: skip
    assert "balanced accuracy 71.8 % [" in elsewhere_text(found)


def uneven_facts(facts):
    measure = Measure(value=0.5, low=0.4, high=0.6, n=33)
    probe = facts.probe.model_copy(update={"balanced_accuracy": measure, "macro_f1": measure})
    counts = {**facts.counts, "train": tuple(500 // 17**place for place in range(len(facts.classes)))}
    return facts.model_copy(update={"probe": probe, "counts": counts, "majority": 0.94})


def test_the_facts_of_uneven_classes_name_the_majority_and_no_chance():
    text = one_line(facts_text(uneven_facts(make_facts())))
    assert "probe balanced accuracy 50.0 % [40.0, 60.0] of 33 val images, macro F1 50.0 %" in text
    assert "where always naming the largest class gives 94.0 %" in text and "chance" not in text
    assert "val images right; chance 33.3 %" in one_line(facts_text(make_facts()))


def test_the_section_on_the_decision_draws_the_majority_and_names_no_chance():
    facts = make_facts()
    even, uneven = (
        str(measure_rows(found)) + str(depth_figure(make_profile((0.5, 0.8)), reference=level))
        for found in (facts, uneven_facts(facts))
        for level in (baseline(found),)
    )
    assert ">chance<" in even and "chance is 33.3 %" in even
    assert (
        ">majority<" in uneven and "always naming the largest class gives 94.0 %" in uneven and "chance" not in uneven
    )
