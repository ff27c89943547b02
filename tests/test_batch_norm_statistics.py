"""Batch-norm statistics taken anew, in one pass or one per depth; how fast they move, and when to warn."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from finetune.models.backbones import load_backbone
from finetune.models.batch_norm import exact_statistics, moving_norms, pooled_statistics, set_momentum
from finetune.models.classifier import Classifier
from finetune.models.heads import make_head
from finetune.planning.batch_norm import momentum_for, small_batch_warning

HOWS = pytest.mark.parametrize("renew", [pooled_statistics, exact_statistics])


def make_classifier(name="test_resnet", *, batch_norm="train", stages=None):
    torch.manual_seed(0)
    backbone = load_backbone(name, zoo={}, pretrained=False)
    classifier = Classifier(backbone, make_head(backbone.num_features, 3, init="small", dropout=0.5))
    classifier.freeze(len(backbone.stages) if stages is None else stages, batch_norm=batch_norm)
    return classifier.train()


@pytest.fixture
def images():
    """(26, 3, 32, 32) in three classes of very different brightness, class after class."""
    noise = torch.randn(26, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return noise + 3 * (torch.arange(26) * 3 // 26)[:, None, None, None]


def batched(images, size):
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(size)]


def norms_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def statistics(model):
    return {n: (m.running_mean.double().clone(), m.running_var.double().clone()) for n, m in norms_of(model).items()}


def inputs_of_norms(model, batches):
    """What each norm is given over all of `batches`, as rows of values by channel (n, C)."""
    seen = {name: [] for name in norms_of(model)}
    handles = [
        norm.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0].detach().double()))
        for name, norm in norms_of(model).items()
    ]
    with torch.no_grad():
        for part, *_ in batches:
            model(part)
    for handle in handles:
        handle.remove()
    return {n: torch.cat([x.transpose(0, 1).flatten(1).T for x in parts]) for n, parts in seen.items()}


def test_the_first_norm_gets_the_mean_and_the_unbiased_variance_of_all_values(images):
    """Whatever the order and the batch size; 26 by 8 leaves a last batch of two, by 5 one of a single image."""
    classifier = make_classifier()
    first = next(iter(norms_of(classifier)))
    values = inputs_of_norms(classifier.eval(), [(images,)])[first].numpy()
    for size, order in [(8, torch.arange(26)), (5, torch.arange(26)), (8, torch.randperm(26)), (26, torch.arange(26))]:
        pooled_statistics(classifier, batched(images[order], size), device="cpu")
        mean, variance = statistics(classifier)[first]
        np.testing.assert_allclose(mean, values.mean(0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(variance, values.var(0, ddof=1), rtol=1e-6)


def test_one_batch_of_everything_is_what_torch_would_store(images):
    ours, theirs = make_classifier(), make_classifier()
    pooled_statistics(ours, [(images,)], device="cpu")
    set_momentum(theirs, 1.0)
    with torch.no_grad():
        theirs(images)
    for name, (mean, variance) in statistics(theirs).items():
        torch.testing.assert_close(statistics(ours)[name][0], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics(ours)[name][1], variance, rtol=1e-4, atol=1e-6)


@pytest.mark.technique("T068")
def test_pooled_statistics_are_those_of_inputs_normalised_batch_by_batch(images):
    classifier = make_classifier()
    classifier.head.eval()
    seen = inputs_of_norms(classifier, batched(images, 8))
    pooled_statistics(classifier, batched(images, 8), device="cpu")
    for name, (mean, variance) in statistics(classifier).items():
        torch.testing.assert_close(mean, seen[name].mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance, seen[name].var(0), rtol=1e-4, atol=1e-6)


@pytest.mark.technique("T068")
def test_torch_loses_the_variance_between_classes_where_batches_are_sorted_by_class(images):
    """Law of total variance: its answer is the mean of the variances within batches, ours adds that of their means."""
    images = 0.5 * images[:8].repeat(3, 1, 1, 1) + torch.arange(3).repeat_interleave(8)[:, None, None, None]
    ours, theirs = make_norm(), make_norm()
    pooled_statistics(ours, batched(images, 8), device="cpu")
    update_bn(batched(images, 8), theirs)
    total = images.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(ours[0].running_var, total, rtol=1e-5, atol=0)
    lost = total - theirs[0].running_var
    torch.testing.assert_close(lost, torch.full((3,), 2 / 3), rtol=1e-3, atol=0)  # the variance of 0, 1, 2
    assert float((lost / total).min()) > 0.7  # nearly all of it
    shuffled = make_norm()
    update_bn(batched(images[torch.randperm(24, generator=torch.Generator().manual_seed(0))], 8), shuffled)
    assert not torch.allclose(shuffled[0].running_var, theirs[0].running_var, rtol=0.5)  # its answer hangs on the order


def make_norm():
    return nn.Sequential(nn.BatchNorm2d(3)).train()


def test_torch_gives_a_last_image_as_much_say_as_a_full_batch():
    images = torch.cat([torch.zeros(8, 3, 2, 2), torch.ones(1, 3, 2, 2)])
    ours, theirs = make_norm(), make_norm()
    pooled_statistics(ours, batched(images, 8), device="cpu")
    update_bn(batched(images, 8), theirs)
    assert ours[0].running_mean.tolist() == pytest.approx([1 / 9] * 3)
    assert theirs[0].running_mean.tolist() == pytest.approx([1 / 2] * 3)


@pytest.mark.technique("T068")
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_exact_statistics_are_those_of_what_each_norm_sees_in_use(images, name):
    classifier = make_classifier(name)
    exact_statistics(classifier, batched(images, 8), device="cpu")
    seen = inputs_of_norms(classifier.eval(), batched(images, 7))
    for norm, (mean, variance) in statistics(classifier).items():
        scale = float(seen[norm].std(0).max())
        torch.testing.assert_close(mean, seen[norm].mean(0), rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(variance, seen[norm].var(0), rtol=1e-4, atol=1e-6 * scale**2)


@pytest.mark.technique("T068")
def test_a_second_exact_pass_changes_nothing(images):
    classifier = make_classifier()
    exact_statistics(classifier, batched(images, 8), device="cpu")
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    exact_statistics(classifier, batched(images, 8), device="cpu")
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())


def test_norms_that_do_not_feed_one_another_share_a_pass(images):
    class Counted(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    classifier, batches = make_classifier(), Counted(batched(images, 8))
    exact_statistics(classifier, batches, device="cpu")
    # The deepest path has the stem's two and two per block; norms of short cuts run beside the first of a block.
    deepest = [name for name in norms_of(classifier) if "downsample" not in name]
    assert len(deepest) < len(norms_of(classifier))
    assert batches.passes == len(deepest) + 1  # one look at an example


def test_a_norm_that_runs_twice_gets_the_values_of_both_uses(images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.norm(x) + 5)

    model = Twice()
    pooled_statistics(model, [(images,)], device="cpu")
    both = torch.cat([images, nn.functional.batch_norm(images, None, None, training=True) + 5])
    torch.testing.assert_close(model.norm.running_mean, both.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    model.norm.reset_running_stats()
    exact_statistics(model, [(images,)], device="cpu")  # no other norm feeds it, but it feeds itself
    assert float(model.norm.running_mean.min()) > 2
    assert int(model.norm.num_batches_tracked) == 2


@pytest.mark.technique("T070")
def test_statistics_of_a_deep_norm_come_nearer_the_exact_ones_the_larger_the_batch(images):
    classifier = make_classifier()
    batches = images[torch.randperm(26, generator=torch.Generator().manual_seed(3))]
    exact_statistics(classifier, batched(batches, 26), device="cpu")
    exact = statistics(classifier)

    def error(size):
        pooled_statistics(classifier, batched(batches, size), device="cpu")
        now = statistics(classifier)
        return np.mean([float((now[n][1] / exact[n][1]).log().abs().mean()) for n in exact])

    errors = [error(size) for size in (2, 6, 26)]
    assert errors[0] > 1.5 * errors[1] > 0
    assert errors[1] > 10 * errors[2]  # one batch of all images is nearly exact


@HOWS
def test_norms_held_still_keep_their_statistics_and_feed_the_others_as_in_use(images, renew):
    classifier = make_classifier(stages=2)
    still = set(norms_of(classifier)) - set(moving_norms(classifier))
    assert all(".layer3." in name or ".layer4." in name for name in moving_norms(classifier))
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    renew(classifier, batched(images, 26), device="cpu")
    changed = {n for n, tensor in classifier.state_dict().items() if not torch.equal(before[n], tensor)}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{name}.{kind}" for name in moving_norms(classifier) for kind in kinds}
    assert len(still) > 5
    seen = inputs_of_norms(classifier.eval(), [(images,)])
    first = moving_norms(classifier)[0]
    torch.testing.assert_close(statistics(classifier)[first][0], seen[first].mean(0), rtol=1e-4, atol=1e-5)


@HOWS
def test_where_batch_norm_is_frozen_no_batch_is_read(renew):
    class Untouchable(list):
        def __iter__(self):
            raise AssertionError("a batch was read")

    classifier = make_classifier(batch_norm="frozen")
    assert moving_norms(classifier) == ()
    renew(classifier, Untouchable(), device="cpu")


@HOWS
def test_only_named_norms_are_renewed(images, renew):
    classifier = make_classifier(batch_norm="frozen")
    name = list(norms_of(classifier))[3]
    before = statistics(classifier)
    renew(classifier, batched(images, 8), device="cpu", names=[name])
    changed = [n for n, (mean, _) in statistics(classifier).items() if not torch.equal(mean, before[n][0])]
    assert changed == [name]
    with pytest.raises(ValueError, match="nonsense: no batch norm of that name"):
        renew(classifier, batched(images, 8), device="cpu", names=["nonsense"])


@HOWS
@pytest.mark.parametrize("mode", [True, False])
def test_modes_momenta_gradients_and_generators_are_left_alone(images, renew, mode):
    classifier = make_classifier(stages=3).train(mode)
    modes = [module.training for module in classifier.modules()]
    state = torch.get_rng_state()
    renew(classifier, batched(images, 5), device="cpu")
    assert [module.training for module in classifier.modules()] == modes
    assert all(norm.momentum == 0.1 and norm.track_running_stats for norm in norms_of(classifier).values())
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert torch.equal(torch.get_rng_state(), state)  # no dropout was drawn
    counts = {int(norms_of(classifier)[name].num_batches_tracked) for name in moving_norms(classifier)}
    assert counts == ({5} if renew is pooled_statistics else {6})  # a last image alone joined the batch before it


@HOWS
def test_a_pass_that_fails_leaves_statistics_and_modes_whole(images, renew):
    classifier = make_classifier()
    before = statistics(classifier)
    with pytest.raises(RuntimeError):
        renew(classifier, [(images[:8],), (torch.zeros(8, 7, 32, 32),)], device="cpu")
    for name, norm in norms_of(classifier).items():
        assert norm.training
        assert norm.track_running_stats
        assert torch.equal(norm.running_mean.double(), before[name][0])


def test_a_single_image_at_the_end_joins_the_batch_before_it():
    """Alone it has no batch statistics: torch refuses to normalise one value per channel."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    rows = torch.randn(9, 4)
    with pytest.raises(ValueError, match="more than 1 value"):
        model(rows[8:])
    for size in (8, 1, 2):
        pooled_statistics(model, [(part,) for part in rows.split(size)], device="cpu")
        torch.testing.assert_close(model[1].running_var, model[0](rows).detach().var(0))
    with pytest.raises(ValueError, match="a single value per channel"):
        exact_statistics(model, [(rows[:1],)], device="cpu")


def test_large_means_do_not_drown_a_small_variance():
    model, values = make_norm(), 1000 + 0.01 * torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pooled_statistics(model, batched(values, 16), device="cpu")
    expected = values.double().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(model[0].running_var.double(), expected, rtol=1e-4, atol=0)


def test_what_gives_no_statistics_is_refused(images):
    for renew in (pooled_statistics, exact_statistics):
        with pytest.raises(ValueError, match="batches holds no image"):
            renew(make_classifier(), [], device="cpu")
    with pytest.raises(ValueError, match="ends after one pass"):
        exact_statistics(make_classifier(), iter(batched(images, 8)), device="cpu")


@pytest.mark.technique("T067")
@HOWS
def test_with_stored_statistics_an_image_does_not_depend_on_its_batch(images, renew):
    classifier = make_classifier()
    renew(classifier, batched(images, 8), device="cpu")
    classifier.eval()
    with torch.no_grad():
        whole = classifier(images)
        for size in (1, 7):
            parts = torch.cat([classifier(part) for part in images.split(size)])
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    first = next(iter(norms_of(classifier)))
    mean, variance = statistics(classifier)[first]
    x = inputs_of_norms(classifier, [(images,)])[first]
    norm = norms_of(classifier)[first]
    rows = images.new_tensor(x.numpy()).reshape(26, 16, 16, -1).permute(0, 3, 1, 2)
    expected = (rows.double() - mean[:, None, None]) / (variance + norm.eps).sqrt()[:, None, None]
    torch.testing.assert_close(norm(rows).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.technique("T067")
@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.1), (20, 0.1), (100, 0.1), (200, 0.05), (1000, 0.01)])
def test_momentum_averages_over_a_tenth_of_a_long_epoch(steps, momentum):
    """After an epoch of at least 100 steps at most e^-10 of the old statistics is left."""
    assert momentum_for(steps) == pytest.approx(momentum, rel=1e-12)
    model = make_norm()
    set_momentum(model, momentum_for(steps))
    model[0].running_mean.fill_(1.0)
    zeros = torch.zeros(2, 3, 1, 1)
    for _ in range(steps):
        model(zeros)
    left = float(model[0].running_mean[0])
    assert left == pytest.approx((1 - momentum) ** steps, rel=1e-3)
    assert left <= math.exp(-10) or steps < 100


def test_momentum_is_set_where_statistics_move():
    classifier = make_classifier(stages=1)
    set_momentum(classifier, 0.03)
    moving = moving_norms(classifier)
    assert {name for name, norm in norms_of(classifier).items() if norm.momentum == 0.03} == set(moving)
    assert moving
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            set_momentum(classifier, wrong)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        momentum_for(0)


@pytest.mark.technique("T070")
def test_small_batches_are_warned_of():
    assert small_batch_warning(32, 1000) is None
    assert small_batch_warning(16, 16) is None
    words = small_batch_warning(8, 1000)
    assert "sees 8 images at a time" in words
    assert "train.batch_size 16 or more, or train.batch_norm frozen" in words
    words = small_batch_warning(64, 12)  # no batch can hold more than there is
    assert "sees 12 images" in words
    assert "batch_size" not in words
