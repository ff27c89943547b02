"""Parquet shards in the layouts and with the columns that the hub has: read, or refused in words."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from finetune.data.sources import open_source, read_bytes
from finetune.errors import DataError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(shade):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def structs(count, key="bytes"):
    return pa.array([{"bytes": None, "path": "x.png"} | {key: png(i)} for i in range(count)], STRUCT)


def write(path, columns, names=None):
    """A shard; `names` are the class names that its schema stores, by column."""
    built = pa.table(columns)
    features = {column: {"names": list(own), "_type": "ClassLabel"} for column, own in (names or {}).items()}
    meta = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(built.replace_schema_metadata(meta), path)
    return path


def plain(path, labels=(0, 1, 0), column="label"):
    return write(path, {"image": structs(len(labels)), column: pa.array(labels, pa.int64())}, {column: ("cat", "dog")})


def told(source):
    return "\n".join(source.warnings)


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("train/part-0.snappy.parquet", "test/part-0.snappy.parquet"),
        ("x/train_0.parquet", "x/test.parquet"),
    ],
)
def test_shards_are_found_where_the_hub_puts_them_with_their_split(tmp_path, names):
    for name in names:
        plain(tmp_path / name)
    source = open_source(tmp_path)
    assert (source.kind, source.classes, len(source.items)) == ("parquet", ("cat", "dog"), 6)
    assert {item.role for item in source.items} == {"train", "test"}
    assert all(item.role == ("train" if "train" in item.name else "test") for item in source.items)


def test_numbered_shards_have_no_role_and_a_stranger_among_named_ones_is_refused(tmp_path):
    for number in range(2):
        plain(tmp_path / "a" / f"part-0000{number}.parquet")
    assert {item.role for item in open_source(tmp_path / "a").items} == {None}
    plain(tmp_path / "a" / "train.parquet")
    with pytest.raises(DataError, match="'part' is not the name of a split"):
        open_source(tmp_path / "a")


def test_two_sets_of_shards_are_asked_about(tmp_path):
    plain(tmp_path / "full" / "train.parquet")
    plain(tmp_path / "small" / "train.parquet")
    with pytest.raises(DataError, match=r"2 folders of parquet shards \(full, small\)"):
        open_source(tmp_path)


def test_the_recipe_says_what_the_words_of_shards_mean(tmp_path):
    for word in ("fit", "held"):
        plain(tmp_path / f"{word}-0.parquet")
    source = open_source(tmp_path, {"train": ["fit"], "test": ["held"]})
    assert {item.role for item in source.items} == {"train", "test"}


def test_columns_of_other_names_are_taken_and_said_and_the_others_named(tmp_path):
    columns = {"img": structs(3), "labels": pa.array([0, 1, 0]), "caption": pa.array(["x"] * 3)}
    source = open_source(write(tmp_path / "train.parquet", columns, {"labels": ("cat", "dog")}))
    assert source.classes == ("cat", "dog")
    assert "image from column `img`, label from column `labels`" in told(source)
    assert "column `caption` of the parquet shards is not used." in source.warnings


def test_images_may_be_plain_bytes_and_any_name_will_do_for_the_only_column_of_them(tmp_path):
    columns = {"label": pa.array(["b", "a", "b"]), "jpg": pa.array([png(7), png(8), png(9)])}
    items = open_source(write(tmp_path / "all.parquet", columns)).items
    assert [item.label for item in items] == [1, 0, 1]
    assert [read_bytes(item) for item in items] == [png(7), png(8), png(9)]


def test_of_two_columns_of_images_the_recipes_is_read(tmp_path):
    columns = {"image": structs(2), "photo": pa.array([png(7), png(8)]), "label": pa.array(["b", "a"])}
    table = write(tmp_path / "all.parquet", columns)
    assert read_bytes(open_source(table).items[1]) == png(1)
    assert "column `photo` of the parquet shards is not used." in open_source(table).warnings
    assert read_bytes(open_source(table, columns={"image": "photo"}).items[1]) == png(8)


def test_fine_and_coarse_labels_are_asked_about(tmp_path):
    columns = {"img": structs(2), "fine_label": pa.array([0, 1]), "coarse_label": pa.array([1, 0])}
    names = {"fine_label": ("cat", "dog"), "coarse_label": ("pet", "toy")}
    table = write(tmp_path / "train.parquet", columns, names)
    with pytest.raises(
        DataError, match=r"`fine_label` and `coarse_label` could each be the label.*data\.columns\.label"
    ):
        open_source(table)
    assert open_source(table, columns={"label": "coarse_label"}).classes == ("pet", "toy")


def test_test_shards_without_labels_are_left_out_aloud(tmp_path):
    plain(tmp_path / "train.parquet")
    plain(tmp_path / "test.parquet", (-1, -1))
    source = open_source(tmp_path)
    assert len(source.items) == 3 and "2 test rows have no label and are not used" in told(source)
    plain(tmp_path / "validation.parquet", (0, None))
    with pytest.raises(DataError, match=r"validation.parquet: 1 rows have no label in \[0, 2\); the first is row 1"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": pa.array(["a.png", "b.png"]), "label": [0, 1]},
            r"column `image` is string and holds no image files",
        ),
        ({"image": pa.array([{"path": "a.png"}] * 2), "label": [0, 1]}, r"holds no image files.*write a table \(CSV\)"),
        ({"image": structs(2), "label": [[0], [0, 1]]}, r"column `label` holds lists, several labels.*multi-label"),
        ({"image": structs(2), "label": [{"a": 1}] * 2}, r"column `label` is struct<.*a label is a number or a text"),
        ({"image": structs(2), "kind": [0, 1]}, r"no column `label`; it has kind.*data\.columns\.label=kind"),
        ({"image": structs(2)}, r"no column `label`; it has none"),
        ({"image": structs(3), "label": ["a", "b", "a|b"]}, r"1 rows hold several labels in one cell, such as 'a\|b'"),
        ({"image": structs(20), "label": [i / 7 for i in range(20)]}, r"20 different numbers .* measured quantity"),
    ],
)
def test_what_is_not_one_image_and_one_class_in_a_row_is_refused_in_words(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        open_source(write(tmp_path / "train.parquet", {name: pa.array(own) for name, own in columns.items()}))


def test_a_column_names_the_split_where_the_shards_names_do_not(tmp_path):
    columns = {"image": structs(4), "label": pa.array(["a", "b", "a", "b"])}
    table = write(
        tmp_path / "a" / "all.parquet", columns | {"subset": pa.array(["training", "training", "dev", "test"])}
    )
    source = open_source(table)
    assert [item.role for item in source.items] == ["train", "train", "val", "test"]
    assert "the split is that of column `subset`" in told(source) and "not used" not in told(source)
    table = write(tmp_path / "b" / "all.parquet", columns | {"is_valid": pa.array([False, False, True, True])})
    assert [item.role for item in open_source(table).items] == ["train", "train", "val", "val"]
    table = write(tmp_path / "c" / "all.parquet", columns | {"fold": pa.array([0, 0, 1, 2])})
    source = open_source(table)
    assert {item.role for item in source.items} == {None} and told(source).count("`fold`") == 1
    source = open_source(table, {"val": ("1",), "train": ("0",)}, {"split": "fold"})
    assert [item.role for item in source.items] == ["train", "train", "val"] and "1 rows are not used" in told(source)


def test_the_split_of_shards_names_is_not_overruled_in_silence(tmp_path):
    plain(tmp_path / "train.parquet")
    plain(tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"data\.columns\.split=fold: the shards' names say the split already"):
        open_source(tmp_path, columns={"split": "fold"})
    assert {item.role for item in open_source(tmp_path, {}).items} == {None}


def test_a_number_that_is_no_class_is_refused_in_the_test_part_too(tmp_path):
    plain(tmp_path / "train.parquet")
    plain(tmp_path / "test.parquet", (0, 7))
    with pytest.raises(DataError, match=r"1 labels are no number in \[0, 2\), such as 7"):
        open_source(tmp_path)
