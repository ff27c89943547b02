"""Mixed batches: shares as drawn, targets as the pixels say, and nothing moved that others draw from."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from finetune.training.losses import make_loss
from finetune.training.mixup import Mixing


def numbered(count=64, height=6, width=7):
    """Images that hold nothing but their own number, and are each of a class of their own."""
    labels = torch.arange(count)
    return labels.float().view(-1, 1, 1, 1).expand(count, 3, height, width).contiguous(), labels


def partners(images, targets):
    """For each image, the share of itself and the number of the other, read from the targets."""
    own = targets.diagonal()
    others = targets - torch.diag(own)
    return own, torch.where(own < 1, others.argmax(1), torch.arange(len(targets)))


@pytest.mark.technique("T135")
@pytest.mark.parametrize("alpha", [0.001, 0.2, 1.0, 5.0])
def test_shares_of_a_blend_are_beta_distributed(alpha):
    images, labels = numbered(500, 1, 1)
    own = torch.cat([partners(*Mixing(alpha, 0, 500)(images, labels, seed))[0] for seed in range(8)]).double()
    own = own[own < 1] if alpha > 0.01 else own  # an image that meets itself shows no share
    assert float(own.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(own.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_torch_draws_one_half_where_a_small_alpha_means_all_or_nothing():
    torch.manual_seed(0)
    shares = torch.distributions.Beta(torch.tensor(1e-3), torch.tensor(1e-3)).sample((4000,))
    assert float((shares == 0.5).double().mean()) > 0.1
    ours = np.random.Generator(np.random.PCG64(0)).beta(1e-3, 1e-3, 4000)
    assert ((ours > 0.01) & (ours < 0.99)).mean() < 0.02


@pytest.mark.technique("T135")
def test_a_blend_holds_the_share_that_its_target_says():
    images, labels = numbered()
    mixed, targets = Mixing(1.0, 0, 64)(images, labels, 3)
    torch.testing.assert_close(mixed, (targets @ labels.float()).view(-1, 1, 1, 1).expand_as(mixed))
    assert float((targets > 0).sum(1).float().mean()) > 1.9


@pytest.mark.technique("T135")
def test_the_soft_loss_of_a_blend_is_that_of_its_two_labels():
    images, labels = numbered()
    _, targets = Mixing(0.4, 0, 64)(images, labels, 0)
    own, other = partners(images, targets)
    logits = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    terms = own * F.cross_entropy(logits, labels, reduction="none")
    terms += (1 - own) * F.cross_entropy(logits, other, reduction="none")
    torch.testing.assert_close(make_loss("none", [1] * 64)(logits, targets), terms, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixing", [Mixing(5.0, 0, 64), Mixing(0, 5.0, 64)], ids=["mixup", "cutmix"])
def test_partners_are_a_permutation_and_shares_are_drawn_for_each(mixing):
    own, other = partners(*mixing(*numbered(height=32, width=32), 1))
    moved = own < 1
    assert len(set(other[moved].tolist())) == int(moved.sum()) > 50
    assert len(set(own[moved].tolist())) > 20


@pytest.mark.parametrize(("height", "width"), [(6, 7), (32, 32), (1, 9)])
def test_a_target_counts_the_pixels_that_were_pasted(height, width):
    images, labels = numbered(64, height, width)
    for seed in range(6):
        mixed, targets = Mixing(0, 1.0, 64)(images, labels, seed)
        kept = (mixed == images).all(1).double().mean((1, 2))
        torch.testing.assert_close(targets.diagonal().double(), kept, rtol=0, atol=1e-7)
        torch.testing.assert_close(targets.sum(1), torch.ones(64))


def test_what_is_pasted_is_one_rectangle_of_the_partner_in_its_place():
    images, labels = torch.rand(64, 3, 9, 11, generator=torch.Generator().manual_seed(0)), torch.arange(64)
    mixed, targets = Mixing(0, 1.0, 64)(images, labels, 0)
    _, other = partners(images, targets)
    changed = (mixed != images).any(1)
    for row in torch.nonzero(changed.any(2).any(1))[:, 0].tolist():
        rows, columns = changed[row].any(1), changed[row].any(0)
        assert torch.equal(changed[row], rows[:, None] & columns[None, :])
        assert all(int((line.int().diff() == 1).sum()) + int(line[0]) == 1 for line in (rows, columns))
        assert torch.equal(mixed[row][:, changed[row]], images[other[row]][:, changed[row]])


def test_boxes_reach_over_every_border_and_have_the_drawn_area_where_they_do_not():
    images, labels = numbered(400, 32, 32)
    mixed, _ = Mixing(0, 1.0, 400)(images, labels, 0)
    changed = (mixed != images).any(1)
    for border in (changed[:, 0], changed[:, -1], changed[:, :, 0], changed[:, :, -1]):
        assert border.any(1).double().mean() > 0.2
    inner = changed[~(changed[:, 0] | changed[:, -1] | changed[:, :, 0] | changed[:, :, -1]).any(1)]
    sides = torch.stack([inner.any(2).sum(1), inner.any(1).sum(1)])
    assert torch.equal(sides[0], sides[1]) and len(sides[0].unique()) > 8  # square images have square boxes


def test_each_batch_is_blended_or_pasted_as_a_whole_and_both_happen():
    images, labels = numbered(16, 8, 8)
    is_pasted = []
    for seed in range(200):
        mixed, _ = Mixing(2.0, 2.0, 16)(images, labels, seed)
        is_pasted.append(bool((mixed == mixed.round()).all()))
    assert 70 < sum(is_pasted) < 130


@pytest.mark.parametrize("mixing", [Mixing(1.0, 0, 8), Mixing(0, 1.0, 8), Mixing(1.0, 1.0, 8)])
def test_the_seed_alone_decides_and_no_generator_moves(mixing):
    images, labels = torch.rand(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    kept = images.clone()
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = mixing(images, labels, 11)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, mixing(images, labels, 11), strict=True))
    assert not torch.equal(first[0], mixing(images, labels, 12)[0])
    assert torch.equal(images, kept)


@pytest.mark.parametrize("transform", [v2.MixUp(num_classes=8), v2.CutMix(num_classes=8)])
def test_the_transforms_of_torchvision_move_the_generator_of_dropout(transform):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    transform(torch.rand(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8))
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mixing", [Mixing(0, 0, 3), Mixing(1.0, 0, 3), Mixing(0, 1.0, 3)])
def test_mixing_nothing_or_a_single_image_gives_it_back_with_its_label(mixing):
    images = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mixed, targets = mixing(images, torch.tensor([2]), 0)
    torch.testing.assert_close(mixed, images)
    assert torch.equal(targets, torch.tensor([[0.0, 0.0, 1.0]])) and targets.dtype == torch.float32


@pytest.mark.parametrize("mixing", [Mixing(1.0, 0, 8), Mixing(0, 1.0, 8)])
def test_mixed_images_keep_their_type_and_memory_layout(mixing):
    images = torch.rand(8, 3, 5, 5).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    mixed, targets = mixing(images, torch.arange(8), 0)
    assert mixed.dtype == images.dtype and targets.dtype == torch.float32
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_impossible_wishes_are_our_bug():
    with pytest.raises(ValueError, match="must not be negative, got -1 and 0"):
        Mixing(-1, 0, 3)
    with pytest.raises(ValueError, match=r"must be floating to be mixed, got torch\.uint8"):
        Mixing(1, 0, 3)(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.arange(2), 0)
    with pytest.raises(ValueError, match="2 images but 1 labels"):
        Mixing(1, 0, 3)(torch.zeros(2, 3, 4, 4), torch.arange(1), 0)
