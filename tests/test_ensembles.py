"""Ensembles of real tiny runs: averages and mixtures that are judged and used like a run, and what is refused."""

import shutil

import pytest
import torch
from conftest import role_of
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import altered
from safetensors.torch import load_file, save_file
from torch import nn

import finetune as ft
from finetune.ensembles.build import make_ensemble, score_members, selection_note
from finetune.ensembles.members import find_candidates, selection_sentence
from finetune.ensembles.soups import (
    ALPHAS,
    Score,
    greedy_soup,
    interpolate,
    load_start,
    moved_norms,
    sweep,
    uniform_soup,
)
from finetune.ensembling import ensemble as combine
from finetune.errors import BackboneError, RunError
from finetune.features.survey import look
from finetune.inference.ensemble_model import Ensemble
from finetune.inference.loading import load_ensemble, load_final
from finetune.inference.predict import predict_probabilities
from finetune.metrics.calibration import log_probabilities
from finetune.metrics.selection import average
from finetune.models.batch_norm import pooled_statistics
from finetune.runs.folder import RunFolder
from finetune.training.setup import make_batches

SMALL = [
    "data.image_size=32",
    "train.batch_size=16",
    "train.epochs=2",
    "tracking.enabled=false",
    "data.split.refit=false",
    "train.checkpoint=last",
]
QUICK = settings(max_examples=15, deadline=None, database=None)


def quiet(text):
    """Nobody listens."""


@pytest.fixture(scope="module")
def divided(shapes, tmp_path_factory):
    """The drawn shapes, with the role of every image named, so that a seed changes training alone."""
    root = tmp_path_factory.mktemp("divided") / "shapes"
    for folder in sorted(shapes.iterdir()):
        for number, path in enumerate(sorted(folder.iterdir())):
            role = role_of(number)
            (root / role / folder.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / role / folder.name)
    return root


@pytest.fixture(scope="module")
def pool(divided, tmp_path_factory):
    """Two restarts that differ in the seed alone, their statistics moved, and a probe."""
    folder = tmp_path_factory.mktemp("pool")

    def start(*wishes):
        return ft.train(ft.load_recipe(None, [f"data.root={divided}", *SMALL, *wishes]), runs=folder, say=quiet)

    full = ["train.strategy=full", "train.batch_norm=train", "train.averaging.keep_last=2"]
    return start(*full, "seed=0"), start(*full, "seed=1"), start("train.strategy=probe")


@pytest.fixture(scope="module")
def seen(pool):
    return look(ft.load_recipe(pool[0].file("recipe.yaml")))


def ensemble(runs, tmp_path, how, **rest):
    return make_ensemble(runs, how=how, folder=tmp_path / f"{how}-of-{len(runs)}", say=quiet, **rest)


def said_by(classifier, run, seen, role="test"):
    return predict_probabilities(classifier, seen.dataset.store, seen.dataset.indices(role), run.plan, "center")


class Says(nn.Module):
    """Logits that do not depend on the images."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits


def talkers(seed, members=3, images=8, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return [Says(5 * torch.randn(images, classes, generator=generator)) for _ in range(members)]


@pytest.mark.parametrize("kind", ["probability", "logit"])
@QUICK
@given(seed=st.integers(0, 2**31))
def test_the_softmax_of_an_ensembles_logits_is_the_average_of_its_members(kind, seed):
    members, weights = talkers(seed), [3.0, 1.0, 2.0]
    logits = Ensemble(members, weights, kind)(torch.empty(0))
    wanted = average(torch.stack([member.logits.softmax(1) for member in members]), kind, weights)
    torch.testing.assert_close(logits.softmax(1), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["probability", "logit"])
def test_an_ensemble_of_one_and_of_identical_members_gives_that_ones_logits_bit_for_bit(kind):
    one = talkers(0)[0]
    for number in (1, 2, 3, 7):
        assert torch.equal(Ensemble([one] * number, average=kind)(torch.empty(0)), one.logits)


def test_members_that_are_nearly_certain_of_different_classes_overflow_nowhere():
    sure = Says(torch.tensor([[2000.0, 0.0]])), Says(torch.tensor([[0.0, 2000.0]]))
    said = Ensemble(sure)(torch.empty(0)).softmax(1)
    torch.testing.assert_close(said, torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize(
    ("members", "weights", "kind"), [(0, None, "logit"), (3, [1, 1], "logit"), (3, [1, 0, 1], "logit"), (3, None, "x")]
)
def test_an_impossible_ensemble_is_refused(members, weights, kind):
    with pytest.raises(ValueError, match=r"positive weights|average must be one of"):
        Ensemble(talkers(0)[:members], weights, kind)


@pytest.mark.technique("T156")
def test_restarts_are_averaged_into_a_run_whose_order_does_not_matter(pool, seen, tmp_path):
    first, second, _ = pool
    assert first.plan.seed != second.plan.seed
    both = torch.stack([said_by(load_final(run), run, seen) for run in (first, second)])
    assert not torch.equal(both[0], both[1])
    said = []
    for runs in ([first, second], [second, first]):
        made = make_ensemble(runs, how="average", folder=tmp_path / str(len(said)), say=quiet)
        said.append(said_by(load_ensemble(made), made, seen))
    torch.testing.assert_close(said[0], average(both), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(said[0], said[1], rtol=1e-5, atol=1e-7)
    found = made.membership
    assert [(one.run, one.member, one.weight) for one in found.members] == [
        (str(second.path), "final", 0.5),
        (str(first.path), "final", 0.5),
    ]
    assert selection_note(made) is None  # the last epoch was kept, and all members were taken
    assert made.plan.name.endswith("-average")


def test_an_average_needs_nothing_from_where_its_members_came(pool, seen, tmp_path):
    copy = altered(pool[0], tmp_path)
    made = ensemble([copy], tmp_path, "average")
    before = said_by(load_ensemble(made), made, seen)
    shutil.rmtree(copy.path)
    shutil.move(made.path, tmp_path / "elsewhere")
    moved = RunFolder.open(tmp_path / "elsewhere")
    assert torch.equal(said_by(load_ensemble(moved), moved, seen), before)


def test_an_ensemble_of_one_run_predicts_what_the_run_does_bit_for_bit(pool, seen, tmp_path):
    made = ensemble(pool[:1], tmp_path, "average")
    assert torch.equal(said_by(load_ensemble(made), made, seen), said_by(load_final(pool[0]), pool[0], seen))


def test_equal_weights_count_once_however_often_they_are_given(pool, seen, tmp_path):
    said = []
    run = pool[0]
    made = make_ensemble([run, run], how="average", folder=tmp_path / "one", members="all", say=said.append)
    assert [one.member for one in made.membership.members] == ["final", "last-1"]
    assert len(said) == 4  # `last-2` is the final state, and the second run is the first again
    assert "last-2 has the weights of" in said[0]
    assert made.file("log.txt").read_text().splitlines() == said


@pytest.mark.technique("T158")
def test_trainings_of_different_strategies_are_averaged_and_their_table_shows_the_gain(pool, seen, tmp_path):
    made = ensemble([pool[2], pool[0]], tmp_path, "average")
    assert made.plan.stages  # the folder is that of the trained member
    tables = score_members(made, seen.dataset)
    assert tables.val is not None
    both = torch.stack([said_by(load_final(run), run, seen) for run in (pool[2], pool[0])])
    whole = tables.test[-1]
    labels = seen.dataset.labels("test")
    assert whole.accuracy == pytest.approx(float((average(both).argmax(1) == labels).float().mean()))
    assert whole.log_loss <= tables.test[2].log_loss
    assert [row.cost for row in tables.test] == [1, 1, 1, 2]


@pytest.mark.technique("T158")
def test_val_chooses_members_greedily_and_the_run_says_so(pool, seen, tmp_path):
    made = ensemble(pool[:2], tmp_path, "greedy", dataset=seen.dataset)
    found = made.membership
    assert (found.selected_on, found.num_candidates) == ("val", 2)
    losses = found.val_log_losses
    assert list(losses) == sorted(losses, reverse=True)
    assert sum(one.weight for one in found.members) == pytest.approx(1)
    said = log_probabilities(said_by(load_ensemble(made), made, seen, "val"))
    assert float(nn.functional.nll_loss(said, seen.dataset.labels("val"))) == pytest.approx(losses[-1], rel=1e-5)
    assert selection_note(made).startswith("val was used to select members, so its score is not reported")


def test_how_often_a_member_was_taken_is_its_weight(pool, seen, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.ensembles.build.greedy_selection", lambda *rest, **options: (1, 0, 1))
    made = ensemble(pool[:2], tmp_path, "greedy", dataset=seen.dataset)
    assert [one.weight for one in made.membership.members] == pytest.approx([1 / 3, 2 / 3])
    both = torch.stack([said_by(load_final(run), run, seen) for run in pool[:2]])
    wanted = average(both, "probability", [1, 2])
    torch.testing.assert_close(said_by(load_ensemble(made), made, seen), wanted, rtol=1e-5, atol=1e-7)


def test_an_early_stop_on_val_is_said_too(pool, tmp_path):
    stopped = altered(pool[0], tmp_path, train=pool[0].plan.train.model_copy(update={"checkpoint": "best"}))
    assert "to stop them" in selection_note(ensemble([stopped], tmp_path, "average"))
    offered = find_candidates([stopped], "final", quiet)
    assert "to select members and to stop them" in selection_sentence(offered, is_selected=True)
    assert selection_note(stopped) is None


@pytest.mark.technique("T162")
def test_a_soup_costs_one_network_has_its_own_statistics_and_is_a_run_like_any_other(pool, seen, tmp_path):
    first, second, _ = pool
    soup = ensemble([first, second], tmp_path, "soup", dataset=seen.dataset)
    ours, theirs, mixed = (load_file(run.final_weights()) for run in (first, second, soup))
    assert {name: tensor.shape for name, tensor in mixed.items()} == {name: t.shape for name, t in ours.items()}
    weight = "head.linear.weight"
    torch.testing.assert_close(mixed[weight], (ours[weight] + theirs[weight]) / 2)
    names = moved_norms([ours, theirs])
    assert names
    classifier = load_final(soup)
    pooled_statistics(classifier, make_batches(first.plan, seen.dataset)[0], device="cpu", names=names)
    for name in names:
        again = classifier.get_submodule(name)
        torch.testing.assert_close(again.running_mean, mixed[f"{name}.running_mean"], rtol=1e-4, atol=1e-5)
        mean = (ours[f"{name}.running_mean"] + theirs[f"{name}.running_mean"]) / 2
        assert not torch.equal(mean, mixed[f"{name}.running_mean"])
    before = soup.final_weights().read_bytes()
    ft.resume(soup.path, say=quiet)  # finds nothing to train
    assert soup.final_weights().read_bytes() == before
    assert soup.read_json("scores.json")["test"]["n"] == len(seen.dataset.indices("test"))
    assert soup.file("report.html").exists()


def test_a_soup_of_one_set_of_weights_is_those_weights_bit_for_bit(pool, tmp_path):
    soup = ensemble([pool[0]] * 2, tmp_path, "soup")
    ours, mixed = (load_file(run.final_weights()) for run in (pool[0], soup))
    assert all(torch.equal(ours[name], mixed[name]) for name in ours)


def test_a_greedy_soup_is_at_least_as_good_on_val_as_its_best_member(pool, seen, tmp_path):
    soup = ensemble(pool[:2], tmp_path, "greedy_soup", dataset=seen.dataset)
    found = soup.membership
    right = said_by(load_final(soup), soup, seen, "val").argmax(1) == seen.dataset.labels("val")
    assert len(found.val_top1) == 2
    assert float(right.double().mean()) >= max(found.val_top1) - 1e-9
    assert sum(one.weight for one in found.members) == pytest.approx(1)


@pytest.fixture(scope="module")
def wise(pool, seen, tmp_path_factory):
    """The mixture of a training's start and end that val likes best."""
    return ensemble(pool[:1], tmp_path_factory.mktemp("wise"), "wise", dataset=seen.dataset)


def test_at_its_ends_wise_gives_the_logits_of_the_start_of_the_training_and_of_the_run(pool, tmp_path):
    run = pool[0]
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = make_ensemble([run], how="wise", alpha=0.0, folder=tmp_path / "start", say=quiet)
    assert selection_note(made) is None
    start, end, mixed = load_start(run).to(memory_format=torch.channels_last), load_final(run), load_final(made)
    with torch.inference_mode():
        assert torch.equal(mixed(images), start(images))
        mixed.load_state_dict(interpolate(start.state_dict(), end.state_dict(), 1.0))
        assert torch.equal(mixed(images), end(images))
        assert not torch.equal(start(images), end(images))


def test_wise_sweeps_from_what_training_began_with_and_takes_what_val_likes_best(pool, wise):
    run = pool[0]
    rows = [line.split(",") for line in run.file("curves.csv").read_text().splitlines()[1:]]
    start = {name: float(value) for _, epoch, _, name, value in rows if epoch == "-1"}
    found = wise.membership
    assert [row.alpha for row in found.sweep] == list(ALPHAS)
    assert found.sweep[0].top1 == pytest.approx(start["val/top1"])
    assert found.sweep[0].log_loss == pytest.approx(start["val/tempered_loss"], rel=1e-4)
    assert found.alpha == min(found.sweep, key=lambda row: row.log_loss).alpha
    assert "to select members" in selection_note(wise)


def test_members_that_do_not_fit_together_are_refused(pool, tmp_path):
    first, second, probe = pool
    plan = first.plan
    changes = {
        "another classes .* number 1 is 'stripes' and not 'disc'": {"classes": plan.classes[::-1]},
        "another split of the images .* test image of one may have taught the other": {"split_digest": "0" * 32},
    }
    for number, (message, change) in enumerate(changes.items()):
        other = altered(second, tmp_path / str(number), **change)
        with pytest.raises(RunError, match=message):
            ensemble([first, other], tmp_path, "average")
    other = altered(second, tmp_path / "larger", data=plan.data.model_copy(update={"image_size": 48}))
    for how in ("soup", "greedy_soup"):
        with pytest.raises(RunError, match=r"another view .* Average the predictions instead \(how=average\)"):
            ensemble([first, other], tmp_path, how)
    with pytest.raises(RunError, match="is a probe, and no trained run"):
        ensemble([probe], tmp_path, "average")
    with pytest.raises(RunError, match=r"kept no snapshots\. Train with train\.averaging\.snapshots=3"):
        ensemble([first], tmp_path, "average", members="snapshots")
    with pytest.raises(RunError, match="no runs"):
        ensemble([], tmp_path, "average")
    with pytest.raises(RunError, match=r"wise mixes one network .* given 2"):
        ensemble([first, second], tmp_path, "wise")
    with pytest.raises(RunError, match="trained nothing"):
        load_start(probe)
    assert not list(tmp_path.glob("*-of-*"))  # a refusal leaves nothing behind


def test_weights_of_trainings_that_began_apart_are_not_mixed(pool, tmp_path):
    first, second, _ = pool
    plan = second.plan
    changes = {
        "backbone weights 0000": {"weights_digest": "0" * 64},
        "head linear, begun from zero": {"head": plan.head.model_copy(update={"init": "zero"})},
        "fresh stages 1": {"stages": tuple(one.model_copy(update={"fresh_stages": 1}) for one in plan.stages)},
    }
    for number, (message, change) in enumerate(changes.items()):
        other = altered(second, tmp_path / str(number), **change)
        with pytest.raises(RunError, match=rf"began with {message}.*average the predictions"):
            ensemble([first, other], tmp_path, "soup")
    drawn = {"head": plan.head.model_copy(update={"init": "small"})}
    others = [altered(run, tmp_path / run.path.name, **drawn) for run in (first, second)]
    with pytest.raises(RunError, match=r"began with a draw by seed 1, .* with 0"):
        ensemble(others, tmp_path, "soup")
    with pytest.raises(RunError, match="no working network at its start"):
        ensemble(others[:1], tmp_path, "wise")


def test_averages_of_averages_unfinished_runs_and_taken_names_are_refused(pool, tmp_path):
    made = ensemble(pool[:1], tmp_path, "average")
    with pytest.raises(RunError, match="is an average itself"):
        ensemble([made], tmp_path / "again", "average")
    with pytest.raises(RunError, match="never overwritten"):
        ensemble(pool[:1], tmp_path, "average")
    unfinished = altered(pool[0], tmp_path)
    unfinished.final_weights().unlink()
    with pytest.raises(RunError, match="not trained to its end"):
        ensemble([unfinished], tmp_path, "soup")
    unfinished.final_weights().write_bytes(b"half a file")
    with pytest.raises(RunError, match=r"weights\.safetensors cannot be read"):
        ensemble([unfinished], tmp_path, "soup")


@pytest.mark.parametrize(
    "wishes", [{"how": "both"}, {"how": "soup", "average": "logit"}, {"how": "soup", "alpha": 0.5}], ids=str
)
def test_arguments_that_contradict_each_other_are_refused(pool, tmp_path, wishes):
    with pytest.raises(ValueError, match=r"must be one of|goes with how 'wise'"):
        make_ensemble(pool[:1], folder=tmp_path / "x", say=quiet, **wishes)


def states(seed, number=3):
    """Weights of as many networks of one architecture, with batch-norm statistics of their own."""
    torch.manual_seed(seed)
    nets = [nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)) for _ in range(number)]
    for count, net in enumerate(nets):
        net[1].running_mean.normal_()
        net[1].num_batches_tracked.fill_(count)
    return [net.state_dict() for net in nets]


def test_a_mixture_renews_statistics_that_moved_and_leaves_others_alone():
    members, asked = states(0), []
    uniform_soup(members, lambda state, names: asked.append(names) or state)
    assert asked == [("1",)]
    with pytest.raises(ValueError, match="batch norm moved"):
        uniform_soup(members)
    for state in members:
        state["1.running_mean"] = torch.ones(5)
    mixed = uniform_soup(members)
    assert torch.equal(mixed["1.running_mean"], torch.ones(5))
    torch.testing.assert_close(mixed["0.weight"], torch.stack([state["0.weight"] for state in members]).mean(0))


def test_integer_buffers_are_copied_and_not_mixed():
    start, end = states(0, 2)
    for alpha, count in ((0.2, 0), (0.8, 1), (1.0, 1)):
        mixed = interpolate(start, end, alpha, lambda state, names: state)
        assert mixed["1.num_batches_tracked"].dtype == torch.int64
        assert mixed["1.num_batches_tracked"] == count


@QUICK
@given(seed=st.integers(0, 2**31), percent=st.integers(0, 100))
def test_interpolation_is_exact_at_its_ends_and_linear_between(seed, percent):
    (start, end), alpha = states(seed, 2), percent / 100
    assert all(torch.equal(interpolate(start, end, 0)[name], start[name]) for name in start)
    assert all(torch.equal(interpolate(start, end, 1)[name], end[name]) for name in start)
    mixed = interpolate(start, end, alpha, lambda state, names: state)
    torch.testing.assert_close(mixed["0.weight"], start["0.weight"].lerp(end["0.weight"], alpha))
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
        interpolate(start, end, 1.5)


@QUICK
@given(seed=st.integers(0, 2**31))
def test_a_greedy_soup_never_falls_below_the_best_and_takes_the_best_first(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(40, 4, generator=generator), torch.randint(3, (40,), generator=generator)
    members = [{"weight": torch.randn(3, 4, generator=generator)} for _ in range(5)]

    def judge(state):
        logits = inputs @ state["weight"].T
        return Score(int((logits.argmax(1) == labels).sum()) / 40, float(nn.functional.cross_entropy(logits, labels)))

    soup = greedy_soup(members, judge=judge)
    best = max(score.top1 for score in soup.scores)
    assert soup.scores[soup.members[0]].top1 == best
    assert judge(soup.state).top1 == soup.score.top1 >= best
    found = sweep(members[0], members[1], judge=judge)
    assert judge(found.state).log_loss == min(score.log_loss for score in found.scores)


def test_other_architectures_are_refused_by_the_tensor_that_differs():
    first, second = {"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2), "b": torch.ones(4)}
    with pytest.raises(RunError, match=r"not of one architecture: b is \(3,\) in one and \(4,\) in the other"):
        uniform_soup([first, second])
    with pytest.raises(ValueError, match="at least one"):
        uniform_soup([])


def test_a_damaged_member_of_an_average_is_not_passed_over(pool, tmp_path):
    made = ensemble(pool[:2], tmp_path, "average")
    member = RunFolder.open(made.file("members/2"))
    save_file({"nothing": torch.ones(1)}, member.final_weights())
    with pytest.raises(BackboneError, match="Missing key"):
        load_ensemble(made)
    shutil.rmtree(member.path)
    with pytest.raises(RunError, match="is no folder"):
        load_ensemble(made)


@pytest.mark.slow
def test_restarts_of_other_seeds_share_their_images_where_the_split_has_a_seed_of_its_own(shapes, tmp_path):
    wishes = [f"data.root={shapes}", "data.image_size=32", "train.batch_size=16", "train.epochs=1"]
    wishes += ["train.strategy=full", "tracking.enabled=false", "data.split.refit=false", "data.split.seed=5"]
    made = [
        ft.train(ft.load_recipe(None, [*wishes, f"seed={seed}"]), runs=tmp_path / "runs", say=lambda text: None)
        for seed in (0, 1)
    ]
    assert made[0].plan.split_digest == made[1].plan.split_digest
    joined = combine([run.path for run in made], runs=tmp_path / "runs", say=lambda text: None)
    table = joined.read_json("scores.json")["members"]["test"]
    assert [row["num_members"] for row in table if row["name"].startswith("ensemble")] == [2]
    with pytest.raises(RunError, match="--how is"):
        combine([joined.path], how="vote", runs=tmp_path / "runs", say=lambda text: None)


@pytest.mark.slow
def test_the_page_of_an_ensemble_tells_its_members_sets_and_what_val_chose(shapes, tmp_path):
    wishes = [f"data.root={shapes}", "data.image_size=32", "train.batch_size=16", "train.epochs=2"]
    wishes += ["train.strategy=full", "tracking.enabled=false", "data.split.refit=false", "train.averaging.snapshots=2"]
    run = ft.train(ft.load_recipe(None, wishes), runs=tmp_path / "runs", say=lambda text: None)
    joined = combine([run.path], members="snapshots", runs=tmp_path / "runs", say=lambda text: None)
    page = joined.file("report.html").read_text()
    assert "ensemble of 2" in page and "mean of members" in page
    assert "Prediction sets promised" in page and "Val is no estimate" in page
