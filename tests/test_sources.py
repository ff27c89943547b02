"""Folders, tables and shards of tiny real files; the order must never come from the file system."""

import json
import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from finetune.data import shards as shards_module
from finetune.data.decoding import decode
from finetune.data.items import Item
from finetune.data.sources import open_source, read_bytes
from finetune.errors import DataError


def draw(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (shade % 256, 0, 0)).save(path)
    return path


def tree(root, names):
    for shade, name in enumerate(names):
        draw(root / name, shade)
    return root


def names_of(source):
    return [item.name for item in source.items]


def test_a_tree_of_class_folders_is_sorted_and_has_no_roles(tmp_path):
    source = open_source(tree(tmp_path, ["cat/b.png", "ant/z.jpg", "cat/a.bmp", "ant/deep/er/a.webp", "bee/1.GIF"]))
    assert (source.kind, source.classes) == ("folders", ("ant", "bee", "cat"))
    assert names_of(source) == ["ant/deep/er/a.webp", "ant/z.jpg", "bee/1.GIF", "cat/a.bmp", "cat/b.png"]
    assert [item.label for item in source.items] == [0, 0, 1, 2, 2]
    assert {item.role for item in source.items} == {None}


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    root = tree(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(5)])
    before, walk = open_source(root), os.walk

    def backwards(*arguments, **options):
        for parent, folders, files in walk(*arguments, **options):
            yield parent, folders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    assert open_source(root) == before


@pytest.mark.parametrize(("word", "role"), [("val", "val"), ("valid", "val"), ("validation", "val"), ("Test", "test")])
def test_split_folders_give_roles(tmp_path, word, role):
    source = open_source(tree(tmp_path, ["train/a/1.png", "train/b/1.png", f"{word}/a/1.png", f"{word}/b/1.png"]))
    assert {item.name: item.role for item in source.items}[f"{word}/a/1.png"] == role
    assert source.classes == ("a", "b")


def test_a_calibration_folder_is_accepted(tmp_path):
    source = open_source(
        tree(tmp_path, ["train/a/1.png", "train/b/1.png", "calibration/a/1.png", "calibration/b/1.png"])
    )
    assert sorted({item.role for item in source.items}) == ["calibration", "train"]


def test_a_class_may_be_called_test_or_train(tmp_path):
    assert open_source(tree(tmp_path / "1", ["control/1.png", "test/1.png"])).classes == ("control", "test")
    assert open_source(tree(tmp_path / "2", ["bus/1.png", "train/1.png"])).classes == ("bus", "train")


def test_what_is_no_image_by_name_is_left_and_counted(tmp_path):
    root = tree(tmp_path, ["a/1.png", "a/2.png", "b/1.png", "b/2.png", ".git/x/1.png", "__MACOSX/a/1.png"])
    for name in ("a/Thumbs.db", "a/notes.txt", "b/.hidden.png", "b/README"):
        (root / name).write_bytes(b"x")
    draw(root / "loose.png")
    source = open_source(root)
    assert len(source.items) == 4
    assert source.warnings[0].startswith("3 files in class folders are no images by their names")
    assert "1 x .txt, 1 x hidden, 1 x without suffix" in source.warnings[0]
    assert "1 images lie outside any class folder" in source.warnings[1] and "loose.png" in source.warnings[1]


def test_class_names_are_one_spelling(tmp_path):
    composed, decomposed = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    assert composed != decomposed
    root = tree(
        tmp_path, [f"train/{composed}/猫 1.png", "train/zoë/ß.png", f"test/{decomposed}/1.png", "test/zoë/1.png"]
    )
    source = open_source(root)
    assert source.classes == (composed, "zoë")
    assert all(read_bytes(item) for item in source.items)


def test_linked_folders_are_followed_once(tmp_path):
    tree(tmp_path / "elsewhere", ["a/1.png", "a/2.png"])
    root = tree(tmp_path / "root", ["b/1.png", "b/2.png"])
    (root / "a").symlink_to(tmp_path / "elsewhere" / "a")
    (root / "b" / "again").symlink_to(root / "b")  # a loop
    assert names_of(open_source(root)) == ["a/1.png", "a/2.png", "b/1.png", "b/2.png"]


def test_names_that_are_not_text_do_not_break_anything(tmp_path):
    root = tree(tmp_path, ["a/1.png", "b/1.png"])
    try:
        (root / "a" / "1.png").rename(root / "a" / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    item = open_source(root).items[0]
    assert item.name.encode() and read_bytes(item)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no images"),
        (["a/1.png"], "one class only"),
        (["1.png", "2.png"], "holds images directly, without class folders"),
        (["train/1.png", "test/1.png"], "holds images directly, without class folders"),
        (["val/a/1.png", "test/b/1.png"], "no `train` folder"),
        (
            ["train/rose/1.png", "train/lily/1.png", "test/rosa/1.png"],
            "'rosa' is in test but not in train. Nearest: rose",
        ),
        (["train/a/1.png", "train/b/1.png", "tests/a/1.png"], "'tests' is not the name of a split. Nearest: test"),
    ],
)
def test_folders_that_cannot_be_learned_from_say_why(tmp_path, names, message):
    with pytest.raises(DataError, match=message):
        open_source(tree(tmp_path, names))


def test_a_missing_folder_names_its_neighbour(tmp_path):
    (tmp_path / "flowers").mkdir()
    with pytest.raises(DataError, match=r"flwers does not exist\. Nearest: flowers"):
        open_source(tmp_path / "flwers")
    with pytest.raises(DataError, match=r"does not exist\. Check the path"):
        open_source(tmp_path / "no" / "such")


def test_absent_and_single_classes_are_warned_of(tmp_path):
    warnings = open_source(tree(tmp_path, ["train/a/1.png", "train/a/2.png", "train/b/1.png", "val/a/1.png"])).warnings
    assert "val has no image of 1 of 2 classes: b." in warnings
    assert "1 classes have a single image to learn from: b." in warnings


def table(root, text, name="labels.csv"):
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def test_a_table_lists_images_beside_it(tmp_path):
    tree(tmp_path, ["images/1.png", "images/2.png", "images/3.png"])
    rows = "\ufefflabel, Image ,split\nb,images/2.png,test\na,images\\1.png,train\n"
    rows += "b,images/3.png,train\na,images/gone.png,valid\n\n"
    for root in (table(tmp_path, rows), tmp_path):  # the file, or the folder that holds it
        source = open_source(root)
        assert (source.kind, source.classes) == ("table", ("a", "b"))
        assert names_of(source) == ["images/1.png", "images/2.png", "images/3.png", "images/gone.png"]
        assert [item.role for item in source.items] == ["train", "test", "train", "val"]
        assert read_bytes(source.items[0]) == (tmp_path / "images/1.png").read_bytes()
        with pytest.raises(OSError, match="gone"):
            read_bytes(source.items[3])


def test_a_tab_separated_table_without_splits_has_no_roles(tmp_path):
    tree(tmp_path, ["a, b.png", "2.png"])
    source = open_source(table(tmp_path, 'image\tlabel\tsplit\n"a, b.png"\tx\t\n2.png\ty\t\n', "t.tsv"))
    assert names_of(source) == ["2.png", "a, b.png"]
    assert {item.role for item in source.items} == {None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imag,label\n1.png,a\n", "no column `image`; it has imag, label. Nearest: imag."),
        ("image,kind\n1.png,a\n", "no column `label`; it has image, kind"),
        ("", "no column `image`; it has none"),
        ("image,label\n", "holds no images"),
        ("image,label\n1.png,a\n2.png,\n,b\n", "2 rows lack an image or a label \\(lines 3, 4\\)"),
        (
            "image,label,split\n1.png,a,trian\n2.png,b,test\n",
            "line 2: 'trian' is not the name of a split. Nearest: train",
        ),
        ("image,label,split\n1.png,a,train\n2.png,b,\n", "line 3: '' is not the name of a split"),
        ("image,label,split\n1.png,a,val\n2.png,b,test\n", "no train to learn from"),
    ],
)
def test_tables_that_cannot_be_read_say_why(tmp_path, text, message):
    tree(tmp_path, ["1.png", "2.png"])
    with pytest.raises(DataError, match=message):
        open_source(table(tmp_path, text))


def test_a_table_in_another_encoding_says_so(tmp_path):
    (tmp_path / "t.csv").write_bytes("image,label\n1.png,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        open_source(tmp_path)


def test_class_folders_win_over_a_table_beside_them_and_say_so(tmp_path):
    table(tree(tmp_path, ["a/1.png", "b/1.png"]), "image,label\na/1.png,x\n")
    source = open_source(tmp_path)
    assert source.kind == "folders"
    assert "labels.csv lies beside class folders and was not read" in source.warnings[0]


def test_two_tables_are_ambiguous(tmp_path):
    table(tmp_path, "image,label\n")
    table(tmp_path, "image,label\n", "other.csv")
    with pytest.raises(DataError, match="holds 2 tables"):
        open_source(tmp_path)


def shard(path, labels, names=("zebra", "ant"), start=0, row_group_size=4, image_column="image"):
    rows = []
    for i in range(len(labels)):
        file = draw(path.parent.parent / "drawn.png", start + i)
        rows.append({"bytes": file.read_bytes(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    built = pa.table({image_column: pa.array(rows, kind), "label": pa.array(labels, pa.int64())})
    if names:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}}
        built = built.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(built, path, row_group_size=row_group_size)


@pytest.fixture
def shards(tmp_path):
    root = tmp_path / "set"
    shard(root / "train-00000-of-00002.parquet", [0, 1] * 6)
    shard(root / "train-00001-of-00002.parquet", [1, 0, 1], start=100)
    shard(root / "validation-00000-of-00001.parquet", [0, 1], start=200)
    return root


def test_shards_have_sorted_names_and_rows_in_order(shards):
    source = open_source(shards)
    assert (source.kind, source.classes) == ("parquet", ("ant", "zebra"))
    assert names_of(source)[:12] == [f"train-00000-of-00002.parquet#{row}" for row in range(12)]
    assert [item.label for item in source.items[:4]] == [1, 0, 1, 0]  # stored 0 is zebra, the last by name
    assert [item.role for item in source.items[-3:]] == ["train", "val", "val"]


def test_rows_are_read_in_any_order(shards):
    items = open_source(shards).items
    shades = [*range(12), *range(100, 103), *range(200, 202)]
    for i in np.random.default_rng(0).permutation(len(items)):
        pixels, _ = decode(read_bytes(items[i]), shorter_pixels=None, interpolation="bilinear")
        assert pixels[0, 0].tolist() == [shades[i], 0, 0]


def test_rows_stay_right_when_little_is_kept(shards, monkeypatch):
    monkeypatch.setattr(shards_module, "_row_groups", {})
    monkeypatch.setattr(shards_module, "ROW_GROUP_CACHE_BYTES", 1)
    items = open_source(shards).items
    first = [read_bytes(item) for item in items]
    assert [read_bytes(item) for item in reversed(items)] == first[::-1]
    assert len(shards_module._row_groups) == 1


def test_what_is_kept_stays_below_the_bound(shards, monkeypatch):
    monkeypatch.setattr(shards_module, "_row_groups", {})
    monkeypatch.setattr(shards_module, "ROW_GROUP_CACHE_BYTES", 900)
    for item in open_source(shards).items:
        read_bytes(item)
        assert sum(column.nbytes for column in shards_module._row_groups.values()) <= 900
    assert len(shards_module._row_groups) > 1


def test_a_shard_written_anew_is_read_anew(shards):
    path = shards / "train-00001-of-00002.parquet"
    item = next(i for i in open_source(shards).items if i.file == path)
    before = read_bytes(item)
    shard(path, [1, 0, 1, 1], start=150)
    assert read_bytes(item) != before


def test_rows_are_read_after_a_fork(shards):
    item = open_source(shards).items[5]
    expected, (reader, writer) = read_bytes(item), os.pipe()
    shards_module._row_groups.clear()  # the child must read for itself
    if (child := os.fork()) == 0:
        os.write(writer, read_bytes(item))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reader, 100_000) == expected


def test_shards_in_a_data_folder_and_a_single_shard_are_found(shards):
    shards.rename(shards.parent / "data")
    source = open_source(shards.parent)
    assert source.items[0].name == "data/train-00000-of-00002.parquet#0"
    shard(shards.parent / "x" / "all.parquet", [0, 1, 0])
    assert {item.role for item in open_source(shards.parent / "x" / "all.parquet").items} == {None}


def test_without_stored_names_the_numbers_are_the_names(tmp_path):
    shard(tmp_path / "s" / "train-0.parquet", [7, 3, 7], names=None)
    assert open_source(tmp_path / "s").classes == ("3", "7")


def test_shards_that_cannot_be_learned_from_say_why(tmp_path):
    shard(tmp_path / "a" / "train-0.parquet", [0, 1, -1])
    with pytest.raises(DataError, match=r"1 rows have no label in \[0, 2\); the first is row 2"):
        open_source(tmp_path / "a")
    shard(tmp_path / "c" / "train-0.parquet", [0, 1])
    shard(tmp_path / "c" / "trial-0.parquet", [0, 1])
    with pytest.raises(DataError, match="'trial' is not the name of a split"):
        open_source(tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train-0.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="no parquet file we can read"):
        open_source(tmp_path / "d")


def test_a_row_that_is_not_there_is_an_os_error(shards):
    path = shards / "train-00001-of-00002.parquet"
    for file, row in [(path, 99), (shards / "gone.parquet", 0)]:
        with pytest.raises(OSError, match="parquet"):
            read_bytes(Item(name="x", label=0, role=None, file=file, row=row))


@pytest.mark.shared
def test_the_shared_sets_open(shared):
    sizes = {"ants_bees": (396, 2), "flowers5": (3670, 5), "sign_digits": (2062, 10), "cifar10_20k": (22000, 10)}
    for name, (images, classes) in sizes.items():
        source = open_source(shared / "data" / name)
        assert (len(source.items), len(source.classes)) == (images, classes)


def test_many_threads_read_right_while_groups_come_and_go(shards, monkeypatch):
    monkeypatch.setattr(shards_module, "_row_groups", {})
    monkeypatch.setattr(shards_module, "ROW_GROUP_CACHE_BYTES", 900)
    items = open_source(shards).items
    once = [read_bytes(item) for item in items]
    order = np.random.default_rng(0).integers(0, len(items), 3000)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: read_bytes(items[i]), order)) == [once[i] for i in order]
