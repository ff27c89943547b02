import json
import math

import numpy as np
import pytest
import torch

from finetune.config.scores import SplitScores
from finetune.metrics import classification
from finetune.metrics.classification import (
    balanced_accuracy,
    calibration_error,
    confusion,
    decide,
    expected_calibration_error,
    log_loss,
    log_losses,
    macro_f1,
    per_class,
    score_predictions,
    top_k_accuracy,
)
from finetune.metrics.shares import wilson


def _predictions(n=400, num_classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=generator)
    logits = torch.randn(n, num_classes, generator=generator) + 1.5 * torch.eye(num_classes)[labels]
    return logits.softmax(dim=1), labels


@pytest.fixture(scope="module")
def torchmetrics():
    from torchmetrics.functional import classification

    return classification


def test_every_score_equals_torchmetrics(torchmetrics):
    probabilities, labels = _predictions()
    arguments = {"preds": probabilities, "target": labels, "num_classes": 7}
    for k in (1, 3, 5):
        expected = torchmetrics.multiclass_accuracy(**arguments, average="micro", top_k=k)
        assert top_k_accuracy(probabilities, labels, k).value == pytest.approx(float(expected), abs=1e-6)
    expected = torchmetrics.multiclass_accuracy(**arguments, average="macro")
    assert balanced_accuracy(probabilities, labels).value == pytest.approx(float(expected), abs=1e-6)
    assert torch.equal(confusion(probabilities, labels), torchmetrics.multiclass_confusion_matrix(**arguments))
    expected = torchmetrics.multiclass_calibration_error(**arguments, n_bins=15, norm="l1")
    assert expected_calibration_error(probabilities, labels) == pytest.approx(float(expected), abs=1e-6)
    scores = per_class(probabilities, labels, "abcdefg")
    for ours, theirs in [("precision", "precision"), ("recall", "recall"), ("f1", "f1_score")]:
        expected = getattr(torchmetrics, f"multiclass_{theirs}")(**arguments, average="none").tolist()
        values = [getattr(score, ours) for score in scores]
        assert [getattr(value, "value", value) for value in values] == pytest.approx(expected, abs=1e-6)


def test_log_loss_and_balanced_accuracy_equal_sklearn():
    from sklearn import metrics as sklearn_metrics

    probabilities, labels = _predictions()
    probabilities = probabilities.double() / probabilities.double().sum(dim=1, keepdim=True)
    expected = sklearn_metrics.log_loss(labels, probabilities.numpy(), labels=range(7))
    assert log_loss(probabilities, labels) == pytest.approx(expected, abs=1e-12)
    few = labels < 5  # two classes have no images
    decisions = decide(probabilities[few].clone().index_fill_(1, torch.tensor([5, 6]), 0.0))
    expected = sklearn_metrics.balanced_accuracy_score(labels[few], decisions)
    assert balanced_accuracy(torch.eye(7)[decisions], labels[few]).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.technique("T052")
def test_the_decision_is_the_class_with_the_highest_activation_and_the_loss_its_cross_entropy():
    logits = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(64) % 5
    probabilities = logits.softmax(dim=1)
    assert torch.equal(decide(probabilities), logits.argmax(dim=1))
    assert log_loss(probabilities, labels) == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-12
    )
    assert top_k_accuracy(probabilities, labels, 1).value == float((logits.argmax(dim=1) == labels).double().mean())


@pytest.mark.technique("T052")
def test_a_classifier_that_knows_nothing_pays_log_k_and_always_says_the_first_class():
    probabilities, labels = torch.full((12, 4), 0.25), torch.arange(12) % 4
    assert log_loss(probabilities, labels) == pytest.approx(math.log(4), abs=1e-12)
    for k in (1, 2, 3, 4):  # ties go to the lower class, so chance is exactly k / K
        assert top_k_accuracy(probabilities, labels, k).value == k / 4
    assert confusion(probabilities, labels)[:, 0].tolist() == [3, 3, 3, 3]


def test_top1_is_the_trace_of_the_confusion_matrix_and_rows_are_the_truth():
    probabilities, labels = _predictions()
    table = confusion(probabilities, labels)
    assert top_k_accuracy(probabilities, labels).value == int(table.trace()) / len(labels)
    assert torch.equal(table.sum(dim=1), torch.bincount(labels, minlength=7))
    assert confusion(torch.tensor([[0.1, 0.9]]), torch.tensor([0])).tolist() == [[0, 1], [0, 0]]


def test_every_share_carries_its_wilson_interval_and_its_own_n():
    labels = torch.tensor([0, 0, 0, 1])
    probabilities = torch.eye(3)[[0, 0, 1, 1]]
    first, second, absent = per_class(probabilities, labels, ["cat", "dog", "emu"])
    assert (first.precision, first.recall, first.n) == (wilson(2, 2), wilson(2, 3), 3)
    assert (second.precision, second.recall, second.n) == (wilson(1, 2), wilson(1, 1), 1)
    assert first.f1 == pytest.approx(0.8) and second.f1 == pytest.approx(2 / 3)
    assert top_k_accuracy(probabilities, labels) == wilson(3, 4)
    assert (absent.n, absent.precision, absent.recall, absent.f1) == (0, None, None, None)


def test_precision_of_a_class_never_called_is_none_but_its_f1_is_zero():
    scores = per_class(torch.eye(2)[[0, 0]], torch.tensor([0, 1]), ["cat", "dog"])
    assert scores[1].precision is None
    assert scores[1].recall == wilson(0, 1)
    assert scores[1].f1 == 0.0


def test_macro_f1_equals_sklearn_and_leaves_out_classes_that_do_not_occur():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    probabilities, labels = _predictions(n=200)
    decisions = probabilities.argmax(1)
    few = (labels < 4) & (decisions < 5)  # class 4 is only called, 5 and 6 do not occur
    expected = sklearn_metrics.f1_score(labels[few], decisions[few], average="macro", zero_division=0)
    assert macro_f1(probabilities[few], labels[few]).value == pytest.approx(expected, abs=1e-12)


def test_balanced_accuracy_leaves_out_classes_without_images():
    probabilities, labels = torch.eye(3)[[0, 0, 0, 0]], torch.tensor([0, 0, 0, 1])
    score = balanced_accuracy(probabilities, labels)
    assert (score.value, score.n) == (0.5, 4)
    assert score.low < 0.5 < score.high


def test_a_certain_mistake_costs_a_finite_loss():
    losses = log_losses(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0]))
    assert losses.tolist() == pytest.approx([-math.log(1e-12), 0.0])


def test_calibration_bins_are_closed_on_the_right():
    probabilities = torch.tensor([[0.6, 0.4], [0.6 + 1e-9, 0.4 - 1e-9]], dtype=torch.float64)
    apart = expected_calibration_error(probabilities, torch.tensor([0, 1]), bins=5)
    assert apart == pytest.approx((0.4 + 0.6) / 2, abs=1e-6)  # and not |0.4 - 0.6| / 2, as in one bin


def test_calibration_error_of_a_hand_made_case():
    """Four at 0.9 of which two are right, four at 0.6 of which three are: (0.4 + 0.15) / 2."""
    confidences = torch.tensor([0.9] * 4 + [0.6] * 4, dtype=torch.float64)
    probabilities = torch.stack([confidences, 1 - confidences], dim=1)
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.275, abs=1e-12)


def _confidences(n, overconfidence, seed):
    generator = np.random.default_rng(seed)
    confidences = 0.5 + 0.5 * generator.beta(2, 1, size=n)
    labels = torch.from_numpy((generator.random(n) >= confidences - overconfidence).astype(np.int64))
    confidences = torch.from_numpy(confidences)
    return torch.stack([confidences, 1 - confidences], dim=1), labels


def test_calibration_error_is_biased_upward_for_small_n():
    errors = [np.mean([expected_calibration_error(*_confidences(n, 0.0, s)) for s in range(20)]) for n in (100, 10_000)]
    assert errors[0] > 0.05 and errors[1] < 0.012


@pytest.mark.parametrize("overconfidence", [0.0, 0.1, 0.2])
def test_the_interval_of_the_calibration_error_covers_the_truth_despite_its_bias(monkeypatch, overconfidence):
    monkeypatch.setattr(classification.bootstrap, "__defaults__", (200,))
    intervals = [calibration_error(*_confidences(150, overconfidence, seed), seed) for seed in range(100)]
    assert np.mean([each.low <= overconfidence <= each.high for each in intervals]) >= 0.85
    assert all(0 <= each.low <= each.value <= each.high <= 1 for each in intervals)
    assert np.mean([each.high - each.value < each.value - each.low for each in intervals]) >= 0.8  # bias corrected


def test_score_predictions_is_the_test_object_of_scores_json():
    probabilities, labels = _predictions(n=60)
    scores = score_predictions(probabilities, labels, list("abcdefg"))
    share = {"value", "low", "high", "n"}
    shares = ["balanced_accuracy", "macro_f1", "top1", "top5", "log_loss", "ece"]
    stored = scores.model_dump(mode="json")
    assert list(stored) == ["n", "majority", *shares, "per_class", "confusion"]
    assert scores.majority == int(labels.bincount().max()) / 60
    for key in shares:
        assert set(stored[key]) == share and stored[key]["n"] == scores.n == 60
        assert stored[key]["low"] <= stored[key]["value"] <= stored[key]["high"]
    assert [set(each) for each in stored["per_class"]] == [{"name", "n", "precision", "recall", "f1"}] * 7
    assert set(stored["per_class"][0]["recall"]) == share
    assert sum(map(sum, scores.confusion)) == 60
    assert SplitScores.model_validate(json.loads(json.dumps(stored, allow_nan=False))) == scores
    assert scores == score_predictions(probabilities, labels, list("abcdefg"))
    other = score_predictions(probabilities, labels, list("abcdefg"), seed=1)
    assert other.log_loss.low != scores.log_loss.low and other.top1 == scores.top1


@pytest.mark.parametrize(("num_classes", "is_scored"), [(2, False), (5, False), (6, True)])
def test_top5_is_scored_only_where_it_could_fail(num_classes, is_scored):
    scores = score_predictions(torch.eye(num_classes), torch.arange(num_classes), [str(k) for k in range(num_classes)])
    assert (scores.top5 is not None) is is_scored


def test_what_is_no_prediction_is_refused():
    good, labels = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match="N >= 1"):
        score_predictions(torch.empty(0, 3), torch.empty(0, dtype=torch.long), "abc")
    with pytest.raises(ValueError, match="row 1 is no distribution"):
        log_loss(torch.tensor([[0.5, 0.5], [3.0, -1.0]]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="row 0 is no distribution"):
        top_k_accuracy(good * math.nan, labels)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got 1 to 3"):
        confusion(good, labels + 1)
    with pytest.raises(ValueError, match="classes has 2 names"):
        per_class(good, labels, "ab")
    with pytest.raises(ValueError, match=r"k must lie in \[1, 3\]"):
        top_k_accuracy(good, labels, 4)
