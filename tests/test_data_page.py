"""Every row of `docs/data.md` is a promise, and is held to it here.

A row is `| what it looks like | what happens |`. Its case is the function below that `@case` names with the row's first
cell, to the letter; it builds the layout below a folder and gives back what `open_source` needs beside that folder, or
nothing (`patch` names something to be replaced meanwhile, `file` a table to be given instead of the folder). The second
cell says `Taken: N classes, splits A, B` (or `no splits`) or `Refused:`, and each text in double quotes must be said in
a warning or in the error. A row without a case fails, and so does a case without a row.
"""

import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from finetune.data import formats
from finetune.data.decoding import BadImage, decode
from finetune.data.formats import Contents
from finetune.data.frames import each_frame
from finetune.data.sources import open_source, read_bytes
from finetune.data.splits import refuse_lost
from finetune.errors import DataError

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
ROW = re.compile(r"^\| (?!It looks like this)(.+?) \| ((?:Taken|Refused):.+) \|$", re.M)
ROWS = dict(ROW.findall(PAGE.read_text(encoding="utf-8")))
CASES: dict[str, Callable[[Path], Any]] = {}
TWO = ("daisy", "roses")


def case(row: str) -> Callable[[Callable[[Path], Any]], None]:
    """Names the row of the page that a function builds."""

    def keep(build: Callable[[Path], Any]) -> None:
        assert row not in CASES, f"two cases for {row}"
        CASES[row] = build

    return keep


def put(file: Path, **options: Any) -> Path:
    """A tiny image that is like no other."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(str(file).encode())).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, **options)
    return file


def tree(root: Path, *folders: str, classes: tuple[str, ...] = TWO, n: int = 2, suffix: str = ".png") -> None:
    """`n` images of every class in every one of `folders`."""
    for folder in folders or (".",):
        for name in classes:
            for number in range(n):
                put(root / folder / name / f"{number}{suffix}")


def flat(folder: Path, *names: str) -> None:
    for name in names:
        put(folder / name)


def write(file: Path, content: bytes | str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def look(root: Path, **options: Any) -> tuple[tuple[str, ...], set[str | None], str]:
    """Classes, roles and all that is said, once every file has been listed and decoded."""
    is_each, contents, bad = options.pop("each", False), Contents(), {}
    source = open_source(root, **options)
    source = each_frame(source) if is_each else source
    for index, item in enumerate(source.items):
        try:
            contents.note(item, data := read_bytes(item))
            decode(data, shorter_pixels=None, interpolation="bilinear", frame=item.frame or 0)
        except (BadImage, OSError) as fault:
            bad[index] = str(fault)
    refuse_lost(source.items, source.classes, bad)
    roles = {source.items.role(index) for index in range(len(source.items))}
    said = [*source.warnings, *contents.warnings(source.classes), *bad.values()]
    return source.classes, roles, "\n".join(said)


def test_the_page_and_the_cases_are_the_same():
    assert len(ROWS) > 50
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) - PAGE.read_text(encoding="utf-8").count("| It looks like this |") == len(ROWS), "an odd row"
    assert sorted(CASES) == sorted(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_what_the_page_says_is_so(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (root := tmp_path / "data").mkdir()
    promise, options = ROWS[row], CASES[row](root) or {}
    if patch := options.pop("patch", None):
        monkeypatch.setattr(*patch)
    root = root / options.pop("file", ".")
    quoted = re.findall(r'"(.+?)"', promise)
    if promise.startswith("Refused"):
        assert quoted, "a refusal says something"
        with pytest.raises(DataError) as fault:
            look(root, **options)
        said = str(fault.value)
    else:
        classes, roles, said = look(root, **options)
        count, splits = re.match(r"Taken: (\d+) classes, (no splits|splits [a-z, ]+)", promise).groups()
        assert len(classes) == int(count), classes
        assert roles == ({None} if splits == "no splits" else set(splits.removeprefix("splits ").split(", ")))
    for words in quoted:
        assert words in said


@case("`daisy/*.jpg`, `roses/*.jpg`")
def _(root):
    tree(root, suffix=".jpg")


@case("folders inside the class folders: `daisy/2019/*.jpg`")
def _(root):
    tree(root, classes=("daisy/2019", "daisy", "roses/a/b"))


@case("`train/`, `val/`, `test/` of class folders")
def _(root):
    tree(root, "train", "val", "test")


@case("`Training/`, `Testing/`")
def _(root):
    tree(root, "Training", "Testing")


@case("`training_set/`, `test_set/`")
def _(root):
    tree(root, "training_set", "test_set")


@case("`train_images/`, `Val Data/`, `TEST/`")
def _(root):
    tree(root, "train_images", "Val Data", "TEST")


@case("`train2017/`, `val2017/`")
def _(root):
    tree(root, "train2017", "val2017")


@case("`train/`, `dev/`: the development set is for choosing")
def _(root):
    tree(root, "train", "dev")


@case("`train/`, `eval/`: looked at once, nothing is chosen on it")
def _(root):
    tree(root, "train", "eval")


@case("`seg_train/seg_train/`, `seg_test/seg_test/`, `seg_pred/`")
def _(root):
    tree(root, "seg_train/seg_train", "seg_test/seg_test")
    flat(root / "seg_pred/seg_pred", "1.png")


@case("`Lager A/`, `Lager B/`, both with the same class folders")
def _(root):
    tree(root, "Lager A", "Lager B")


@case("the same, with `data.splits: {train: Lager A, test: Lager B}`")
def _(root):
    tree(root, "Lager A", "Lager B")
    return {"splits": {"train": ("Lager A",), "test": ("lager b",)}}


@case("the same, with `data.splits: {}`")
def _(root):
    tree(root, "Lager A", "Lager B")
    return {"splits": {}}


@case("`data.splits` with a name that is no folder")
def _(root):
    tree(root, "Training", "Testing")
    return {"splits": {"train": ("Training",), "test": ("Testin",)}}


@case("`data.splits` with nested names: `{train: images/train, test: images/held}`")
def _(root):
    tree(root, "images/train", "images/held")
    flat(root / "labels", "1.png")
    return {"splits": {"train": ("images/train",), "test": ("images/held",)}}


@case("`Train/` and `training_set/`")
def _(root):
    tree(root, "Train", "training_set")


@case("`test/`, `val/`, but no train")
def _(root):
    tree(root, "val", "test")


@case("class folders beside `train/` and `test/`: `train/`, `test/`, `more/`")
def _(root):
    tree(root, "train", "test", "more")


@case("`train/`, `test/`, and folders beside them named like the classes inside")
def _(root):
    tree(root, "train", "test", ".")


@case("a class called `test` beside others")
def _(root):
    tree(root, classes=("control", "test"))


@case("classes called `train` and `test` and nothing else, with `data.splits: {}`")
def _(root):
    tree(root, classes=("train", "test"))
    return {"splits": {}}


@case("splits inside the classes: `daisy/train/`, `daisy/test/`")
def _(root):
    tree(root, *TWO, classes=("train", "test"))


@case("several data sets in one folder: `flowers/train/daisy/`, `birds/train/owl/`")
def _(root):
    tree(root, "flowers/train", "flowers/test")
    tree(root, "birds/train", "birds/test", classes=("owl", "wren", "tit"))


@case("`daisy/train/`, `roses/train/`, and an empty `test/` in each")
def _(root):
    tree(root, *TWO, classes=("train",))
    for name in TWO:
        (root / name / "test").mkdir()


@case("one class folder with images, the others empty")
def _(root):
    tree(root, classes=("daisy",))
    for name in ("roses", "tulips"):
        (root / name).mkdir()


@case("archives, `train.zip`, or other files alone")
def _(root):
    write(root / "train.zip", "PK")


@case("a lone folder around it all: `archive/Training/`, `archive/Testing/`")
def _(root):
    tree(root / "archive", "Training", "Testing")


@case("`Images/` of class folders beside `Annotations/` of XML files")
def _(root):
    tree(root / "Images")
    for name in TWO:
        write(root / "Annotations" / name / "1.xml", "<x/>")


@case("a lone folder inside each split: `train/train/`, `test/images/`")
def _(root):
    tree(root, "train/train", "test/images")


@case("`test/` of images without labels beside `train/`")
def _(root):
    tree(root, "train")
    flat(root / "test", "1.png", "2.png", "3.png")


@case("an empty `test/` beside `train/`")
def _(root):
    tree(root, "train")
    (root / "test").mkdir()


@case("a `test/` in which no image can be read")
def _(root):
    tree(root, "train")
    for name in TWO:
        write(root / "test" / name / "1.jpg", "broken")


@case("a class in `test/` that `train/` has not")
def _(root):
    tree(root, "train")
    tree(root, "test", classes=("daisy", "rosa"))


@case("names of classes with blanks, digits and accents: `01 Großes/`, `猫/`")
def _(root):
    tree(root, classes=("01 Großes", "猫"))


@case("images and no class folders: `train/cat.0.jpg`, `train/dog.0.jpg`")
def _(root):
    flat(root / "train" / "train", "cat.0.jpg", "cat.1.jpg", "dog.0.jpg", "dog.1.jpg")
    flat(root / "test1", "1.jpg", "2.jpg")


@case("`images/` and `masks/` with the same names")
def _(root):
    flat(root / "images", "1.jpg", "2.jpg")
    flat(root / "masks", "1_mask.png", "2_mask.png")


@case("one class folder only")
def _(root):
    tree(root, classes=("daisy",))


@case("class folders and a stray `notes.csv`")
def _(root):
    tree(root)
    write(root / "notes.csv", "a,b\n1,2\n")


@case("`train_images/` and `test_images/` without class folders, `train.csv`")
def _(root):
    flat(root / "train_images", "1.png", "2.png")
    flat(root / "test_images", "3.png")
    write(root / "train.csv", "image,label\ntrain_images/1.png,daisy\ntrain_images/2.png,roses\n")


@case("Kaggle's Cassava: that and `sample_submission.csv`, names in `train.csv` without their folder")
def _(root):
    flat(root / "train_images", "1.png", "2.png", "3.png")
    flat(root / "test_images", "4.png", "5.png")
    write(root / "train.csv", "image_id,label\n1.png,0\n2.png,1\n3.png,1\n")
    write(root / "sample_submission.csv", "image_id,label\n4.png,4\n")


@case("the same, given as `cassava/train.csv`")
def _(root):
    CASES["Kaggle's Cassava: that and `sample_submission.csv`, names in `train.csv` without their folder"](root)
    return {"file": "train.csv"}


@case("`images/` and `labels.csv`")
def _(root):
    flat(root / "images", "1.png", "2.png")
    write(root / "labels.csv", "image,label\nimages/1.png,daisy\nimages/2.png,roses\n")


@case("class folders in `train/` and `test/` beside `train.csv`")
def _(root):
    tree(root, "train", "test")
    write(root / "train.csv", "image,label\ntrain/daisy/0.png,daisy\n")


@case("one folder of class folders beside a table of something else")
def _(root):
    tree(root / "photos")
    write(root / "names.csv", "number,latin\n1,Bellis\n")


@case("JPEG, PNG, BMP, GIF, TIFF, WebP, PPM, PGM, AVIF, JPEG 2000, suffixes in any case")
def _(root):
    for suffix in ("JPG", "jpeg", "jpe", "PNG", "bmp", "gif", "TIF", "tiff", "webp", "ppm", "pgm", "avif", "jp2"):
        tree(root, n=1, suffix=f".{suffix}")
    for name in TWO:
        assert len(list((root / name).iterdir())) == 13


@case("HEIC photos, with the plug-in: `pip install 'finetune-vision[heic]'`")
def _(root):
    pytest.importorskip("pillow_heif").register_heif_opener()
    tree(root, suffix=".heic")


@case("a class of HEIC photos, without the plug-in")
def _(root):
    tree(root, classes=("daisy",))
    write(root / "roses" / "IMG_1.HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    return {"patch": (formats, "_has_heif", lambda: False)}


@case("WebP or AVIF under `.jpg`")
def _(root):
    tree(root, classes=("daisy",), suffix=".jpg")
    for number in range(5):
        put(root / "roses" / f"{number}.jpg", format="WEBP")


@case("one class all AVIF, the other all PNG")
def _(root):
    tree(root, classes=("daisy",), n=5)
    tree(root, classes=("roses",), n=5, suffix=".avif")


@case("files of other kinds among the images")
def _(root):
    tree(root)
    write(root / "daisy" / "x.txt", "x")
    write(root / "roses" / "x.CR2", "x")


@case("a class of raw camera files")
def _(root):
    tree(root, classes=("daisy", "tulips"))
    for number in range(2):
        write(root / "roses" / f"{number}.NEF", "raw")


@case("a class of JPEG files without suffix")
def _(root):
    tree(root, classes=("daisy", "tulips"))
    for number in range(2):
        put(root / "roses" / str(number), format="JPEG")


@case("an empty class folder")
def _(root):
    tree(root)
    (root / "tulips").mkdir()


@case("a class whose files are all broken")
def _(root):
    tree(root, classes=("daisy", "tulips"))
    write(root / "roses" / "1.jpg", "broken")


@case("a few broken files among good ones")
def _(root):
    tree(root)
    write(root / "roses" / "broken.jpg", "broken")


@case("grey values or colours of 10, 12 or 16 bits in PNG or TIFF")
def _(root):
    tree(root)
    for number, (suffix, top) in enumerate(((".png", 1023), (".tif", 4095), (".png", 65535))):
        values = np.linspace(0, top, 12 * 16).reshape(12, 16).astype(np.uint16)
        Image.fromarray(values).save(root / "roses" / f"wide{number}{suffix}")
        cv2.imwrite(str(root / "daisy" / f"wide{number}{suffix}"), np.stack([values, values // 2, values // 3], axis=2))


def four_bands(file, last, **options):
    """Red, green, blue and `last` as an image that calls it alpha."""
    colours = np.asarray(Image.open(put(file)).convert("RGB"))
    Image.fromarray(np.dstack([colours, last])).save(file, **options)


@case("transparent PNG: clear or opaque nearly everywhere")
def _(root):
    tree(root)
    alpha = np.zeros((12, 16), np.uint8)
    alpha[:, 6:] = 255
    four_bands(root / "roses" / "clear.png", alpha)


@case("a class of PNG whose alpha channel is a band")
def _(root):
    tree(root, classes=("daisy", "tulips"))
    for number in range(2):
        four_bands(root / "roses" / f"{number}.png", np.arange(20, 212).reshape(12, 16).astype(np.uint8))


@case("a class of TIFFs of four bands, red, green, blue and near-infrared")
def _(root):
    tree(root, classes=("daisy", "tulips"))
    for number in range(2):
        file = root / "roses" / f"{number}.tif"
        four_bands(file, np.full((12, 16), 255, np.uint8))
        data = file.read_bytes()
        tag = struct.pack("<HHIHH", 338, 3, 1, 2, 0)  # additional samples: transparency
        assert tag in data
        file.write_bytes(data.replace(tag, struct.pack("<HHIHH", 338, 3, 1, 0, 0)))  # unspecified


@case("animated GIF, TIFF of several pages")
def _(root):
    tree(root)
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "blue", "green")]
    for suffix in (".gif", ".tif"):
        frames[0].save(root / "roses" / f"several{suffix}", save_all=True, append_images=frames[1:])


@case("with `data.frame=each`: an animated GIF that ends too early, a TIFF damaged between its pages")
def _(root):
    tree(root)
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "blue", "green")]
    for suffix in (".gif", ".tif"):
        frames[0].save(file := root / "roses" / f"several{suffix}", save_all=True, append_images=frames[1:])
        whole = file.read_bytes()
        file.write_bytes(whole[: -15 if suffix == ".gif" else -620])
    return {"each": True}


@case("a web page or a Git LFS pointer under `.jpg`")
def _(root):
    tree(root)
    write(root / "roses" / "page.jpg", "<!DOCTYPE html><html>404</html>")
    write(root / "roses" / "pointer.jpg", "version https://git-lfs.github.com/spec/v1\n")


@case("`.ipynb_checkpoints/`, `__MACOSX/`, `@eaDir/`, `$RECYCLE.BIN/`, `Thumbs.db`, `._x.jpg`")
def _(root):
    tree(root)
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"):
        flat(root / folder, "1.png")
        flat(root / "daisy" / folder, "1.png")
    for name in ("._x.jpg", "Thumbs.db", ".DS_Store", "desktop.ini"):
        write(root / "daisy" / name, "x")
    assert len(open_source(root).items) == 4 and not open_source(root).warnings


@case("`runs/` of this tool in the data folder")
def _(root):
    tree(root)
    write(root / "runs" / "one" / "recipe.yaml", "name: one\n")
    flat(root / "runs" / "one", "figure.png")


@case("linked files and linked class folders")
def _(root):
    real = root.parent / "real"
    tree(real, classes=("one", "two"))
    (root / "daisy").mkdir()
    for file in (real / "one").iterdir():
        (root / "daisy" / file.name).symlink_to(file)
    (root / "roses").symlink_to(real / "two")
    assert open_source(root).classes == TWO and len(open_source(root).items) == 4


@case("a link that leads back into the data: `daisy/up` to `..`")
def _(root):
    tree(root)
    (root / "daisy" / "up").symlink_to("..")
    assert len(open_source(root).items) == 4


@case("a link to nothing")
def _(root):
    tree(root)
    (root / "roses" / "gone.jpg").symlink_to("/nowhere/gone.jpg")


def rows(
    root: Path, *labels: str, header: str = "image,label", name: str = "t.csv", folder: str = "", start: int = 0
) -> None:
    """A table of images that are there, with whatever follows each in its row."""
    lines = [header]
    for number, more in enumerate(labels, start):
        put(root / folder / f"{number}.png")
        lines.append(f"{number}.png,{more}")
    write(root / name, "\n".join(lines) + "\n")


@case("`images/`, `extra/` and a table `labels.csv` that gives the images labels of its own")
def _(root):
    flat(root / "extra", "9.png")
    flat(root / "images", "0.png", "1.png")
    write(root / "labels.csv", "image,label\nimages/0.png,daisy\nimages/1.png,roses\n")


@case("class folders and a `metadata.csv` whose labels are the names of the folders")
def _(root):
    tree(root, n=1)
    write(root / "metadata.csv", "file_name,label\ndaisy/0.png,daisy\nroses/0.png,roses\n")


@case("`image,label` with commas, semicolons, tabs or bars")
def _(root):
    for sign in ",;\t|":
        rows(root, *TWO)
        write(root / "t.csv", (root / "t.csv").read_text().replace(",", sign))
        assert open_source(root).classes == TWO


@case("a byte-order mark, blanks around cells, empty lines, quotes")
def _(root):
    rows(root, *TWO)
    write(root / "t.csv", b'\xef\xbb\xbf image , label\n\n0.png , daisy\n, \n"1.png", roses \n')


@case("UTF-16 text")
def _(root):
    rows(root, *TWO)
    write(root / "t.csv", "image,label\n0.png,daisy\n1.png,roses\n".encode("utf-16"))


@case("Latin-1, GBK or another encoding")
def _(root):
    rows(root, *TWO)
    write(root / "t.csv", "image,label\n0.png,daisy\n1.png,ros\u00e9\n".encode("latin-1"))


@case("no header")
def _(root):
    rows(root, *TWO)
    write(root / "t.csv", "0.png,daisy\n1.png,roses\n")


@case("more cells in a row than in the header")
def _(root):
    rows(root, "daisy", "roses, red")


@case("the index column of pandas")
def _(root):
    rows(root, *TWO)
    write(root / "t.csv", ",image,label\n0,0.png,daisy\n1,1.png,roses\n")


@case("`file_name,label`, as the datasets hub has it")
def _(root):
    rows(root, *TWO, header="file_name,label", name="metadata.csv")


@case("`id,breed`, names without suffix, images in `train/`")
def _(root):
    rows(root, *TWO, folder="train")
    write(root / "t.csv", "id,breed\n0,daisy\n1,roses\n")


@case("columns whose names say nothing: `which,weather`")
def _(root):
    rows(root, *TWO, header="which,weather")


@case("the same, with `data.columns: {image: which, label: weather}`")
def _(root):
    rows(root, *TWO, header="which,weather")
    return {"columns": {"image": "which", "label": "weather"}}


@case("two columns that could be the label: `species`, `breed`")
def _(root):
    rows(root, "a,b", "c,d", header="image,species,breed")


@case("columns that are not needed: `age`, `sex`")
def _(root):
    rows(root, "daisy,3,f", "roses,4,m", header="image,label,age,sex")


@case("paths with backslashes, or of another machine: `C:\\data\\0.png`")
def _(root):
    rows(root, *TWO)
    write(root / "t.csv", "image,label\nC:\\data\\0.png,daisy\nC:\\data\\1.png,roses\n")


@case("the same name in two folders beside the table")
def _(root):
    for folder in "ab":
        rows(root, *TWO, folder=folder)


@case("no image of the table is there")
def _(root):
    write(root / "t.csv", "image,label\n0.png,daisy\n1.png,roses\n")


@case("a few images are missing")
def _(root):
    rows(root, *TWO, "daisy")
    write(root / "t.csv", "image,label\n0.png,daisy\n1.png,roses\n2.png,daisy\ngone.png,daisy\n")


@case("addresses instead of paths")
def _(root):
    write(root / "t.csv", "image,label\nhttps://example.org/0.png,daisy\nhttps://example.org/1.png,roses\n")


@case("a row twice")
def _(root):
    rows(root, *TWO)
    write(root / "t.csv", "image,label\n0.png,daisy\n1.png,roses\n0.png,daisy\n")


@case("an image in two rows with two labels")
def _(root):
    rows(root, *TWO)
    write(root / "t.csv", "image,label\n0.png,daisy\n1.png,roses\n0.png,roses\n")


@case("a column `split`")
def _(root):
    rows(root, "daisy,train", "roses,train", "roses,test", header="image,label,split")


@case("a column of words for splits by any name: `set`, `phase`, `usage`")
def _(root):
    rows(root, "daisy,Training", "roses,Training", "roses,dev", header="image,label,usage")


@case("`is_valid`, `is_test`, `is_train`")
def _(root):
    rows(root, "daisy,False", "roses,False", "roses,True", header="image,label,is_valid")


@case("`valid` with yes and no, which may mean quality")
def _(root):
    rows(root, "daisy,no", "roses,no", "roses,yes", header="image,label,valid")


@case("`fold` with numbers")
def _(root):
    rows(root, "daisy,0", "roses,0", "daisy,1", "roses,1", header="image,label,fold")


@case("the same, with `data.columns.split=fold` and `data.splits: {val: 0}`")
def _(root):
    rows(root, "daisy,0", "roses,0", "daisy,1", "roses,1", header="image,label,fold")
    return {"columns": {"split": "fold"}, "splits": {"val": ("0",)}}


@case("`train.csv`, `val.csv`, `test.csv`")
def _(root):
    for number, name in enumerate(("train", "val", "test")):
        rows(root, *TWO, name=f"{name}.csv", start=2 * number)


@case("`train.csv`, `test.csv` without labels, `sample_submission.csv`")
def _(root):
    rows(root, *TWO, name="train.csv")
    rows(root, "", "", header="image", name="test.csv", start=2)
    rows(root, "", "", name="sample_submission.csv", start=2)


@case("two tables, and neither is called like a split")
def _(root):
    rows(root, *TWO, name="a.csv")
    rows(root, *TWO, name="b.csv")


@case("`train/metadata.csv`, `test/metadata.csv` beside their images")
def _(root):
    for folder in ("train", "test"):
        rows(root / folder, *TWO, header="file_name,label", name="metadata.csv")


@case("`metadata.jsonl`")
def _(root):
    rows(root, *TWO, name="t.csv")
    (root / "t.csv").unlink()
    lines = [f'{{"file_name": "{number}.png", "label": "{label}"}}' for number, label in enumerate(TWO)]
    write(root / "metadata.jsonl", "\n".join(lines))


@case("`Daisy` and `daisy`")
def _(root):
    rows(root, "daisy", "daisy", "Daisy", "roses")


@case("a rare label spelt nearly like a common one")
def _(root):
    rows(root, *["dandelion"] * 10, "dandelon", "roses", "roses")


@case("`1` and `1.0`")
def _(root):
    rows(root, "1", "1", "1.0", "2")


@case("a row with an empty label, `nan`, `null` or `n/a`")
def _(root):
    rows(root, "daisy", "nan", "roses")


@case("test rows without labels")
def _(root):
    rows(root, "daisy,train", "roses,train", ",test", header="image,label,split")


@case("a class called `None`")
def _(root):
    rows(root, "daisy", "None", "None")


@case("several labels in a cell: `daisy roses`, `daisy\\|roses`, `['daisy', 'roses']`")
def _(root):
    rows(root, "daisy", "daisy", "roses", "roses", "daisy roses")


@case("one-hot columns")
def _(root):
    rows(root, "0,1", "1,0", header="image,daisy,roses")


@case("measured values")
def _(root):
    rows(root, *[f"{number / 7:.2f}" for number in range(9)])


@case("nearly every row with a label of its own")
def _(root):
    rows(root, *[f"flower {number}" for number in range(9)])


def shard(file: Path, image: str = "image", label: str = "label", labels: Any = (0, 1), **more: Any) -> None:
    """Parquet rows as the datasets hub writes them."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    columns = {image: [{"bytes": stream.getvalue(), "path": "x"}] * len(labels), label: list(labels), **more}
    features = {name: {"names": list(TWO), "_type": "ClassLabel"} for name in (label, "coarse_label")}
    meta = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(meta), file)


@case("`data/train-00000-of-00001.parquet`, `data/test-00000-of-00001.parquet`")
def _(root):
    for role in ("train", "test"):
        shard(root / "data" / f"{role}-00000-of-00001.parquet")


@case("`plain_text/train-00000-of-00001.parquet`")
def _(root):
    shard(root / "plain_text" / "train-00000-of-00001.parquet")


@case("`default/train/0000.parquet`, `default/validation/0000.parquet`")
def _(root):
    for role in ("train", "validation"):
        shard(root / "default" / role / "0000.parquet")


@case("two sets: `full/train.parquet`, `small/train.parquet`")
def _(root):
    for name in ("full", "small"):
        shard(root / name / "train.parquet")


@case("columns `img` and `labels`, and others")
def _(root):
    shard(root / "train.parquet", "img", "labels", caption=["x", "y"])


@case("`fine_label` and `coarse_label`")
def _(root):
    shard(root / "train.parquet", label="fine_label", coarse_label=[0, 1])


@case("one shard with a column `split`")
def _(root):
    shard(root / "all.parquet", labels=(0, 1, 0, 1), split=["train", "train", "test", "test"])


@case("test shards without labels")
def _(root):
    shard(root / "train.parquet")
    shard(root / "test.parquet", labels=(-1, -1))


@case("paths instead of images")
def _(root):
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "label": [0, 1]}), root / "train.parquet")


@case("lists of labels")
def _(root):
    shard(root / "train.parquet", labels=([0], [0, 1]))
