"""Losses: what they are at the start, what they equal, what they make the best model say, and how they add up."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune.config.plan import Stage
from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import make_head
from finetune.training.losses import class_weights, log_priors, make_loss
from finetune.training.optimization import decay_penalty, group_parameters

KINDS = ["none", "inverse", "effective", "sampler", "logit_adjustment", "focal"]
COUNTS = [40, 10, 5, 2]


def some(batch=24, num_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, num_classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(num_classes, (batch,), generator=generator)


def soft(batch=24, num_classes=4):
    return torch.rand(batch, num_classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)


def tiny_classifier(num_classes=4, init="zero"):
    torch.manual_seed(0)
    backbone = load_backbone("test_resnet", zoo={}, pretrained=False)
    classifier = Classifier(backbone, make_head(backbone.num_features, num_classes, init=init))
    classifier.freeze(1)
    return classifier.eval()


@pytest.mark.technique("T074")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["none", "sampler"])
def test_the_first_loss_of_a_fresh_classifier_is_the_log_of_the_number_of_classes(kind, smoothing):
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loss = make_loss(kind, COUNTS, smoothing=smoothing)(tiny_classifier()(images), torch.arange(4))
    torch.testing.assert_close(loss, torch.full((4,), math.log(4)))


@pytest.mark.technique("T074")
@pytest.mark.parametrize("kind", ["inverse", "effective"])
def test_weights_leave_the_first_loss_as_it_is_on_average_over_the_training_images(kind):
    labels = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
    loss = make_loss(kind, COUNTS, smoothing=0.1)(torch.zeros(len(labels), 4), labels)
    assert float(loss.mean()) == pytest.approx(math.log(4), rel=1e-6)
    assert float(loss[-1]) > 2 * float(loss[0])


def test_the_first_losses_of_shifted_logits_and_of_focal_are_what_theory_says():
    labels = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
    shares = torch.tensor(COUNTS).double() / sum(COUNTS)
    shifted = make_loss("logit_adjustment", COUNTS)(torch.zeros(len(labels), 4).double(), labels)
    assert float(shifted.mean()) == pytest.approx(float(-(shares * shares.log()).sum()), rel=1e-6)
    focal = make_loss("focal", COUNTS, gamma=2.0)(torch.zeros(3, 4), torch.arange(3))
    torch.testing.assert_close(focal, torch.full((3,), 0.75**2 * math.log(4)))


@pytest.mark.technique("T075")
def test_the_loss_rises_when_decay_is_switched_on_and_not_where_nothing_is_decayed():
    classifier = tiny_classifier(init="small")
    stage = Stage(name="full", trainable_stages=1, epochs=1, lr_head=1e-2, lr_backbone=1e-3, batch_norm="frozen")
    images, labels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    plain = float(make_loss("none", COUNTS)(classifier(images), labels).mean().detach())
    penalties = [
        decay_penalty(torch.optim.SGD(group_parameters(classifier, stage, decay), lr=0.1)) for decay in (0, 1e-2, 10)
    ]
    assert penalties[0] == 0
    assert penalties[2] == pytest.approx(1000 * penalties[1], rel=1e-6)
    assert plain + penalties[2] > 2 * plain > 0
    vectors = [{"params": [p for p in classifier.parameters() if p.ndim < 2], "decay": 0.0}]
    assert decay_penalty(torch.optim.SGD(vectors, lr=0.1)) == 0


@pytest.mark.technique("T075")
def test_the_gradient_of_the_penalty_is_what_coupled_decay_adds():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False).double()
    optimizer = torch.optim.SGD([{"params": layer.parameters(), "decay": 0.25}], lr=1.0, weight_decay=0.25)
    before, around = layer.weight.detach().clone(), []
    for shift in (1e-4, -1e-4):
        layer.weight.data[1, 2] = before[1, 2] + shift
        around.append(decay_penalty(optimizer))
    layer.weight.data.copy_(before)
    layer.weight.grad = torch.zeros_like(before)
    optimizer.step()
    step = float(before[1, 2] - layer.weight[1, 2].detach())
    assert (around[0] - around[1]) / 2e-4 == pytest.approx(step, rel=1e-6)


@pytest.mark.technique("T075")
def test_smoothing_raises_the_loss_of_what_is_right():
    logits, labels = 6 * F.one_hot(torch.arange(4)).float(), torch.arange(4)
    losses = [float(make_loss("none", COUNTS, smoothing=e)(logits, labels).mean()) for e in (0, 0.1, 0.3)]
    assert losses == sorted(losses) and losses[1] > 10 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_hot_targets_equal_their_labels_and_mixed_ones_the_mixed_loss(kind, smoothing):
    loss, (logits, labels) = make_loss(kind, COUNTS, smoothing=smoothing), some()
    hard = loss(logits, labels)
    torch.testing.assert_close(loss(logits, F.one_hot(labels, 4).float()), hard)
    other = labels.roll(1)
    blend = 0.3 * F.one_hot(labels, 4).double() + 0.7 * F.one_hot(other, 4).double()
    torch.testing.assert_close(loss(logits, blend), 0.3 * hard + 0.7 * loss(logits, other))


@pytest.mark.parametrize("targets", ["hard", "soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(("kind", "gamma"), [("none", 2.0), ("sampler", 2.0), ("focal", 0.0)])
def test_without_weights_it_is_the_cross_entropy_of_torch(kind, gamma, smoothing, targets):
    logits, labels = some()
    wanted = labels if targets == "hard" else soft()
    expected = F.cross_entropy(logits, wanted, label_smoothing=smoothing, reduction="none")
    got = make_loss(kind, COUNTS, smoothing=smoothing, gamma=gamma)(logits, wanted)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_with_weights_and_no_smoothing_it_is_that_of_torch_too():
    logits, labels = some()
    weight = class_weights("inverse", COUNTS)
    expected = F.cross_entropy(logits, labels, weight=weight, reduction="none")
    torch.testing.assert_close(make_loss("inverse", COUNTS)(logits, labels), expected, rtol=1e-6, atol=1e-9)


def test_the_best_answer_to_a_smoothed_common_image_is_common_and_for_torch_it_is_rare():
    counts = [500, 10, 10]
    weight, loss = class_weights("inverse", counts), make_loss("inverse", counts, smoothing=0.1)
    label, best = torch.tensor([0]), {}
    for name in ("ours", "torch"):
        logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=50, line_search_fn="strong_wolfe")

        def close(name=name, logits=logits, optimizer=optimizer):
            optimizer.zero_grad()
            theirs = F.cross_entropy(logits, label, weight=weight, label_smoothing=0.1, reduction="sum")
            value = loss(logits, label).sum() if name == "ours" else theirs
            value.backward()
            return value

        optimizer.step(close)
        best[name] = logits.detach().softmax(1)[0]
    torch.testing.assert_close(best["ours"], torch.tensor([28, 1, 1]).double() / 30, rtol=1e-3, atol=1e-3)
    assert best["torch"].argmax() != 0


def test_focal_is_its_formula_and_turns_down_what_is_right():
    logits, labels = some()
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(make_loss("focal", COUNTS, gamma=1.5)(logits, labels), -((1 - p) ** 1.5) * p.log())


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_focal_has_a_gradient_where_a_model_is_sure(gamma, dtype):
    logits = torch.tensor([[90.0, 0, 0, 0], [90.0, 0, 0, 0]], dtype=dtype, requires_grad=True)
    losses = make_loss("focal", COUNTS, gamma=gamma, smoothing=0.1)(logits, torch.tensor([0, 1]))
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all() and logits.grad.isfinite().all()
    assert float(logits.grad[1].abs().max()) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_right(kind):
    logits, loss = some(6)[0].requires_grad_(), make_loss(kind, COUNTS, smoothing=0.1, gamma=1.5)
    assert torch.autograd.gradcheck(lambda x: loss(x, soft(6)), logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 24])
def test_pieces_of_a_batch_add_up_to_its_gradient(kind, size):
    loss, (values, labels) = make_loss(kind, COUNTS, smoothing=0.1), some()
    whole, pieces = (values.clone().requires_grad_() for _ in range(2))
    (loss(whole, labels).sum() / 24).backward()
    for x, y in zip(pieces.split(size), labels.split(size), strict=True):
        (loss(x, y).sum() / 24).backward()
    torch.testing.assert_close(pieces.grad, whole.grad, rtol=1e-12, atol=1e-15)


def test_torch_divides_by_the_weights_of_the_piece():
    (logits, labels), weight = some(), class_weights("inverse", COUNTS)
    whole = F.cross_entropy(logits, labels, weight=weight)
    halves = [F.cross_entropy(x, y, weight=weight) for x, y in zip(logits.split(12), labels.split(12), strict=True)]
    assert abs(float(sum(halves) / 2 - whole)) > 0.005


@pytest.mark.parametrize("counts", [COUNTS, [7, 7, 7], [100_000, 1], [5, 0, 20]])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_average_to_one_over_the_training_images(kind, counts):
    weights, images = class_weights(kind, counts), torch.tensor(counts).double()
    assert float(weights @ images / images.sum()) == pytest.approx(1, rel=1e-12)
    assert (weights[images == 0] == 0).all() or kind not in ("inverse", "effective")


def test_inverse_weights_give_every_class_the_same_say():
    said = class_weights("inverse", COUNTS) * torch.tensor(COUNTS)
    torch.testing.assert_close(said, torch.full((4,), sum(COUNTS) / 4, dtype=torch.float64))


def test_effective_weights_lie_between_none_and_inverse():
    torch.testing.assert_close(class_weights("effective", COUNTS, beta=0.0), torch.ones(4).double())
    nearly = class_weights("effective", COUNTS, beta=1 - 1e-9)
    torch.testing.assert_close(nearly, class_weights("inverse", COUNTS), rtol=1e-6, atol=0)
    weights, numbers = class_weights("effective", [300, 20], beta=0.99), [(1 - 0.99**n) / 0.01 for n in (300, 20)]
    assert float(weights[1] / weights[0]) == pytest.approx(numbers[0] / numbers[1], rel=1e-9)


def fit_line(kind, counts):
    """The point where the best linear model on two normal distributions at -1 and 1 changes its mind.

    Expected losses over a fine grid, so there is no sampling error.
    """
    x = torch.linspace(-8, 8, 801, dtype=torch.float64)
    priors = torch.tensor(counts).double() / sum(counts)
    density = torch.stack([torch.exp(-((x - mean) ** 2) / 2) for mean in (-1, 1)])
    mass = (priors[:, None] * density / density.sum(1, keepdim=True)).flatten()
    inputs, labels = x.repeat(2)[:, None], torch.arange(2).repeat_interleave(len(x))
    layer, loss = nn.Linear(1, 2).double(), make_loss(kind, counts)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def close():
        optimizer.zero_grad()
        value = (mass * loss(layer(inputs), labels)).sum()
        value.backward()
        return value

    optimizer.step(close)
    slope, offset = (float(part[1] - part[0]) for part in (layer.weight.detach()[:, 0], layer.bias.detach()))
    return -offset / slope, layer


@pytest.mark.parametrize(("kind", "where"), [("none", math.log(19) / 2), ("logit_adjustment", 0), ("inverse", 0)])
def test_shifted_logits_and_weights_find_the_border_of_balanced_error(kind, where):
    """Bayes: with priors 0.95 and 0.05 the border of plain error lies at log(19) / 2, that of balanced error at 0."""
    assert fit_line(kind, [95, 5])[0] == pytest.approx(where, abs=1e-3)


def test_log_priors_taken_from_a_plain_model_give_what_shifted_logits_train_for():
    plain, shifted = (fit_line(kind, [95, 5])[1] for kind in ("none", "logit_adjustment"))
    bias = plain.bias - log_priors([95, 5])
    torch.testing.assert_close((bias[1] - bias[0]).detach(), (shifted.bias[1] - shifted.bias[0]).detach(),
                               rtol=0, atol=1e-3)  # fmt: skip


def test_a_class_without_images_can_be_trained_beside():
    for kind in KINDS:
        logits = torch.zeros(3, 3, requires_grad=True)
        losses = make_loss(kind, [9, 3, 0], smoothing=0.1)(logits, torch.tensor([0, 1, 1]))
        losses.sum().backward()
        assert losses.isfinite().all() and logits.grad.isfinite().all()
        assert (logits.grad[:, 2] > 0).all()  # it is pushed down


def test_impossible_wishes_are_our_bug():
    for options, words in (({"smoothing": 1.0}, "smoothing"), ({"gamma": -1.0}, "gamma"), ({"beta": 1.0}, "beta")):
        with pytest.raises(ValueError, match=words):
            make_loss("effective", COUNTS, **options)
    for counts in ([], [0, 0], [3, -1]):
        with pytest.raises(ValueError, match="counts must hold"):
            make_loss("none", counts)
    with pytest.raises(ValueError, match=r"logits \(2, 3\) and targets \(2,\) do not fit 4 classes"):
        make_loss("none", COUNTS)(torch.zeros(2, 3), torch.arange(2))
    with pytest.raises(ValueError, match="do not fit 4 classes"):
        make_loss("none", COUNTS)(torch.zeros(2, 4), torch.zeros(1, 4))
