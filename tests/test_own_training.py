"""A loss, callbacks and loggers handed in: they serve every stage, survive a crash, and leave alone what plans say."""

import csv
import functools
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning import callbacks as known
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

import finetune as ft
from finetune.config.own import describe
from finetune.errors import RecipeError, RunError
from finetune.training.callbacks import Listeners, Writer, checked
from finetune.training.losses import make_loss
from finetune.training.own import OwnTraining, loss_by_image

SMALL = ["data.image_size=32", "tracking.enabled=false", "train.strategy=partial", "train.averaging.wise_ft=1"]
PLAIN = [*SMALL, "data.split.refit=false"]


def quiet(text):
    """Nobody listens."""


def focal(logits, targets, gamma=2.0):
    """Focal loss of each image."""
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (1 - (-losses).exp()) ** gamma * losses


class Counter(pl.Callback):
    """Epochs that it saw, of every stage."""

    def __init__(self):
        self.epochs, self.metrics = [], {}

    def on_train_epoch_end(self, trainer, module):
        self.epochs.append(trainer.current_epoch)
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}


class Remembering(Counter):
    """It has a state, and stops once it has seen two epochs in all."""

    seen = 0

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]

    def on_train_epoch_end(self, trainer, module):
        super().on_train_epoch_end(trainer, module)
        self.seen += 1
        trainer.should_stop |= self.seen == 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("own") / "runs"


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def curve(run, name):
    return [row for row in read(run.file("curves.csv")) if row["name"] == name]


def begun_anew(run):
    """As if it had been killed before its first epoch was over."""
    for path in (
        run.final_weights(),
        run.stage_folder(0) / "last.ckpt",
        run.file("scores.json"),
        run.file("card.yaml"),
    ):
        path.unlink()
    return run


@pytest.mark.slow
def test_a_focal_loss_trains_as_our_own_does(shapes, runs):
    wish = [*PLAIN, "train.epochs=1"]
    theirs = ft.train(shapes, wish, loss=focal, runs=runs, say=quiet)
    ours = ft.train(shapes, [*wish, "train.imbalance.kind=focal"], runs=runs, say=quiet)
    plain = ft.train(shapes, wish, runs=runs, say=quiet)
    losses = [float(curve(run, "train/loss")[0]["value"]) for run in (theirs, ours, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] < 0.9 * losses[2]
    (thing,) = theirs.plan.own
    assert (thing.argument, thing.name) == ("loss", f"{__name__}.focal")
    assert theirs.plan.train.imbalance.kind == "none"
    again = begun_anew(theirs)
    with pytest.raises(
        RunError, match=rf"begun with {__name__}.focal \(\w+\) for loss \(the loss\), and gets none now"
    ):
        ft.resume(again, say=quiet)
    with pytest.raises(RunError, match=r"gets test_own_training.*lambda.* now"):
        ft.resume(again, loss=lambda logits, targets: focal(logits, targets), say=quiet)
    ft.resume(again, loss=focal, say=quiet)
    assert again.scores.test == theirs.scores.test


def test_of_uneven_classes_a_loss_that_was_handed_in_says_what_an_image_counts(shapes):
    few = Subset(ImageFolder(shapes), range(18, 72))  # six discs beside 24 of the others
    kinds = [
        ft.plan(None, [*PLAIN, "train.epochs=1"], dataset=few, loss=loss, say=quiet)[1].train.imbalance.kind
        for loss in (None, focal)
    ]
    assert kinds == ["inverse", "none"]


def test_a_mean_counts_for_each_image():
    logits, labels = torch.randn(6, 3, requires_grad=True), torch.arange(6) % 3
    by_image = loss_by_image(nn.CrossEntropyLoss())(logits, labels)
    assert by_image.shape == (6,)
    (own,) = torch.autograd.grad(by_image.sum() / 6, logits)
    (ours,) = torch.autograd.grad(make_loss("none", [2, 2, 2])(logits, labels).sum() / 6, logits)
    torch.testing.assert_close(own, ours)
    soft = F.one_hot(labels, 3).float()
    torch.testing.assert_close(
        loss_by_image(nn.CrossEntropyLoss(reduction="none"))(logits, soft).mean(), by_image.mean()
    )
    with pytest.raises(
        ValueError, match=r"loss= answers \(6, 3\) for logits \(6, 3\).*give a loss for each image, \(6,\)"
    ):
        loss_by_image(lambda logits, labels: logits)(logits, labels)
    with pytest.raises(ValueError, match="loss= answers float"):
        loss_by_image(lambda logits, labels: 1.0)(logits, labels)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("train.imbalance.kind=focal", "is focal, which is a loss, and loss= hands in another"),
        ("regularization.label_smoothing=0.1", "takes labels as they are"),
        ("train.strategy=probe", "solved exactly, by cross-entropy; leave loss= out"),
    ],
)
def test_wishes_that_the_loss_contradicts_are_refused(shapes, wish, message):
    with pytest.raises(RecipeError, match=message):
        ft.plan(shapes, [*PLAIN, wish], loss=focal, say=quiet)


@pytest.mark.slow
def test_callbacks_and_loggers_hear_of_every_stage(shapes, runs, tmp_path):
    counter, logger, said = Counter(), CSVLogger(tmp_path, name="own"), []
    monitor = known.EarlyStopping("val/loss", patience=9)
    wish = [*SMALL, "train.epochs=2", "data.split.refit=true", "train.checkpoint=last"]
    run = ft.train(shapes, wish, callbacks=[counter, monitor], logger=logger, runs=runs, say=said.append)
    assert [stage.images for stage in run.plan.stages] == ["train", "labelled"]
    refit = next(line for line in said if line.startswith("stage 2 (refit): ") and "epochs on" in line)
    assert counter.epochs == [0, 1, *range(int(refit.split()[3]))]
    assert any("nothing watches val in a refit, so it goes without EarlyStopping" in line for line in said)
    rows = read(tmp_path / "own" / "version_0" / "metrics.csv")
    ours = curve(run, "val/loss")
    logged = [float(row["val/loss"]) for row in rows if row.get("val/loss")]
    assert logged == pytest.approx([float(row["value"]) for row in ours if int(row["epoch"]) >= 0], rel=1e-5)
    assert {float(row["stage"]) for row in rows if row["stage"]} == {1.0, 2.0}
    names = [(thing.argument, thing.name.rpartition(".")[2], thing.digest) for thing in run.plan.own]
    assert names == [("callbacks", "Counter", ""), ("callbacks", "EarlyStopping", ""), ("logger", "CSVLogger", "")]


def test_listening_changes_nothing(shapes, runs):
    wish = [*PLAIN, "train.epochs=2"]
    alone = ft.train(shapes, wish, runs=runs, say=quiet)
    heard = ft.train(shapes, wish, callbacks=[Counter()], runs=runs, say=quiet)
    assert alone.final_weights().read_bytes() == heard.final_weights().read_bytes()
    assert alone.scores == heard.scores


def test_early_stopping_stops_and_what_is_kept_is_what_val_says(shapes, runs):
    counter = Counter()
    stop = known.EarlyStopping("val/loss", patience=1, min_delta=100.0)  # nothing is ever better
    wish = [*PLAIN, "train.epochs=6", "train.checkpoint=best", "train.patience=6"]
    run = ft.train(shapes, wish, callbacks=[counter, stop], runs=runs, say=quiet)
    assert counter.epochs == [0, 1] and run.scores.test is not None
    done = torch.load(run.stage_folder(0) / "last.ckpt", weights_only=True)["keeper"]
    assert done["is_finished"] and done["epoch"] == 1


def test_a_callback_may_stop_in_the_middle_of_an_epoch(shapes, runs):
    class Hasty(Counter):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            trainer.should_stop = True

    hasty = Hasty()
    run = ft.train(shapes, [*PLAIN, "train.epochs=3", "train.batch_size=16"], callbacks=[hasty], runs=runs, say=quiet)
    assert hasty.epochs == [0] and run.scores.test is not None


def test_each_stage_begins_with_the_state_that_was_handed_in():
    callback, said = Remembering(), []
    monitor = known.EarlyStopping("val/loss")
    own = checked(OwnTraining(callbacks=(callback, monitor)))
    callback.seen = 7
    keeper = SimpleNamespace()
    first, *others, last = Listeners(own, is_watched=True, say=said.append).around(keeper)
    assert (first, others, isinstance(last, Writer)) == (keeper, [callback, monitor], True)
    assert callback.seen == 0 and keeper.has_listeners and not said
    assert Listeners(own, is_watched=False, say=said.append).callbacks == [callback] and "EarlyStopping" in said[0]


@pytest.mark.slow
def test_what_a_callback_stops_in_a_refit_is_kept(shapes, runs):
    class OnlyRefit(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop |= "val/loss" not in trainer.callback_metrics

    wish = [*SMALL, "train.epochs=3", "data.split.refit=true", "train.checkpoint=last", "train.optimizer.lr=0.0001"]
    run = ft.train(shapes, wish, callbacks=[OnlyRefit()], runs=runs, say=quiet)
    done = torch.load(run.stage_folder(1) / "last.ckpt", weights_only=True)["keeper"]
    assert done["epoch"] == 0 and done["is_finished"] and done["best_state"]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_state_of_its_callbacks(shapes, runs):
    class Killed(Remembering):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    Killed.__qualname__ = Remembering.__qualname__
    wish = [*PLAIN, "train.epochs=4", "train.checkpoint=last"]
    whole = ft.train(shapes, wish, callbacks=[Remembering()], runs=runs, say=quiet)
    with pytest.raises(KeyboardInterrupt):
        ft.train(shapes, [*wish, "name=killed"], callbacks=[Killed()], runs=runs, say=quiet)
    (path,) = runs.glob("killed-*")
    with pytest.raises(RunError, match=r"begun with .*Remembering for callbacks .*gets none now"):
        ft.resume(path, say=quiet)
    going_on = Remembering()
    run = ft.resume(path, callbacks=[going_on], say=quiet)
    assert going_on.epochs == [1] and going_on.seen == 2
    assert run.final_weights().read_bytes() == whole.final_weights().read_bytes()


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (known.ModelCheckpoint(), "train.checkpoint says whose weights remain"),
        (known.BackboneFinetuning(), "train.strategy, train.depth and train.layers"),
        (known.StochasticWeightAveraging(0.1), "weights are averaged by train.averaging"),
        (known.EMAWeightAveraging(), "weights are averaged by train.averaging"),
        (known.GradientAccumulationScheduler({0: 2}), "train.batch_size"),
        (known.LearningRateFinder(), "train.optimizer"),
        (print, "give callbacks that are imported from pytorch_lightning"),
    ],
)
def test_what_a_plan_decides_is_no_business_of_callbacks(shapes, runs, callback, message):
    with pytest.raises(RecipeError, match=message):
        ft.train(shapes, PLAIN, callbacks=[Counter(), callback], runs=runs, say=quiet)


def test_what_is_no_logger_is_told(shapes):
    with pytest.raises(RecipeError, match=r"logger= is a str; give a logger of pytorch_lightning, or a list"):
        ft.plan(shapes, PLAIN, logger="csv", say=quiet)


def test_a_state_that_only_pickle_could_keep_is_refused(shapes):
    class Odd(pl.Callback):
        def state_dict(self):
            return {"seen": Counter()}

    with pytest.raises(RunError, match=r"the state_dict of Odd holds more than numbers"):
        ft.plan(shapes, PLAIN, callbacks=[Odd()], say=quiet)


def test_a_probe_says_that_it_asks_none_of_them(shapes):
    _, plan = ft.plan(shapes, ["data.image_size=32", "train.strategy=probe"], callbacks=[Counter()], say=quiet)
    (told,) = [reason for reason in plan.reasons if reason.key == "own.callbacks"]
    assert told.why.startswith("inactive: the probe is the model")


def test_a_plan_with_a_loss_is_the_one_that_trains(shapes, runs):
    _, plan = ft.plan(shapes, [*PLAIN, "train.epochs=1"], loss=focal, say=quiet)
    assert plan.own[0].name.endswith("focal")
    assert (
        ft.make_plan(
            ft.load_recipe(shapes, [*PLAIN, "train.epochs=1"]), ft.survey(shapes, PLAIN, loss=focal, say=quiet)
        ).own
        == plan.own
    )
    with pytest.raises(RunError, match=r"run of this plan was begun with .*focal.* for loss"):
        ft.train(plan, runs=runs, say=quiet)


def test_a_digest_follows_code_and_settings():
    def make(gamma):
        return lambda logits, targets: focal(logits, targets, gamma)

    class Weighted(nn.Module):
        def __init__(self, gamma, weight):
            super().__init__()
            self.gamma = gamma
            self.register_buffer("weight", torch.tensor(weight))

        def forward(self, logits, targets):
            return focal(logits, targets, self.gamma)

    things = [
        focal,
        functools.partial(focal, gamma=1.0),
        functools.partial(focal, gamma=3.0),
        make(1.0),
        make(3.0),
        Weighted(1.0, 1.0),
        Weighted(2.0, 1.0),
        Weighted(1.0, 2.0),
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])),
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ]
    assert len({describe("loss", thing).digest for thing in things}) == len(things)
    assert describe("loss", Weighted(1.0, 1.0).eval()) == describe("loss", Weighted(1.0, 1.0))
