"""The choice of a penalty: that of exact solutions, for a few loose ones."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from finetune.compute import PLAIN
from finetune.config.backbone_names import read_zoo
from finetune.data.decoding import center_crop, decode
from finetune.data.sources import open_source, read_bytes
from finetune.features.extraction import look_at_all
from finetune.features.layer_profile import assign_folds, cross_validate
from finetune.features.logistic import LogisticProblem
from finetune.features.penalties import L2_GRID, MOST_STEPS, Part, choose_penalty
from finetune.features.probing import fit_probe, sweep_probe
from finetune.models.backbones import load_backbone
from finetune.models.frozen import FrozenBackbone


def blobs(n, d, k, *, spread=0.5, seed=0):
    """Features (n, d) of k overlapping classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % k
    centres = spread * torch.randn(k, d, generator=torch.Generator().manual_seed(99))
    return centres[labels] + torch.randn(n, d, generator=generator), labels


def mixed(n, d, k, *, spread=1.5, seed=0):
    """Features (n, d) as networks have them: few directions of uneven strength, mixed up and cut off below zero."""
    fixed, generator = torch.Generator().manual_seed(98), torch.Generator().manual_seed(seed)
    h, labels = d // 4, torch.arange(n) % k
    centres, mixing = spread * torch.randn(k, h, generator=fixed), 3 * torch.randn(h, d, generator=fixed) / h**0.5
    inner = (centres[labels] + torch.randn(n, h, generator=generator)) * torch.logspace(0, -1, h)
    return (inner @ mixing + 0.3 * torch.randn(n, d, generator=generator)).relu(), labels


def digits(n, seed):
    """Drawn digits of 8 x 8 pixels: n to learn from, 100 to judge."""
    whole = load_digits()
    order = np.random.default_rng(seed).permutation(len(whole.target))
    pixels, labels = torch.from_numpy(whole.data[order]).float(), torch.from_numpy(whole.target[order]).long()
    return pixels[:n], labels[:n], pixels[n : n + 100], labels[n : n + 100]


def uneven(n, d, k, seed=0):
    """Features (n, d) of k classes, from many images to a few."""
    features, labels = blobs(8 * n, d, k, seed=seed)
    kept = torch.rand(8 * n, generator=torch.Generator().manual_seed(seed)) < 0.4 / (1 + labels)
    return features[kept][:n], labels[kept][:n]


def mislabelled(n, d, k, seed=0):
    """Features (n, d) of k classes, every tenth with the label of any."""
    features, labels = mixed(n, d, k, spread=2.5, seed=seed)
    labels[::10] = torch.randint(k, labels[::10].shape, generator=torch.Generator().manual_seed(seed))
    return features, labels


SETS = {
    "few classes, N > D": (*blobs(300, 20, 3), *blobs(100, 20, 3, seed=1)),
    "few classes, N < D": (*blobs(40, 150, 3), *blobs(100, 150, 3, seed=1)),
    "many classes, few images": (*blobs(240, 60, 60), *blobs(120, 60, 60, seed=1)),
    "many classes, easy": (*blobs(400, 60, 40, spread=2.0), *blobs(120, 60, 40, spread=2.0, seed=1)),
    "a network's, many classes": (*mixed(250, 64, 50), *mixed(100, 64, 50, seed=1)),
    "a network's, N < D": (*mixed(60, 256, 6), *mixed(120, 256, 6, seed=1)),
    "a network's, N > D": (*mixed(900, 64, 6, spread=0.5), *mixed(200, 64, 6, spread=0.5, seed=1)),
    "uneven classes": (*uneven(300, 30, 8), *uneven(150, 30, 8, seed=1)),
    "wrong labels": (*mislabelled(600, 96, 80), *mislabelled(300, 96, 80, seed=1)),
    "no signal": (torch.randn(60, 30, generator=torch.Generator().manual_seed(5)), torch.arange(60) % 2,
                  torch.randn(60, 30, generator=torch.Generator().manual_seed(6)), torch.arange(60) % 2),
    "30 digits": digits(30, 0),
    "300 digits": digits(300, 1),
    "1,500 digits": digits(1500, 2),
}  # fmt: skip


def exact_losses(features, labels, judges, answers, num_classes, grid=L2_GRID):
    """Summed log loss on the judges of an exact solution for each penalty."""
    losses, probe = {}, None
    for l2 in sorted(grid, reverse=True):
        probe = fit_probe(features, labels, num_classes=num_classes, l2=l2, start=probe)
        losses[l2] = float(F.cross_entropy(probe.logits(judges), answers, reduction="sum"))
    return losses


def is_best(l2, losses):
    """The exact best, or beaten by less than float32 can tell."""
    return losses[l2] <= min(losses.values()) * (1 + 1e-4)


@pytest.mark.technique("T004")
@pytest.mark.parametrize("name", SETS)
def test_the_choice_is_that_of_exact_solutions(name):
    features, labels, judges, answers = SETS[name]
    num_classes = int(labels.max()) + 1
    probe, choice = sweep_probe(features, labels, judges, answers, num_classes=num_classes)
    losses = exact_losses(features, labels, judges, answers, num_classes)
    assert is_best(probe.l2, losses)
    assert choice.losses[probe.l2] == pytest.approx(losses[probe.l2], rel=2e-3, abs=1e-4 * len(answers))
    assert probe.gradient_norm <= 1e-6


@pytest.mark.shared
@pytest.mark.technique("T004")
@pytest.mark.parametrize("name", ["sign_digits", "malaria", "ants_bees"])
def test_on_photographs_too_the_choice_is_that_of_exact_solutions(name, shared):
    items = [item for item in open_source(shared / "data" / name).items if item.role == "test"][::2][:250]
    crops = [
        center_crop(decode(read_bytes(item), shorter_pixels=32, interpolation="bilinear")[0], 32) for item in items
    ]
    backbone = load_backbone("tiny_resnet18.cifar10", zoo=read_zoo()).eval()
    frozen = FrozenBackbone(backbone, size_pixels=32, device="cpu")
    features = look_at_all(frozen, np.stack(crops), backbone.card.view(), PLAIN)[-1]
    labels = torch.tensor([item.label for item in items])
    num_classes = int(labels.max()) + 1
    found = cross_validate(features, labels, num_classes=num_classes, seed=0)
    assert is_best(found.l2, exact_fold_losses(features, labels, num_classes))


def exact_fold_losses(features, labels, num_classes, seed=0):
    fold, total = assign_folds(labels, seed=seed), dict.fromkeys(L2_GRID, 0.0)
    for part in range(5):
        out = fold == part
        for l2, loss in exact_losses(features[~out], labels[~out], features[out], labels[out], num_classes).items():
            total[l2] += loss
    return total


@pytest.mark.technique("T004")
@pytest.mark.parametrize("name", ["few classes, N < D", "many classes, few images", "a network's, N < D", "300 digits"])
def test_folds_choose_together_what_exact_solutions_choose(name):
    features, labels, *_ = SETS[name]
    num_classes = int(labels.max()) + 1
    found = cross_validate(features, labels, num_classes=num_classes, seed=0)
    losses = exact_fold_losses(features, labels, num_classes)
    assert is_best(found.l2, losses)
    assert found.log_loss * len(labels) == pytest.approx(losses[found.l2], rel=2e-3, abs=1e-4 * len(labels))


def test_a_penalty_costs_a_few_products_and_none_in_float64(monkeypatch):
    features, labels, judges, answers = SETS["many classes, easy"]
    exact, products = [], []
    look, bend = LogisticProblem._exact, LogisticProblem._bend
    monkeypatch.setattr(LogisticProblem, "_exact", lambda *rest: exact.append(1) or look(*rest))
    monkeypatch.setattr(LogisticProblem, "_bend", lambda *rest: products.append(1) or bend(*rest))
    choice = choose_penalty([Part(features, labels, (judges, answers), num_classes=40)])
    assert not exact
    assert len(products) <= 4 * len(choice.losses)


def test_rivals_are_solved_until_one_is_ahead():
    """Two penalties a percent apart: loose solutions could not tell them from each other."""
    features, labels, judges, answers = SETS["a network's, N > D"]
    for grid in ((0.01, 0.0101), (0.003, 0.00303), (0.1, 0.101)):
        losses = exact_losses(features, labels, judges, answers, 6, grid)
        part = Part(features, labels, (judges, answers), num_classes=6)
        assert choose_penalty([part], grid).l2 == min(losses, key=losses.__getitem__)


def test_the_choice_says_when_the_best_penalty_lies_at_an_edge():
    features, labels, *val = SETS["few classes, N > D"]
    for grid, best, at_edge in (
        ([1e-5, 0.03, 100.0], 0.03, False),
        ([1.0, 100.0, 1000.0], 1.0, True),
        ([1e-6, 1e-5, 1e-4], 1e-4, True),
        ([1.0], 1.0, False),
    ):
        choice = choose_penalty([Part(features, labels, tuple(val), num_classes=3)], grid)
        assert (choice.l2, choice.at_edge) == (best, at_edge), grid


def test_the_path_ends_where_weaker_penalties_only_get_worse():
    features, labels, *val = SETS["no signal"]
    choice = choose_penalty([Part(features, labels, tuple(val), num_classes=2)])
    assert (choice.l2, choice.at_edge) == (10.0, True)
    assert sorted(choice.losses) == [0.1, 0.3, 1.0, 3.0, 10.0]


def test_of_equal_penalties_the_stronger_is_chosen():
    features, labels = torch.zeros(12, 3), torch.arange(12) % 2  # nothing to learn: all penalties are equal
    choice = choose_penalty([Part(features, labels, (features, labels), num_classes=2)], [0.1, 10.0, 1.0])
    assert choice.l2 == 10.0


@pytest.mark.parametrize("grid", [[], [0.1, 0.0], [-1.0], [float("nan")]])
def test_a_grid_without_penalties_is_refused(grid):
    features, labels, *val = SETS["few classes, N > D"]
    with pytest.raises(ValueError, match="one or more to try, all of them positive"):
        choose_penalty([Part(features, labels, tuple(val), num_classes=3)], grid)


EQUAL = torch.ones(40, 6)
SAME = torch.randn(1, 6, generator=torch.Generator().manual_seed(7)).expand(40, 6).clone()
ODD = {
    "all features equal": (EQUAL, torch.arange(40) % 3, EQUAL, torch.arange(40) % 3, 3),
    "one class": (blobs(40, 6, 2)[0], torch.zeros(40, dtype=torch.long), *blobs(20, 6, 2, seed=1), 2),
    "copies with different labels": (torch.cat([blobs(20, 6, 2)[0]] * 2), torch.arange(40) // 20, *blobs(20, 6, 2), 2),
    "all features equal but of one image": (torch.cat([SAME, SAME[:1] + 1e6]), torch.arange(41) % 2,
                                            SAME, torch.arange(40) % 2, 2),
    "an image per class": (*blobs(30, 6, 30), *blobs(30, 6, 30, seed=1), 30),
    "separable far off": (1e6 * blobs(40, 6, 2, spread=50.0)[0], torch.arange(40) % 2,
                          1e6 * blobs(40, 6, 2, spread=50.0, seed=1)[0], torch.arange(40) % 2, 2),
    "one feature": (blobs(40, 1, 2)[0], torch.arange(40) % 2, *blobs(40, 1, 2, seed=1), 2),
    "two images": (*blobs(2, 6, 2), *blobs(2, 6, 2, seed=1), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_sweep_ends_on_odd_images_too(name, monkeypatch):
    products = []
    bend = LogisticProblem._bend
    monkeypatch.setattr(LogisticProblem, "_bend", lambda *rest: products.append(1) or bend(*rest))
    *parts, num_classes = ODD[name]
    probe, choice = sweep_probe(*parts, num_classes=num_classes)
    assert len(products) < 400
    assert probe.weight.isfinite().all()
    assert probe.bias.isfinite().all()
    assert probe.gradient_norm <= 1e-6
    assert choice.l2 in L2_GRID


def test_no_penalty_takes_more_steps_than_allowed(monkeypatch):
    """Steps that never settle: each log loss differs from the one before."""
    seen = []
    monkeypatch.setattr(Part, "judge", lambda part, l2: seen.append(l2) or 100.0 + 10 * (len(seen) % 2))
    features, labels, *val = SETS["few classes, N > D"]
    choose_penalty([Part(features, labels, tuple(val), num_classes=3)], [0.1])
    assert len(seen) == MOST_STEPS
