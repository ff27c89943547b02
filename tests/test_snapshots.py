"""Members of one training: when they are saved, what they hold, and what they say together."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from finetune.config.recipe import ScheduleSpec
from finetune.errors import RunError
from finetune.inference.tta import average_views
from finetune.models.backbones import load_backbone
from finetune.models.classifier import Classifier
from finetune.models.heads import make_head
from finetune.planning.lr_schedules import cycle_ends, rate_factor
from finetune.training.snapshots import keep_newest, load_member, read_members, save_member

PEAK = 0.05


def make_classifier(name="test_resnet", *, batch_norm="train", stages=None, seed=0):
    torch.manual_seed(seed)
    backbone = load_backbone(name, zoo={}, pretrained=False)
    classifier = Classifier(backbone, make_head(backbone.num_features, 3, init="small"))
    classifier.freeze(len(backbone.stages) if stages is None else stages, batch_norm=batch_norm)
    return classifier.train()


def noise(num, seed=0):
    return torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def step(classifier, images, labels, lr):
    """One plain gradient step; the loss before it."""
    loss = F.cross_entropy(classifier(images), labels)
    loss.backward()
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.grad is not None:
                parameter.sub_(lr * parameter.grad)
                parameter.grad = None
    return float(loss.detach())


@torch.no_grad()
def logits_of(classifier, images):
    mode = classifier.training
    logits = classifier.eval()(images)
    classifier.train(mode)
    return logits


@pytest.mark.technique("T159")
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize(("stages", "batch_norm"), [(0, "frozen"), (2, "frozen"), (2, "train"), (None, "train")])
def test_a_member_says_what_it_said_when_it_was_saved_bit_for_bit(tmp_path, name, stages, batch_norm):
    size = 160 if name == "test_vit" else 32
    images, labels = F.interpolate(noise(4), size), torch.tensor([0, 1, 2, 0])
    classifier = make_classifier(name, stages=stages, batch_norm=batch_norm)
    start = {key: value.clone() for key, value in classifier.state_dict().items()}
    step(classifier, images, labels, PEAK)
    said, state = logits_of(classifier, images), {k: v.clone() for k, v in classifier.state_dict().items()}
    member = save_member(tmp_path, "cycle-1", classifier, {})
    step(classifier, images, labels, PEAK)
    assert not torch.equal(logits_of(classifier, images), said)

    other = make_classifier(name, stages=0, seed=9)  # as for judging: nothing is said of what had trained
    frozen = {n for n, p in classifier.named_parameters() if not p.requires_grad}
    other.load_state_dict({**other.state_dict(), **{n: start[n] for n in frozen}})
    load_member(other, member)
    assert torch.equal(logits_of(other, images), said)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


@pytest.mark.technique("T159")
def test_frozen_weights_are_not_written_again(tmp_path):
    classifier = make_classifier(stages=1)
    member = save_member(tmp_path, "last-3", classifier, {})
    held = set(load_file(member.path))
    buffers = {name for name, _ in classifier.named_buffers()}
    assert held == set(classifier.trainable_names()) | buffers
    assert member.num_bytes == member.path.stat().st_size
    whole = sum(tensor.nbytes for tensor in classifier.state_dict().values())
    assert member.num_bytes < 0.8 * whole


def test_a_head_that_does_not_train_is_kept_all_the_same(tmp_path):
    classifier = make_classifier(stages=1)
    classifier.head.requires_grad_(False)
    assert "head.linear.weight" in load_file(save_member(tmp_path, "cycle-1", classifier, {}).path)


@pytest.mark.technique("T160")
def test_each_member_has_the_batch_norm_statistics_of_its_own_moment(tmp_path):
    classifier = make_classifier()
    means = []
    for number in (1, 2):
        with torch.no_grad():
            classifier(noise(8, seed=number) + number)
        save_member(tmp_path, f"cycle-{number}", classifier, {})
        means.append(classifier.backbone.model.bn1.running_mean.clone())
    assert not torch.equal(*means)
    for member, mean in zip(read_members(tmp_path), means, strict=True):
        load_member(classifier, member)
        assert torch.equal(classifier.backbone.model.bn1.running_mean, mean)


def test_members_come_in_the_order_of_their_numbers_with_their_facts(tmp_path):
    classifier = make_classifier(stages=0)
    facts = {"epoch": 3, "val/loss": 0.1 + 0.2, "stage": "full"}
    for name in ("last-7", "cycle-10", "cycle-2", "cycle-1"):
        save_member(tmp_path / "members", name, classifier, {**facts, "name": name})
    save_member(tmp_path / "members", "cycle-2", classifier, facts)  # a run that was killed writes it again
    (tmp_path / "members" / ".cycle-3.safetensors.77.tmp").write_bytes(b"half a fi")
    (tmp_path / "members" / "weights.safetensors").write_bytes(b"of the stage")
    members = read_members(tmp_path / "members")
    assert [member.name for member in members] == ["cycle-1", "cycle-2", "cycle-10", "last-7"]
    assert members[1].facts == facts
    assert members[2].facts == {**facts, "name": "cycle-10"}
    assert read_members(tmp_path / "nowhere") == []


def test_a_write_that_fails_leaves_the_old_member_whole(tmp_path, monkeypatch):
    classifier = make_classifier(stages=0)
    save_member(tmp_path, "cycle-1", classifier, {"epoch": 1})

    def half_a_file(state, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("finetune.training.snapshots.save_file", half_a_file)
    for name in ("cycle-1", "cycle-2"):
        with pytest.raises(OSError, match="no space"):
            save_member(tmp_path, name, classifier, {"epoch": 2})
    assert [(member.name, member.facts) for member in read_members(tmp_path)] == [("cycle-1", {"epoch": 1})]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.technique("T159")
def test_only_the_last_epochs_are_kept(tmp_path):
    classifier = make_classifier(stages=0)
    save_member(tmp_path, "cycle-1", classifier, {})
    for epoch in range(8, 12):
        save_member(tmp_path, f"last-{epoch}", classifier, {"epoch": epoch})
        keep_newest(tmp_path, "last", 3)
    assert [member.name for member in read_members(tmp_path)] == ["cycle-1", "last-9", "last-10", "last-11"]
    keep_newest(tmp_path, "last", 0)
    assert [member.name for member in read_members(tmp_path)] == ["cycle-1"]


@pytest.mark.parametrize("name", ["cycle", "Cycle-1", "../cycle-1", "cycle-1.5", "weights", "cycle-"])
def test_a_member_without_a_number_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="a kind and a number"):
        save_member(tmp_path, name, make_classifier(stages=0), {})


def test_a_damaged_member_and_one_of_another_network_are_said(tmp_path):
    classifier = make_classifier(stages=0)
    member = save_member(tmp_path, "cycle-1", classifier, {})
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    for other in (make_classifier("test_efficientnet", stages=0), wider(classifier)):
        with pytest.raises(RunError, match=r"does not fit this network: \S+ is missing or of another shape"):
            load_member(other, member)
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())
    member.path.write_bytes(member.path.read_bytes()[:200])
    with pytest.raises(RunError, match="is no whole member"):
        read_members(tmp_path)
    with pytest.raises(RunError, match="is no whole member"):
        load_member(classifier, member)


def wider(classifier):
    return Classifier(classifier.backbone, make_head(classifier.backbone.num_features, 4))


def read_shapes(folder):
    """Images (N, 3, 32, 32), roughly standardised, and labels (N,) of a tree of class folders."""
    paths = [sorted(part.iterdir()) for part in sorted(folder.iterdir())]
    pixels = [np.asarray(Image.open(path).resize((32, 32)), dtype=np.float32) for path in itertools.chain(*paths)]
    labels = torch.tensor([label for label, part in enumerate(paths) for _ in part])
    return (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) - 90) / 70, labels


@pytest.mark.technique("T159")
@pytest.mark.technique("T160")
def test_three_cycles_give_three_members_that_differ_and_do_no_worse_together(shapes, tmp_path):
    """The log loss of the mean distribution is at most the mean of the log losses (Jensen)."""
    images, labels = read_shapes(shapes)
    held_out = torch.arange(len(images)) % 3 == 0
    order = torch.randperm(int((~held_out).sum()), generator=torch.Generator().manual_seed(0))
    batches = list(zip(images[~held_out][order].split(24), labels[~held_out][order].split(24), strict=True))
    spec, epochs = ScheduleSpec(name="cyclic", cycles=3, warmup_fraction=0.0), 9
    classifier, losses, said, ends = make_classifier(), [], [], cycle_ends(spec, epochs)
    rates = [PEAK * rate_factor(spec, n, epochs=epochs, steps_per_epoch=len(batches)) for n in range(epochs * 2)]
    for epoch in range(1, epochs + 1):
        first = (epoch - 1) * len(batches)
        losses += [step(classifier, *batch, rates[first + number]) for number, batch in enumerate(batches)]
        if epoch in ends:
            save_member(tmp_path, f"cycle-{ends.index(epoch) + 1}", classifier, {"epoch": epoch})
            said.append(logits_of(classifier, images[held_out]))
            now = first + len(batches) - 1
            assert rates[now] == min(rates[: now + 1])  # before it rises
            assert epoch == epochs or rates[now + 1] == PEAK
    assert losses[-1] < 0.8 * losses[0]

    members = read_members(tmp_path)
    assert [member.name for member in members] == ["cycle-1", "cycle-2", "cycle-3"]
    assert [member.facts["epoch"] for member in members] == [3, 6, 9]
    logits = []
    for member, expected in zip(members, said, strict=True):
        load_member(classifier, member)
        logits.append(logits_of(classifier, images[held_out]))
        assert torch.equal(logits[-1], expected)
    for one, other in itertools.combinations(logits, 2):
        assert float((one - other).abs().mean()) > 0.01
    mean = average_views(torch.stack(logits).softmax(-1))
    wanted = labels[held_out]
    alone = [float(F.cross_entropy(part, wanted)) for part in logits]
    assert float(F.nll_loss(mean.log(), wanted)) < sum(alone) / 3
