"""Depths: what is left out was never seen, the exact shortcuts are exact, and a spoilt top is found out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_shapes
from PIL import Image

from finetune.compute import PLAIN
from finetune.config.backbone_names import read_zoo
from finetune.config.facts import ProfileFacts
from finetune.data.decoding import center_crop, decode
from finetune.data.sources import open_source, read_bytes
from finetune.features import layer_profile as depths_module
from finetune.features.extraction import look_at_all
from finetune.features.layer_profile import (
    FOLDS,
    assign_folds,
    cross_validate,
    measure_profile,
    neighbours_left_out,
    ridge_left_out,
)
from finetune.features.logistic import scale_of
from finetune.features.probing import TEMPERATURE, fit_probe
from finetune.models.backbones import load_backbone
from finetune.models.frozen import FrozenBackbone

SHAPES = pytest.mark.parametrize(("n", "d"), [(60, 9), (30, 80)], ids=["N > D", "N < D"])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(n, d, k, *, distance=1.0, seed=0):
    """Features (n, d) of k overlapping classes."""
    labels = torch.arange(n) % k
    return randn(n, d, seed=seed) + distance * randn(k, d, seed=99)[labels], labels


def test_each_class_is_spread_evenly_over_the_folds():
    labels = torch.tensor([0] * 23 + [1] * 7 + [2] * 41)
    fold = assign_folds(labels, seed=0)
    assert fold.unique().tolist() == list(range(FOLDS))
    for label in range(3):
        counts = torch.bincount(fold[labels == label], minlength=FOLDS)
        assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(fold, assign_folds(labels, seed=0))
    assert not torch.equal(fold, assign_folds(labels, seed=1))


@pytest.mark.technique("T013")
def test_labels_without_meaning_are_guessed_by_chance_although_all_could_be_learned_by_heart():
    features = randn(120, 300)
    hits = []
    for seed in range(4):
        labels = torch.randint(3, (120,), generator=torch.Generator().manual_seed(seed + 50))
        found = cross_validate(features, labels, num_classes=3, seed=seed, grid=(0.01, 1.0))
        hits.append(float((found.predictions == labels).double().mean()))
        learned = fit_probe(features, labels, num_classes=3, l2=found.l2).logits(features).argmax(1)
        assert torch.equal(learned, labels)
    assert 0.23 < np.mean(hits) < 0.43  # 1/3, and 480 trials


def test_every_prediction_is_that_of_a_probe_on_the_other_folds():
    features, labels = blobs(53, 20, 3)
    found = cross_validate(features, labels, num_classes=3, seed=4, grid=(0.03,))
    fold, losses = assign_folds(labels, seed=4), 0.0
    for part in range(FOLDS):
        out = fold == part
        logits = fit_probe(features[~out], labels[~out], num_classes=3, l2=0.03).logits(features[out])
        assert torch.equal(found.predictions[out], logits.argmax(1))
        losses += float(F.cross_entropy(logits, labels[out], reduction="sum"))
    assert found.log_loss == pytest.approx(losses / 53, rel=1e-3)
    assert found.l2 == 0.03
    assert found.at_edge is False  # one penalty has no edge


def test_the_labels_of_a_fold_do_not_touch_its_predictions(monkeypatch):
    features, labels = blobs(40, 100, 2, distance=0.3)
    fold = torch.arange(40) // 2 % 5
    monkeypatch.setattr(depths_module, "assign_folds", lambda *args, **kwargs: fold)
    before = cross_validate(features, labels, num_classes=2, seed=0, grid=(0.1,))
    changed = torch.where(fold == 0, 1 - labels, labels)
    after = cross_validate(features, changed, num_classes=2, seed=0, grid=(0.1,))
    assert torch.equal(before.predictions[fold == 0], after.predictions[fold == 0])
    assert not torch.equal(before.predictions, after.predictions)


def test_the_penalty_of_the_smallest_loss_is_chosen_and_an_edge_is_told():
    noisy, labels = blobs(60, 200, 2, distance=0.0)
    strong = cross_validate(noisy, labels, num_classes=2, seed=0, grid=(1e-5, 0.1, 10.0))
    clear, _ = blobs(60, 200, 2, distance=3.0)
    weak = cross_validate(clear, labels, num_classes=2, seed=0, grid=(1e-5, 0.1, 10.0))
    assert (strong.l2, strong.at_edge) == (10.0, True)
    assert weak.l2 < strong.l2
    assert weak.log_loss < 0.1 < strong.log_loss
    alone = {l2: cross_validate(noisy, labels, num_classes=2, seed=0, grid=(l2,)).log_loss for l2 in (1e-5, 0.1, 10.0)}
    assert alone[10.0] == min(alone.values()) == pytest.approx(strong.log_loss, rel=1e-2)


def test_the_same_seed_gives_the_same_folds_and_answer():
    features, labels = blobs(50, 30, 3, distance=0.4)
    one, same, other = (cross_validate(features, labels, num_classes=3, seed=seed, grid=(0.1,)) for seed in (3, 3, 4))
    assert (one.l2, one.log_loss) == (same.l2, same.log_loss)
    assert torch.equal(one.predictions, same.predictions)
    assert one.log_loss != other.log_loss


def test_few_images_make_few_folds_and_one_makes_none():
    features = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.1, 1.0]])
    found = cross_validate(features, torch.tensor([0, 1, 0]), num_classes=2, seed=0, grid=(0.01,))
    assert found.predictions[0] == found.predictions[2] == 0  # each by a probe on the two others
    with pytest.raises(ValueError, match="at least two images, got 1"):
        cross_validate(features[:1], torch.tensor([0]), num_classes=2, seed=0)


def ridge_by_brute_force(features, labels, num_classes, l2):
    """(N,) classes, one regression per image, each with its own unpenalised mean."""
    x = features.double() / scale_of(features.double())
    y = 2 * F.one_hot(labels, num_classes).double() - 1
    answers = []
    for out in range(len(x)):
        rest = torch.arange(len(x)) != out
        mean, center = x[rest].mean(0), y[rest].mean(0)
        known = x[rest] - mean
        gram = known.T @ known + l2 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(gram, known.T @ (y[rest] - center))
        answers.append(int(((x[out] - mean) @ weights + center).argmax()))
    return torch.tensor(answers)


@SHAPES
@pytest.mark.parametrize("l2", [1e-2, 1.0, 100.0])
def test_ridge_without_one_image_is_the_regression_on_all_others(n, d, l2):
    features, labels = blobs(n, d, 3, distance=0.5)
    features = features * torch.logspace(-1, 1, d) + 5  # neither centred nor of one scale
    found, chosen = ridge_left_out(features, labels, num_classes=3, grid=(l2,))
    expected = ridge_by_brute_force(features, labels, 3, l2)
    assert chosen == l2
    assert torch.equal(found, expected)
    assert not torch.equal(expected, labels)  # so it could differ


@SHAPES
def test_ridge_takes_the_penalty_that_makes_fewest_mistakes_and_of_equals_the_strongest(n, d):
    features, labels = blobs(n, d, 3, distance=0.5)
    grid = (1e-3, 1e-1, 1.0, 1e4)
    hits = {l2: int((ridge_by_brute_force(features, labels, 3, l2) == labels).sum()) for l2 in grid}
    found, chosen = ridge_left_out(features, labels, num_classes=3, grid=grid)
    assert chosen == max(grid, key=lambda l2: (hits[l2], l2))
    assert int((found == labels).sum()) == max(hits.values())


def test_ridge_on_labels_without_meaning_is_no_better_than_chance():
    features = randn(100, 400)
    labels = torch.randint(4, (100,), generator=torch.Generator().manual_seed(7))
    found, _ = ridge_left_out(features, labels, num_classes=4)
    assert float((found == labels).double().mean()) < 0.42  # 1/4, the best of eight penalties; 1.0 by heart


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("n", [40, 1100], ids=["one block", "two blocks"])
def test_neighbours_are_all_the_others(n, k):
    features, labels = blobs(n, 6, 3, distance=0.5)
    found = neighbours_left_out(features, labels, num_classes=3, k=k)
    near = F.normalize(features, dim=1).double() @ F.normalize(features, dim=1).double().T
    for out in [*range(20), *range(n - 20, n)]:
        others = [i for i in near[out].argsort(descending=True).tolist() if i != out][:k]
        votes = torch.zeros(3, dtype=torch.float64)
        for i in others:
            votes[labels[i]] += (near[out, i] / TEMPERATURE).exp()
        assert int(found[out]) == int(votes.argmax()), out


def test_an_image_is_no_neighbour_of_itself_but_its_copy_is():
    features = torch.eye(4)  # all equally far from each other
    labels = torch.tensor([0, 1, 1, 1])
    assert neighbours_left_out(features, labels, num_classes=2, k=3).tolist()[0] == 1
    copied = neighbours_left_out(features.repeat(2, 1), torch.tensor([0, 1, 1, 1] * 2), num_classes=2, k=1)
    assert copied.tolist() == [0, 1, 1, 1] * 2
    relabelled = neighbours_left_out(features.repeat(2, 1), torch.tensor([0] * 4 + [1] * 4), num_classes=2, k=1)
    assert relabelled.tolist() == [1] * 4 + [0] * 4
    for k in (0, 4):
        with pytest.raises(ValueError, match="k must lie in 1 to N - 1"):
            neighbours_left_out(features, labels, num_classes=2, k=k)


def planted(strengths, n=150, d=12, k=3, seed=0):
    """Features of each depth, in which the classes are so many deviations apart."""
    labels = torch.arange(n) % k
    centres = F.normalize(randn(k, d, seed=99), dim=1)
    depths = [randn(n, d + at, seed=seed + at) for at in range(len(strengths))]
    for depth, strength in zip(depths, strengths, strict=True):
        depth[:, :d] += strength * centres[labels]
    return depths, labels


def profile(depths, labels, val=None):
    stages = [f"stage{k}" for k in range(len(depths))]
    return measure_profile(depths, labels, stages, val=val, num_classes=3, seed=0)


@pytest.mark.technique("T013")
@pytest.mark.parametrize("by_val", [False, True], ids=["cross-validation", "val"])
def test_a_signal_planted_in_the_middle_is_found_there(by_val):
    strengths = (0.0, 1.0, 5.0, 1.0, 0.5)
    val = planted(strengths, seed=50) if by_val else None
    found = profile(*planted(strengths), val)
    assert (found.best, found.earlier, found.judged) == (2, 2, "val" if by_val else "cross-validation")
    assert [row.stage for row in found.depths] == [f"stage{k}" for k in range(5)]
    assert [row.width for row in found.depths] == [12, 13, 14, 15, 16]
    for probe in ("probe", "ridge", "neighbours"):
        values = [getattr(row, probe).value for row in found.depths]
        assert max(values) == values[2] > 0.85
        assert values[0] < 0.5
        assert all(row.low <= row.value <= row.high for row in (getattr(depth, probe) for depth in found.depths))
    assert found.lead == pytest.approx(found.depths[2].probe.value - found.depths[4].probe.value)
    assert found.lead > 5 * found.lead_error > 0
    assert {row.probe.n for row in found.depths} == {150}


def test_the_top_serves_where_it_is_as_good():
    depths, labels = planted((0.0, 5.0, 5.0))
    found = profile([depths[0], depths[2], depths[2]], labels)
    assert found.depths[1].probe == found.depths[2].probe
    assert (found.best, found.lead, found.lead_error, found.earlier) == (2, 0.0, 0.0, None)  # of equals the highest


@pytest.mark.technique("T013")
@pytest.mark.parametrize(("only_top", "earlier"), [(6, None), (0, 0)], ids=["by luck", "clearly"])
def test_a_lead_counts_only_above_one_standard_error(only_top, earlier):
    """Depths whose mistakes are planted: 8 images that the lower alone gets right, and some that the top alone does."""
    labels = torch.arange(150) % 3
    wrong = [torch.zeros(150, dtype=torch.bool), torch.zeros(150, dtype=torch.bool)]
    wrong[0][:only_top], wrong[1][20:28] = True, True
    known = [F.one_hot(labels, 3).float()] * 2
    asked = [F.one_hot((labels + mistaken.long()) % 3, 3).float() for mistaken in wrong]
    found = profile(known, labels, (asked, labels))
    lead = (8 - only_top) / 150
    assert (found.best, found.lead) == (0, pytest.approx(lead))
    assert found.lead_error == pytest.approx((((8 + only_top) / 150 - lead**2) / 150) ** 0.5)
    assert found.earlier == earlier


@pytest.mark.parametrize(
    ("best", "lead", "error", "earlier"),
    [(1, 0.10, 0.04, 1), (1, 0.04, 0.04, None), (1, 0.03, 0.04, None), (2, 0.0, 0.0, None), (0, 0.01, 0.0, 0)],
)
def test_earlier_asks_for_more_than_one_standard_error(best, lead, error, earlier):
    rows = profile(*planted((1.0, 1.0, 1.0), n=30)).depths
    facts = ProfileFacts(depths=rows, num_images=30, judged="val", best=best, lead=lead, lead_error=error)
    assert facts.earlier == earlier


def test_the_error_of_the_lead_is_that_of_paired_differences():
    depths, labels = planted((2.0, 3.0, 0.5))
    found = profile(depths, labels)
    best, top = (
        cross_validate(depths[k], labels, num_classes=3, seed=0, grid=(1e-3, 1e-2, 0.1, 1.0)).predictions == labels
        for k in (found.best, 2)
    )
    only_best, only_top = int((best & ~top).sum()), int((top & ~best).sum())
    assert found.lead == pytest.approx((only_best - only_top) / 150)
    variance = (only_best + only_top) / 150 - found.lead**2
    assert found.lead_error == pytest.approx((variance / 150) ** 0.5)


def shuffle_top(backbone):
    """Every tensor of the last stage with its numbers in another order.

    Fresh random weights would not do: a residual stage of those passes on what it gets, and its probe loses nothing.
    """
    generator, top = torch.Generator().manual_seed(1), len(backbone.stages) - 1
    state = backbone.state_dict()
    spoilt = {
        key: value.flatten()[torch.randperm(value.numel(), generator=generator)].view_as(value)
        for key, value in state.items()
        if backbone.stage_of[key] == top
    }
    assert len(spoilt) > 10
    backbone.load_state_dict(state | spoilt)


def profiles(crops, labels, num_classes):
    """Of the bundled backbone, and of the same with its last stage spoilt."""
    found = []
    for is_spoilt in (False, True):
        backbone = load_backbone("tiny_resnet18.cifar10", zoo=read_zoo()).eval()
        if is_spoilt:
            shuffle_top(backbone)
        frozen = FrozenBackbone(backbone, size_pixels=64, device="cpu")
        depths = look_at_all(frozen, crops, backbone.card.view(), PLAIN)
        stages = backbone.stages
        found.append(measure_profile(depths, labels, stages, val=None, num_classes=num_classes, seed=0))
    return found


@pytest.mark.technique("T013")
def test_on_drawn_shapes_a_spoilt_top_is_passed_over(tmp_path):
    """These are far from photographs: the lower half of the network is best even where nothing is spoilt."""
    files = sorted(draw_shapes(tmp_path / "shapes", per_class=60).glob("*/*.png"))
    assert len(files) == 180
    crops = np.stack([np.asarray(Image.open(path).resize((64, 64))) for path in files])
    labels = torch.arange(180) // 60
    plain, spoilt = profiles(crops, labels, 3)
    assert plain.depths[:-1] == spoilt.depths[:-1]
    assert plain.depths[-1] != spoilt.depths[-1]
    assert spoilt.earlier == spoilt.best < 4
    assert spoilt.lead > 2 * spoilt.lead_error


@pytest.mark.shared
@pytest.mark.technique("T013")
def test_on_images_like_those_of_pretraining_the_top_serves_until_it_is_spoilt(shared):
    items = [item for item in open_source(shared / "data" / "cifar10_20k").items if item.role == "test"][:400]
    assert len(items) == 400
    sizes = {"shorter_pixels": 64, "interpolation": "bilinear"}
    crops = np.stack([center_crop(decode(read_bytes(item), **sizes)[0], 64) for item in items])
    plain, spoilt = profiles(crops, torch.tensor([item.label for item in items]), 10)
    assert (plain.best, plain.earlier) == (4, None)
    assert (spoilt.best, spoilt.earlier) == (3, 3)  # the one before, of 0 to 4
    assert plain.depths[:-1] == spoilt.depths[:-1]
