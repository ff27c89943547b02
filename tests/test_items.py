"""The list of images as columns: the same items as before, in little memory."""

from pathlib import Path

import pytest

from finetune.data.items import Found, Item, Items


def made(found):
    items = Items(found)
    items.number_classes({name: number for number, name in enumerate(sorted(set(items.class_names)))})
    return items


def test_items_come_back_as_they_went_in_sorted_by_name():
    root = Path("/data/birds")
    found = [
        Found("b/é 2.png", "wren", "test", root / "b" / "é 2.png"),
        Found("a/1.png", "tit", "train", root / "a" / "1.png"),
        Found("loose.png", "tit", None, Path("loose.png")),
    ]
    assert list(made(found)) == [
        Item(name="a/1.png", label=0, role="train", file=root / "a" / "1.png"),
        Item(name="b/é 2.png", label=1, role="test", file=root / "b" / "é 2.png"),
        Item(name="loose.png", label=0, role=None, file=Path("loose.png")),
    ]
    items = made(found)
    assert items.labels.tolist() == [0, 1, 0]
    assert items.counts() == {"all": {"tit": 1}, "train": {"tit": 1}, "test": {"wren": 1}}


def test_a_file_name_that_is_no_text_is_found_again():
    file = Path("/data/b\udce9.png")  # a byte that is no UTF-8, as the system hands it on
    (item,) = made([Found("b?.png", "a", None, file)])
    assert item.file == file


def test_rows_of_a_shard_are_in_their_order_and_not_in_that_of_their_digits():
    shard = Path("train.parquet")
    items = made([Found(f"train.parquet#{row}", "a", "train", shard, row) for row in (10, 9, 100, 0)])
    assert [item.row for item in items] == [0, 9, 10, 100]
    assert items[1] == Item(name="train.parquet#9", label=0, role="train", file=shard, row=9)


def test_places_are_those_of_a_list():
    items = made([Found(f"{n}.png", "ab"[n % 2], None, Path(f"{n}.png")) for n in range(5)])
    assert [item.name for item in items[1:4:2]] == ["1.png", "3.png"]
    assert items[-1] == items[4]
    assert [item.name for item in items[-2:]] == ["3.png", "4.png"]
    for place in (5, -6):
        with pytest.raises(IndexError, match="there are 5 items"):
            items[place]
    assert items == made(reversed([Found(f"{n}.png", "ab"[n % 2], None, Path(f"{n}.png")) for n in range(5)]))
    assert items != made([Found("0.png", "a", None, Path("0.png"))])


def test_a_hundred_thousand_items_cost_little_memory():
    names = (f"class-{n % 50:02d}/image-{n:07d}.png" for n in range(100_000))
    items = Items(Found(name, name[:8], "train", Path("/data/images") / name) for name in names)
    assert len(items) == 100_000
    assert items.num_bytes < 10e6  # as objects they would take six times as much
    held = [value for value in vars(items).values() if isinstance(value, list | tuple | dict)]
    assert max(map(len, held)) <= 50  # folders and classes; nothing else has an entry per image
