import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.covariance import ledoit_wolf_shrinkage

from finetune.metrics.transferability import (
    _best_ratio,
    _evidence,
    _spectrum,
    h_score,
    leep,
    logme,
    nce,
    rank_agreement,
)

SHAPES = [(60, 12), (40, 40), (25, 90)]
SHAPE_NAMES = ["tall", "square", "wide"]
NUM_CLASSES = 4


def draw(n=160, width=24, *, signal=1.0, seed=0, num_classes=NUM_CLASSES):
    """Labels, and features that tell the classes apart as well as `signal` says: 0 is noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % num_classes
    centers = torch.randn(num_classes, width, generator=generator)
    return torch.randn(n, width, generator=generator) + signal * centers[labels], labels


def source_head(signal, *, n=160, width=7, seed=0):
    """Probabilities over `width` source classes that follow the labels as well as `signal` says."""
    labels = torch.arange(n) % NUM_CLASSES
    logits = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return (logits + signal * F.one_hot(labels, width)).softmax(dim=1), labels


def shuffled(labels, seed=0):
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def gaussian_log_marginal(features, target, alpha, beta):
    f, y = features.double(), target.double()
    covariance = torch.eye(len(y), dtype=torch.float64) / beta + f @ f.T / alpha
    return float(torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)) / len(y)


def plain_h_score(features, labels):
    x = features.double() - features.double().mean(dim=0)
    means = torch.stack([x[labels == label].mean(dim=0) for label in labels.tolist()])
    return float(torch.trace(torch.linalg.pinv(x.T @ x, hermitian=True) @ means.T @ means))


def measures(signal, labels=None, seed=0):
    """Every measure of one candidate, whose features and source head carry the same signal."""
    features, true_labels = draw(signal=signal, seed=seed)
    probabilities, _ = source_head(3 * signal, seed=seed)
    labels = true_labels if labels is None else labels
    return {
        "logme": logme(features, labels, num_classes=NUM_CLASSES),
        "h_score": h_score(features, labels, num_classes=NUM_CLASSES),
        "leep": leep(probabilities, labels, num_classes=NUM_CLASSES),
        "nce": nce(probabilities.argmax(dim=1), labels, num_classes=NUM_CLASSES),
    }


# The evidence


def log_evidence(features, target, alpha, beta):
    """Of one target (N,), per image, as `logme` reckons it: log N(y; 0, I/beta + F F^T/alpha) / N."""
    ratio, precision = torch.tensor([[alpha / beta], [beta]], dtype=torch.float64)
    return float(_evidence(_spectrum(features.double(), target.double()[:, None]), ratio, precision))


def fit_precisions(features, target):
    """`(alpha, beta)` that `logme` takes for one target (N,)."""
    scale = float(features.abs().max())
    spectrum = _spectrum(features.double() / scale, target.double()[:, None])
    ratio = _best_ratio(spectrum)
    unexplained = ratio / (spectrum.eigenvalues[:, None] + ratio)
    beta = spectrum.n / float(spectrum.outside + (spectrum.squares * unexplained).sum(0))
    return beta * float(ratio) * scale**2, beta


@pytest.mark.parametrize(("n", "width"), SHAPES, ids=SHAPE_NAMES)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.03, 20.0), (50.0, 4.0)])
def test_the_evidence_equals_the_exact_gaussian_log_marginal_likelihood(n, width, alpha, beta):
    features, labels = draw(n, width)
    target = (labels == 1).double()
    expected = gaussian_log_marginal(features, target, alpha, beta)
    assert log_evidence(features, target, alpha, beta) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("n", "width"), SHAPES, ids=SHAPE_NAMES)
def test_logme_equals_the_exact_gaussian_log_marginal_likelihood_at_its_maximum(n, width):
    """The maximum is found here by a simplex search over the exact likelihood, class by class."""
    features, labels = draw(n, width, signal=0.5)
    starts, bounds = [(0.0, 0.0), (4.0, 4.0)], [(-12.0, 12.0)] * 2
    highest = []
    for target in F.one_hot(labels).T:

        def loss(logs, target=target):
            return -gaussian_log_marginal(features, target, math.exp(logs[0]), math.exp(logs[1]))

        found = [minimize(loss, x0, method="Nelder-Mead", bounds=bounds, options={"fatol": 1e-7}) for x0 in starts]
        highest.append(-min(result.fun for result in found))
    assert logme(features, labels, num_classes=NUM_CLASSES) == pytest.approx(sum(highest) / NUM_CLASSES, abs=1e-4)


@pytest.mark.parametrize(("n", "width"), SHAPES, ids=SHAPE_NAMES)
def test_any_other_precisions_lower_the_evidence(n, width):
    """Of a target with as much noise as signal; one that wide features explain wholly has no best beta."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(n, width, generator=generator) * torch.logspace(0, -2, width)
    target = features @ torch.randn(width, generator=generator) + torch.randn(n, generator=generator)
    alpha, beta = fit_precisions(features, target)
    best = log_evidence(features, target, alpha, beta)
    assert beta < 10
    for up, across in [(1.05, 1), (1 / 1.05, 1), (1, 1.05), (1, 1 / 1.05), (1.05, 1.05), (3, 0.3), (30, 30)]:
        assert log_evidence(features, target, alpha * up, beta * across) < best


def test_of_two_maxima_the_higher_is_found():
    """From alpha = beta = 1 a fixed point climbs the right one."""
    variances = torch.tensor([1.0] * 3 + [4.2e-3] * 9 + [6e-4] * 11).double()
    squares = torch.tensor([0.39] * 3 + [0.28] * 9 + [3e-4] * 11).double()
    features, target = variances.sqrt().diag(), squares.sqrt()

    def best_evidence(ratio):
        beta = len(target) / float((squares * ratio / (variances + ratio)).sum())
        return log_evidence(features, target, beta * ratio, beta)

    left, valley, right = (best_evidence(ratio) for ratio in (1e-7, 1e-2, 0.4))
    assert valley < right < left
    assert log_evidence(features, target, *fit_precisions(features, target)) >= left


def test_logme_is_the_mean_of_the_evidence_at_the_fitted_precisions():
    features, labels = draw(50, 80)
    targets = [(labels == label).double() for label in range(NUM_CLASSES)]
    values = [log_evidence(features, target, *fit_precisions(features, target)) for target in targets]
    assert logme(features, labels, num_classes=NUM_CLASSES) == pytest.approx(sum(values) / NUM_CLASSES, abs=1e-9)


@pytest.mark.parametrize(("n", "width"), SHAPES, ids=SHAPE_NAMES)
def test_features_of_another_scale_or_with_a_copy_of_each_column_have_the_same_logme(n, width):
    features, labels = draw(n, width)
    features = features.double()
    value = logme(features, labels, num_classes=NUM_CLASSES)
    for same in (1e-200 * features, 1e200 * features, torch.cat([features, features], dim=1)):
        assert logme(same, labels, num_classes=NUM_CLASSES) == pytest.approx(value, abs=1e-6)


@pytest.mark.technique("T002")
def test_wide_noise_does_not_win_by_its_width():
    """Without (D - k) log alpha the noise scores 168 here."""
    noise, labels = draw(50, 2048, signal=0)
    good, _ = draw(50, 64)
    best_guess = -0.5 * (math.log(2 * math.pi * 0.25) + 1)  # a zero-mean Gaussian of the targets' mean square
    value = logme(noise, labels, num_classes=NUM_CLASSES)
    assert value < logme(good, labels, num_classes=NUM_CLASSES)
    assert value == pytest.approx(best_guess, abs=0.05)


def test_features_that_hold_the_labels_score_high_and_finite():
    labels = torch.arange(60) % 3
    value = logme(F.one_hot(labels).float(), labels, num_classes=3)
    assert 5 < value < 12


def test_features_that_say_nothing_score_as_a_gaussian_without_them():
    _, labels = draw()
    for nothing in (torch.zeros(160, 5), torch.zeros(160, 500)):
        guess = -0.5 * (math.log(2 * math.pi / NUM_CLASSES) + 1)
        assert logme(nothing, labels, num_classes=NUM_CLASSES) == pytest.approx(guess, abs=1e-6)
        assert h_score(nothing, labels, num_classes=NUM_CLASSES) == 0.0
    constants = torch.linspace(0.1, 0.9, 20, dtype=torch.float64).expand(160, 20)
    assert (constants - constants.mean(dim=0)).any()  # rounding leaves something to divide by
    assert h_score(constants, labels, num_classes=NUM_CLASSES) == 0.0


# The H-score


@pytest.mark.parametrize(("n", "width"), [*SHAPES, (60, 1)], ids=[*SHAPE_NAMES, "one column"])
def test_the_h_score_equals_its_definition_with_the_shrinkage_of_scikit_learn(n, width):
    features, labels = draw(n, width)
    features = features * torch.linspace(0.5, 3, width) + 7  # neither isotropic nor centred
    x = features.double() - features.double().mean(dim=0)
    a = ledoit_wolf_shrinkage(features.double().numpy())
    covariance = x.T @ x / n
    shrunk = (1 - a) * covariance + a * covariance.trace() / width * torch.eye(width)
    means = torch.stack([x[labels == label].mean(dim=0) for label in labels.tolist()])  # (N, D)
    expected = float(torch.trace(torch.linalg.solve(shrunk, (1 - a) * means.T @ means / n)))
    assert h_score(features, labels, num_classes=NUM_CLASSES) == pytest.approx(expected, rel=1e-8)


def test_random_labels_of_wide_features_reach_the_plain_h_score_but_not_the_shrunk_one():
    features, labels = draw(60, 200, signal=0, num_classes=10)
    assert plain_h_score(features, labels) == pytest.approx(9, abs=1e-6)
    assert h_score(features, labels, num_classes=10) < 2


@pytest.mark.parametrize("signal", [0.0, 1.0, 100.0])
@pytest.mark.parametrize(("n", "width"), SHAPES, ids=SHAPE_NAMES)
def test_the_h_score_lies_between_0_and_one_less_than_the_classes(n, width, signal):
    features, labels = draw(n, width, signal=signal)
    assert 0 <= h_score(features, labels, num_classes=NUM_CLASSES) <= NUM_CLASSES - 1


# LEEP and NCE


def test_a_source_head_that_knows_the_classes_has_leep_and_nce_0():
    labels = torch.arange(40) % NUM_CLASSES
    probabilities = F.one_hot((labels + 1) % NUM_CLASSES, 6).float()  # other names, and two classes unused
    assert leep(probabilities, labels, num_classes=NUM_CLASSES) == 0.0
    assert nce(probabilities.argmax(dim=1), labels, num_classes=NUM_CLASSES) == 0.0


def test_an_unsure_source_head_that_never_mixes_two_classes_has_leep_0_and_not_more():
    labels = torch.arange(40) % 2
    shares = F.normalize(torch.rand(40, 6, generator=torch.Generator().manual_seed(0)).double(), p=1)
    probabilities = torch.cat([shares * (labels == 0)[:, None], shares * (labels == 1)[:, None]], dim=1)
    assert -1e-15 < leep(probabilities, labels, num_classes=2) <= 0


def test_a_source_head_that_says_one_thing_leaves_the_entropy_of_the_labels():
    labels = torch.arange(40) % NUM_CLASSES
    same = torch.tensor([0.7, 0.2, 0.1]).expand(40, 3)
    assert leep(same, labels, num_classes=NUM_CLASSES) == pytest.approx(-math.log(NUM_CLASSES))
    assert nce(torch.full((40,), 999), labels, num_classes=NUM_CLASSES) == pytest.approx(-math.log(NUM_CLASSES))


def test_leep_of_one_hot_probabilities_is_nce():
    probabilities, labels = source_head(1.0)
    predictions = probabilities.argmax(dim=1)
    value = nce(predictions, labels, num_classes=NUM_CLASSES)
    assert leep(F.one_hot(predictions, 7).float(), labels, num_classes=NUM_CLASSES) == pytest.approx(value)
    assert value < -0.1


@pytest.mark.parametrize("signal", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0, 1000.0])
def test_leep_is_at_most_0_and_at_least_what_its_most_likely_source_class_gives(signal, sharpness):
    """The bound of Nguyen et al., with the soft conditional in the place of NCE's; always true."""
    probabilities, labels = source_head(signal)
    theta = (sharpness * probabilities.double().log()).softmax(dim=1)
    joint = torch.stack([theta[labels == label].sum(dim=0) for label in range(NUM_CLASSES)])
    confidence, source = theta.max(dim=1)
    bound = ((joint / joint.sum(dim=0))[labels, source] * confidence).log().mean()
    assert bound - 1e-12 <= leep(theta, labels, num_classes=NUM_CLASSES) <= 0


@pytest.mark.parametrize("signal", [0.0, 0.5, 1.0])
def test_leep_is_at_least_nce_plus_the_log_confidence_of_heads_that_are_mostly_wrong(signal):
    """Property 1 of Nguyen et al. It holds here, but is no law: see the next test."""
    probabilities, labels = source_head(signal)
    confidence, source = probabilities.max(dim=1)
    bound = nce(source, labels, num_classes=NUM_CLASSES) + float(confidence.log().mean())
    assert leep(probabilities, labels, num_classes=NUM_CLASSES) >= bound


def test_the_printed_bound_of_leep_fails_for_two_images_and_an_unsure_head_that_is_right():
    probabilities, labels = torch.tensor([[0.51, 0.49], [0.49, 0.51]]).double(), torch.tensor([0, 1])
    value = leep(probabilities, labels, num_classes=2)
    assert value == pytest.approx(math.log(0.51**2 + 0.49**2))
    assert value < nce(torch.tensor([0, 1]), labels, num_classes=2) + math.log(0.51)


@pytest.mark.parametrize("smallest", [0.0, 1e-45, 1e-300])
def test_source_classes_without_mass_give_no_nan(smallest):
    probabilities, labels = source_head(1.0)
    unused = torch.full((len(labels), 3), smallest, dtype=torch.float64)
    value = leep(probabilities, labels, num_classes=NUM_CLASSES)
    widened = torch.cat([probabilities.double(), unused], dim=1)
    assert leep(widened, labels, num_classes=NUM_CLASSES) == pytest.approx(value, abs=1e-12)


def test_leep_takes_half_precision_rows_as_distributions():
    probabilities, labels = source_head(1.0)
    value = leep(probabilities, labels, num_classes=NUM_CLASSES)
    assert leep(probabilities.half(), labels, num_classes=NUM_CLASSES) == pytest.approx(value, abs=1e-3)
    assert leep(probabilities * 1.005, labels, num_classes=NUM_CLASSES) == pytest.approx(value, abs=1e-6)


# All of them


@pytest.mark.technique("T002")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_ranks_last_by_every_measure(seed):
    noise, *others = (measures(signal, seed=seed) for signal in (0.0, 0.5, 1.0))
    for name, value in noise.items():
        assert all(other[name] > value for other in others), name


@pytest.mark.technique("T002")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffled_labels_score_lower_than_true_ones_by_every_measure(seed):
    true, lower = measures(1.0, seed=seed), measures(1.0, shuffled(draw()[1], seed), seed=seed)
    for name, value in lower.items():
        assert value < true[name], name


def test_the_order_of_images_does_not_matter():
    features, labels = draw()
    probabilities, _ = source_head(1.0)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))
    for measure, rows in [
        (logme, features),
        (h_score, features),
        (leep, probabilities),
        (nce, probabilities.argmax(1)),
    ]:
        here, there = (
            measure(r, y, num_classes=NUM_CLASSES) for r, y in [(rows, labels), (rows[order], labels[order])]
        )
        assert there == pytest.approx(here, abs=1e-10), measure.__name__


def test_a_class_without_images_changes_nothing():
    features, labels = draw()
    probabilities, _ = source_head(1.0)
    labels = torch.where(labels >= 2, labels + 1, labels)  # class 2 is absent, and 5 to 7
    for measure, rows in [
        (logme, features),
        (h_score, features),
        (leep, probabilities),
        (nce, probabilities.argmax(1)),
    ]:
        gone = labels - (labels > 2).long()
        assert measure(rows, labels, num_classes=8) == pytest.approx(measure(rows, gone, num_classes=4), abs=1e-12)


def test_small_integers_and_half_precision_are_understood():
    features, labels = draw()
    assert logme(features.bfloat16(), labels.to(torch.uint8), num_classes=NUM_CLASSES) == pytest.approx(
        logme(features, labels, num_classes=NUM_CLASSES), abs=1e-3
    )


BAD_ROWS = [
    pytest.param(torch.ones(3, 2), torch.tensor([0, 1]), r"got \(3, 2\) and \(2,\)", id="lengths"),
    pytest.param(torch.ones(3), torch.tensor([0, 1, 1]), r"got \(3,\) and", id="a vector"),
    pytest.param(torch.ones(0, 2), torch.tensor([]).long(), "none empty", id="no image"),
    pytest.param(torch.ones(2, 0), torch.tensor([0, 1]), "none empty", id="no column"),
    pytest.param(torch.tensor([[1.0], [math.nan]]), torch.tensor([0, 1]), "infinities or NaN", id="nan"),
    pytest.param(torch.tensor([[1.0], [math.inf]]), torch.tensor([0, 1]), "infinities or NaN", id="infinite"),
    pytest.param(torch.ones(2, 1), torch.tensor([0, 3]), r"lie in \[0, 3\), got 0 to 3", id="too large"),
    pytest.param(torch.ones(2, 1), torch.tensor([-1, 1]), r"lie in \[0, 3\), got -1 to 1", id="negative"),
    pytest.param(torch.ones(2, 1), torch.tensor([0.0, 1.0]), "labels must be integers", id="fractions"),
    pytest.param(torch.ones(2, 1), torch.tensor([1, 1]), "every label is 1", id="one class"),
]


@pytest.mark.parametrize(("rows", "labels", "message"), BAD_ROWS)
@pytest.mark.parametrize("measure", [logme, h_score, leep])
def test_rows_and_labels_that_do_not_fit_are_refused(measure, rows, labels, message):
    with pytest.raises(ValueError, match=message):
        measure(rows, labels, num_classes=3)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0.5, 0.5], [0, 1], "must be integers"),
        ([[0], [1]], [0, 1], "must be integers"),
        ([0, 1, 1], [0, 1], r"got \(3, 1\) and \(2,\)"),
        ([0, 1], [0, 2], r"lie in \[0, 2\)"),
        ([0, 1], [1, 1], "every label is 1"),
    ],
)
def test_source_predictions_that_do_not_fit_are_refused(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        nce(torch.tensor(predictions), torch.tensor(labels), num_classes=2)
    with pytest.raises(ValueError, match="none empty"):
        nce(torch.tensor([]).long(), torch.tensor([]).long(), num_classes=2)


@pytest.mark.parametrize("row", [[0.5, 0.4], [1.2, -0.2], [0.0, 0.0]])
def test_rows_that_are_no_distribution_are_refused_by_leep(row):
    with pytest.raises(ValueError, match="row 1 is no distribution"):
        leep(torch.tensor([[0.5, 0.5], row]), torch.tensor([0, 1]), num_classes=2)


# Agreement


def test_agreement_is_1_for_equal_orders_and_minus_1_for_opposite_ones():
    agreement = rank_agreement({"logme": [-0.7, -0.5, -0.1, 0.2], "nce": [1, 2, 30, 400], "leep": [4, 3, 2, 1]})
    assert list(agreement) == [("logme", "nce"), ("logme", "leep"), ("nce", "leep")]
    assert list(agreement.values()) == pytest.approx([1, -1, -1])


def test_ties_share_their_mean_rank():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: their Pearson correlation is 4.5 / sqrt(4.5 * 5)."""
    agreement = rank_agreement({"a": [0, 1, 1, 2], "b": [0, 1, 2, 3]})
    assert agreement["a", "b"] == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_what_cannot_be_correlated_is_left_out():
    assert rank_agreement({}) == {}
    assert rank_agreement({"a": [], "b": []}) == {}
    assert rank_agreement({"a": [1, 2], "b": [1, 2]}) == {}
    assert list(rank_agreement({"a": [1, 2, 3], "tied": [5, 5, 5], "b": [3, 2, 1]})) == [("a", "b")]


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one score per candidate"):
        rank_agreement({"a": [1, 2, 3], "b": [1, 2]})
    with pytest.raises(ValueError, match="finite, but b is not"):
        rank_agreement({"a": [1, 2, 3], "b": [1, math.nan, 2]})


@pytest.mark.technique("T002")
def test_the_measures_agree_where_the_signal_decides():
    candidates = [measures(signal) for signal in (0.2, 0.5, 0.8, 1.2)]
    agreement = rank_agreement({name: [candidate[name] for candidate in candidates] for name in candidates[0]})
    assert len(agreement) == 6
    assert min(agreement.values()) == pytest.approx(1)
