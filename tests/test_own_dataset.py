"""Images handed in as torch data sets: read like files, named in the plan, needed again, and never kept."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import Compose, ToTensor

import finetune as ft
from finetune.config.recipe import DataSpec
from finetune.data.dataset import Dataset
from finetune.data.held import digest_picture, hold
from finetune.data.sources import read_bytes
from finetune.data.torch_datasets import digest_contents, open_datasets
from finetune.errors import DataError, RecipeError, RunError

SMALL = ["data.image_size=32", "tracking.enabled=false"]
PROBE = [*SMALL, "train.strategy=probe"]


def quiet(text):
    """Nobody listens."""


class Squares:
    """Grey squares, bright or dark, in whatever form an image may have; no data set of torch's, but of its kind."""

    def __init__(self, number=40, form=np.asarray, label=lambda bright: ["dark", "bright"][bright], faulty=()):
        self.number, self.form, self.label, self.faulty = number, form, label, faulty

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        if index in self.faulty:
            raise OSError("the drive is gone")
        random, bright = np.random.default_rng(index), index % 2
        pixels = random.integers(100 * bright, 100 * bright + 120, (32, 32, 3), dtype=np.uint8)
        return self.form(pixels), self.label(bright)


def as_tensor(pixels):
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("own") / "runs"


@pytest.fixture(scope="module")
def from_folder(shapes, runs):
    return ft.train(shapes, PROBE, runs=runs, say=quiet)


@pytest.fixture(scope="module")
def handed_in(shapes, runs):
    return ft.train(dataset=ImageFolder(shapes), overrides=PROBE, runs=runs, say=quiet)


def test_an_image_folder_gives_what_the_folder_gives(from_folder, handed_in):
    ours, theirs = handed_in.facts, from_folder.facts
    assert ours.counts == theirs.counts and ours.classes == theirs.classes and ours.num_images == theirs.num_images
    assert ours.image_kinds == theirs.image_kinds and ours.median_width == theirs.median_width
    right, other = handed_in.scores.test.top1, from_folder.scores.test.top1
    assert right.low <= other.value <= right.high
    assert handed_in.path.name.startswith("ImageFolder-")


def test_the_plan_names_what_was_handed_in_and_holds_no_place(handed_in, shapes):
    plan = handed_in.plan
    assert plan.data.root is None and ft.load_recipe(handed_in.file("recipe.yaml")).data.root is None
    (thing,) = plan.own
    assert (thing.argument, thing.name) == ("dataset", "torchvision.datasets.folder.ImageFolder")
    assert thing.digest == digest_contents(open_datasets(ImageFolder(shapes)))
    assert "own.dataset" in [reason.key for reason in plan.reasons]
    assert ft.plan(dataset=ImageFolder(shapes), overrides=PROBE, say=quiet)[1] == plan
    assert (
        ft.make_plan(ft.load_recipe(None, PROBE), ft.survey(None, PROBE, dataset=ImageFolder(shapes), say=quiet))
        == plan
    )
    assert not [
        path
        for path in handed_in.path.rglob("*")
        if b"ImageFolder" in path.read_bytes() and path.suffix in (".pkl", ".pt")
    ]


def test_a_run_needs_its_images_again(handed_in, shapes):
    again = ImageFolder(shapes)
    assert ft.evaluate(handed_in, dataset=again, say=quiet).test == handed_in.scores.test
    assert ft.resume(handed_in, dataset=again, say=quiet).path == handed_in.path
    named = r"begun with torchvision.datasets.folder.ImageFolder \([0-9a-f]{12}\) for dataset"
    for verb in (ft.resume, ft.evaluate):
        with pytest.raises(RunError, match=rf"{named} \(the images\), and gets none now. Hand in the same: finetune"):
            verb(handed_in, say=quiet)
    few = Subset(again, range(0, 72, 2))
    with pytest.raises(RunError, match=rf"{named}.*gets torch.utils.data.dataset.Subset \([0-9a-f]{{12}}\) now"):
        ft.resume(handed_in, dataset=few, say=quiet)


def test_a_run_on_a_folder_wants_no_other_images(from_folder, shapes):
    with pytest.raises(RecipeError, match=r"data.root is .*two sets of images. Leave one out"):
        ft.resume(from_folder, dataset=ImageFolder(shapes), say=quiet)


def test_new_images_are_named_without_the_data_set(handed_in, shapes):
    path = next((shapes / "disc").iterdir())
    assert (
        ft.predict(handed_in, path)[0].label == ft.predict(handed_in, as_tensor(np.asarray(Image.open(path))))[0].label
    )


@pytest.mark.parametrize("form", [Image.fromarray, np.asarray, as_tensor], ids=["pillow", "array", "tensor"])
def test_an_image_is_the_same_in_any_form(form):
    plain, other = open_datasets(Squares()), open_datasets(Squares(form=form))
    assert plain.digests == other.digests and digest_contents(plain) == digest_contents(other)
    dataset = Dataset.open(DataSpec(), 0, other)
    dataset.divide()
    with_pixels = np.asarray(Image.open(io.BytesIO(read_bytes(other.items[7]))))
    np.testing.assert_array_equal(with_pixels, Squares()[7][0])


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        (lambda bright: ["dark", "bright"][bright], ("bright", "dark")),
        (lambda bright: bright, ("0", "1")),
        (lambda bright: torch.tensor(10 - bright), ("9", "10")),
        (lambda bright: np.int64(bright), ("0", "1")),
    ],
    ids=["names", "numbers", "tensors", "numpy"],
)
def test_labels_are_names_or_numbers(label, classes):
    source = open_datasets(Squares(label=label))
    assert source.classes == classes  # numbers in their order, not as words: the logits stand in it
    for index in range(40):
        item = source.items[index]
        assert (item.name, item.row) == (f"Squares#{index}", index)
        assert source.classes[item.label] == str(getattr(label(index % 2), "item", lambda: label(index % 2))())  # noqa: B023


def test_classes_keep_the_order_in_which_the_data_set_names_them():
    named = Squares(label=lambda bright: 2 * bright)
    named.classes = ["zebra", "unicorn", "ant"]
    source = open_datasets(named)
    assert source.classes == ("zebra", "ant")
    assert any("1 of 3 classes" in line and "unicorn" in line for line in source.warnings)
    part = open_datasets(Subset(named, range(10)))  # as random_split makes them
    assert part.classes == ("zebra", "ant")


def test_roles_are_given_as_a_dict():
    handed = {"train": Squares(30), "valid": Squares(40), "test": Subset(Squares(60), range(40, 60))}
    source = open_datasets(handed)
    assert {role: sum(held.values()) for role, held in source.items.counts().items()} == {
        "train": 30,
        "val": 40,
        "test": 20,
    }
    assert source.items[0].name.startswith("test#") and source.items[20].name == "train#0"
    split = Dataset.open(DataSpec(), 0, source).divide()
    assert {role: sum(split.counts[role]) for role in ("val", "test")} == {"val": 40, "test": 20}
    assert split.leaks == 30  # val holds the very images of train


def test_faulty_items_are_named_and_left_out():
    dataset = ft.open_dataset(dataset=Squares(faulty=(3, 20)))
    bad = {dataset.items.name(index): str(why) for index, why in dataset.bad.items()}
    assert bad == {f"Squares#{index}": "OSError: the drive is gone" for index in (3, 20)}
    assert sum(map(sum, dataset.split.counts.values())) == 38
    with pytest.raises(DataError, match=r"2 images cannot be read: Squares#3 \(OSError: the drive is gone\)"):
        ft.open_dataset(None, ["data.on_bad_image=fail"], dataset=Squares(faulty=(3, 20)))
    with pytest.raises(DataError, match=r"none of the 4 items of Squares can be read: OSError"):
        open_datasets(Squares(4, faulty=range(4)))


def test_a_picture_that_breaks_when_it_is_loaded_is_named():
    half = hold(Squares()[4][0], "it").data[:800]

    class Lazy(Squares):
        def __getitem__(self, index):
            return (Image.open(io.BytesIO(half)), "dark") if index == 4 else super().__getitem__(index)

    source = open_datasets(Lazy())
    assert [str(one)[:7] for one in source.digests if not isinstance(one, str)] == ["OSError"]
    assert source.classes[source.items[4].label] == "dark"


def test_images_that_differ_each_time_are_refused():
    class Noisy(Squares):
        def __getitem__(self, index):
            return np.random.default_rng().integers(0, 255, (32, 32, 3), dtype=np.uint8), index % 2

    with pytest.raises(DataError, match=r"Noisy#0 is another image each time it is asked for.*random transforms"):
        open_datasets(Noisy())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Squares())


@pytest.mark.parametrize(
    ("handed", "message"),
    [
        (Squares(form=lambda pixels: pixels / 255), r"item 0 of Squares is an array .* type float64; give \(H, W, 3\)"),
        (Squares(form=lambda pixels: as_tensor(pixels).float()), r"tensor of shape \(3, 32, 32\) and type float32"),
        (Squares(label=lambda bright: [0, 1]), r"label of item 0 of Squares is \[0, 1\]; give the name.*multi-label"),
        (Squares(label=lambda bright: bright / 2), r"label of item 0 of Squares is 0.0; give the name of a class"),
        (Squares(label=lambda bright: "all"), "holds one class only"),
        (Squares(0), "is empty"),
        (Stream(), "dataset= is a Stream; give a data set with __len__"),
        ([np.zeros((4, 4, 3), np.uint8)] * 3, "item 0 of list is a ndarray; a data set gives a pair"),
        ({"trial": Squares()}, "names 'trial', which is no role. Nearest: train"),
        ({"test": Squares()}, "no train to learn from"),
        (
            {"train": Squares(label=lambda bright: bright), "val": Squares(label=lambda bright: bright + 5)},
            "'5' in val",
        ),
        (ConcatDataset([Squares(4), Squares(4, label=lambda bright: bright)]), "some labels are numbers and some are"),
    ],
)
def test_what_cannot_be_learned_from_is_told(handed, message):
    with pytest.raises(DataError, match=message):
        open_datasets(handed)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("data.splits={train: a}", "give a data set for each role"),
        ("data.columns.label=class", "names columns of a table"),
        ("data.frame=each", "has one frame"),
    ],
)
def test_keys_of_folders_are_refused(wish, message):
    with pytest.raises(RecipeError, match=message):
        ft.survey(None, [wish], dataset=Squares(), say=quiet)


def test_a_label_that_no_class_bears_is_told():
    strange = Squares(label=lambda bright: 7 * bright)
    strange.classes = ["dark", "bright"]
    with pytest.raises(DataError, match="labels 7 stand for none of the 2 classes"):
        open_datasets(strange)


@pytest.mark.slow
def test_images_with_no_folder_can_be_trained_on_and_resumed(runs, monkeypatch):
    """Fake data set by torchvision, killed after its plan: the same weights as an undisturbed run."""
    fake = FakeData(48, (3, 32, 32), 3, random_offset=1)
    wish = [*SMALL, "train.strategy=partial", "train.epochs=1", "data.split.refit=false", "name=fake"]
    whole = ft.train(None, wish, dataset=fake, runs=runs, say=quiet)
    assert whole.scores.test.top1.n and whole.report.stat().st_size
    for name in ("scores.json", "card.yaml", "model.safetensors"):
        whole.file(name).unlink()
    before = whole.final_weights().read_bytes()
    whole.final_weights().unlink()
    (whole.stage_folder(0) / "last.ckpt").unlink()
    with pytest.raises(RunError, match="FakeData"):
        ft.resume(whole, say=quiet)
    ft.resume(whole, dataset=FakeData(48, (3, 32, 32), 3, random_offset=1), say=quiet)
    assert whole.final_weights().read_bytes() == before


def test_transforms_that_scale_are_told_to_be_left_out():
    fake = FakeData(8, (3, 32, 32), 2, transform=Compose([ToTensor()]))
    with pytest.raises(
        DataError, match=r"type float32; give \(3, H, W\).*the view of the weights scales and normalises"
    ):
        open_datasets(fake)


def test_tensors_side_by_side_are_a_data_set():
    pixels = torch.stack([as_tensor(Squares()[index][0]) for index in range(12)])
    source = open_datasets(TensorDataset(pixels, torch.arange(12) % 2))
    assert source.classes == ("0", "1") and source.digests[5] == open_datasets(Squares(12)).digests[5]


def test_a_digest_is_of_what_is_seen():
    grey = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    turned = grey.copy()
    exif = turned.getexif()
    exif[0x0112] = 6
    spotted = grey.copy()
    spotted.putpixel((2, 3), 255)
    kinds = (grey, grey.convert("RGB"), turned, grey.crop((0, 0, 2, 4)), spotted)
    known = {digest_picture(image) for image in kinds}
    assert len(known) == len(kinds)
    stored = Image.open(io.BytesIO(hold(grey, "it").data))
    assert digest_picture(stored) in known


def test_it_travels_to_loader_processes_that_are_no_forks():
    item = open_datasets(TensorDataset(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4) % 2)).items[2]
    assert pickle.loads(pickle.dumps(item)).read() == item.read()
