"""Tables as people have them: separators, columns, splits, paths and labels are understood, or refused in words."""

import json

import pytest
from PIL import Image

from finetune.data.sources import open_source
from finetune.errors import DataError

PLAIN = [("cat_0", "cat"), ("cat_1", "cat"), ("cat_2", "cat"), ("dog_0", "dog"), ("dog_1", "dog"), ("dog_2", "dog")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with six images in `pics`, that is not where the process runs."""
    root = tmp_path / "set"
    for name, _ in PLAIN:
        draw(root / "pics" / f"{name}.jpg")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return root


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4)).save(path)


def write(root, text, name="t.csv", encoding="utf-8"):
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(text.encode(encoding))
    return root / name


def lines(header, rows=PLAIN, cell="pics/{}.jpg", separator=","):
    """A table with a row for each image; more cells than an image and a label are taken from the row."""
    rows = [[cell.format(name), *map(str, more)] for name, *more in rows]
    return "".join(separator.join(row) + "\n" for row in [header, *rows])


def told(source):
    return "\n".join(source.warnings)


def roles(source):
    return {item.name.rpartition("/")[2]: item.role for item in source.items}


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_the_separator_is_read_off_the_lines(here, separator, suffix):
    text = lines(["image", "label", "note"], [(*row, '"a,b;c|d"') for row in PLAIN], separator=separator)
    source = open_source(write(here, text, f"t.{suffix}"))
    assert source.classes == ("cat", "dog") and len(source.items) == 6
    assert source.warnings == ("column `note` is not used.",)


def test_a_spreadsheets_word_on_its_separator_is_no_header(here):
    assert len(open_source(write(here, "sep=;\n" + lines(["image", "label"], separator=";"))).items) == 6


def test_a_byte_order_mark_blanks_and_empty_lines_do_not_matter(here):
    text = "\n" + lines([" Image ", " label"]).replace(",", " , ") + "\n,\n"
    source = open_source(write(here, text, encoding="utf-8-sig"))
    assert source.classes == ("cat", "dog") and len(source.items) == 6 and not source.warnings


def test_another_encoding_is_told_with_the_line_and_the_mend(here):
    rows = [*PLAIN[:3], ("dog_0", "caf\u00e9")]
    with pytest.raises(DataError, match=r"t.csv, line 5: byte 0xe9 .*caf.* is no UTF-8\. Save the table as UTF-8"):
        open_source(write(here, lines(["image", "label"], rows), encoding="latin-1"))
    with pytest.raises(DataError, match=r"line 2: byte .* is no UTF-8\. Save the table as UTF-8"):
        open_source(write(here, lines(["image", "label"], [("cat_0", "\u72d7")]), encoding="gbk"))
    with pytest.raises(DataError, match=r"is UTF-16 text.* Save the table as UTF-8"):
        open_source(write(here, lines(["image", "label"]), encoding="utf-16"))


def test_a_table_without_a_header_is_called_so(here):
    with pytest.raises(DataError, match=r"no header: its first line names the image 'pics/cat_0.jpg'.* image,label\."):
        open_source(write(here, lines(["pics/cat_0.jpg", "cat"], PLAIN[1:])))
    (here / "dog_9").write_bytes((here / "pics" / "dog_0.jpg").read_bytes())
    with pytest.raises(DataError, match=r"no header: its first line names the image 'dog_9'.* label,image\."):
        open_source(write(here, "dog,dog_9\ncat,cat_8\n"))


def test_a_quote_that_is_never_closed_does_not_swallow_rows(here):
    with pytest.raises(DataError, match="a quote is opened but not closed"):
        open_source(write(here, lines(["image", "label"]).replace("pics/cat_1.jpg,cat", 'pics/cat_1.jpg,"cat')))


def test_rows_longer_than_the_header_are_refused(here):
    text = lines(["image", "label"]).replace("pics/dog_0.jpg,dog", "pics/dog_0.jpg,dog, brown")
    with pytest.raises(DataError, match=r"1 rows have more cells than the header \(lines 5\)"):
        open_source(write(here, text))


@pytest.mark.parametrize(
    ("image", "label"),
    [("file_name", "label"), ("id", "breed"), ("Image ID", "diagnosis"), ("filepath", "Class"), ("img", "target")],
)
def test_well_known_names_of_columns_are_taken_and_said(here, image, label):
    source = open_source(write(here, lines([image, label])))
    assert source.classes == ("cat", "dog")
    assert f"image from column `{image}`, label from column `{label}`" in told(source)


def test_the_plainer_name_wins_and_the_other_is_named(here):
    rows = [(name, number, label) for number, (name, label) in enumerate(PLAIN)]
    source = open_source(write(here, lines(["filename", "id", "species"], rows)))
    assert "image from column `filename`, label from column `species`" in told(source)
    assert "column `id` is not used." in source.warnings


def test_two_columns_that_could_be_the_label_are_asked_about(here):
    table = write(here, lines(["image", "species", "breed"], [(*row, row[1]) for row in PLAIN]))
    with pytest.raises(DataError, match=r"columns `species` and `breed` could each be the label.*data\.columns\.label"):
        open_source(table)
    assert open_source(table, columns={"label": "breed"}).classes == ("cat", "dog")


def test_the_recipes_columns_are_found_or_their_neighbours_told(here):
    table = write(here, lines(["which", "weather"]))
    with pytest.raises(DataError, match=r"no column `image`; it has which, weather.*data\.columns\.image="):
        open_source(table)
    assert open_source(table, columns={"image": "Which", "label": "weather"}).classes == ("cat", "dog")
    with pytest.raises(DataError, match=r"data\.columns\.label: there is no column 'wether'\. Nearest: weather"):
        open_source(table, columns={"image": "which", "label": "wether"})


def test_columns_not_used_have_a_line_each_and_many_share_one(here):
    names = [f"c{number}" for number in range(11)]
    source = open_source(write(here, lines(["image", "label", *names], [(*row, *names) for row in PLAIN])))
    assert "column `c0` is not used." in source.warnings
    assert source.warnings[-1] == "3 more columns are not used: `c8`, `c9`, `c10`."


def test_the_index_column_of_pandas_is_named(here):
    rows = [f"{number},pics/{name}.jpg,{label}\n" for number, (name, label) in enumerate(PLAIN)]
    for header, said in ((",image,label\n", "column 1 (without a name)"), ("Unnamed: 0,image,label\n", "`Unnamed: 0`")):
        source = open_source(write(here, header + "".join(rows)))
        assert len(source.items) == 6 and said in told(source)


@pytest.mark.parametrize("cell", ["{}", "{}.jpg", "pics/{}", "C:\\data\\{}.jpg", "pics\\{}.jpg", "/old/pics/{}.jpg"])
def test_paths_are_found_without_suffix_beside_the_table_and_by_their_tail(here, cell):
    source = open_source(write(here, lines(["image", "label"], cell=cell)))
    assert all(item.file == here / "pics" / item.file.name and item.file.is_file() for item in source.items)
    assert ("images were found by reading" in told(source)) == (cell != "pics\\{}.jpg")


def test_absolute_paths_and_those_of_the_working_folder_are_read(here, monkeypatch):
    assert not open_source(write(here, lines(["image", "label"], cell=f"{here}/pics/{{}}.jpg"))).warnings
    away = here.parent / "lists"
    assert len(open_source(write(away, lines(["image", "label"], cell="../set/pics/{}.jpg"))).items) == 6
    monkeypatch.chdir(here)
    source = open_source(write(away / "deep" / "er", lines(["image", "label"])))
    assert source.items[0].file.is_file() and "images were found by reading" in told(source)


def test_images_in_a_folder_for_each_class_are_found_by_their_label(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for label in ("cat", "dog"):
        for number in range(3):
            draw(tmp_path / "set" / "train" / label / f"{number}.png")
    rows = [(str(number), label) for label in ("cat", "dog") for number in range(3)]
    source = open_source(write(tmp_path / "set", lines(["image", "label"], rows, cell="{}.png"), "train.csv"))
    assert [item.file.parent.name for item in source.items] == ["cat"] * 3 + ["dog"] * 3
    assert len({item.file for item in source.items}) == 6


def test_a_name_that_lies_in_two_folders_is_asked_about(here):
    for name, _ in PLAIN:
        draw(here / "masks" / f"{name}.jpg")
    with pytest.raises(DataError, match=r"'cat_0.jpg' may be .*masks/cat_0.jpg, .*pics/cat_0.jpg"):
        open_source(write(here, lines(["image", "label"], cell="{}.jpg")))


def test_two_parts_of_one_set_are_both_searched(here):
    (here / "part2").mkdir()
    for name, _ in PLAIN[::2]:
        (here / "pics" / f"{name}.jpg").rename(here / "part2" / f"{name}.jpg")
    source = open_source(write(here, lines(["image", "label"], cell="{}")))
    assert all(item.file.is_file() for item in source.items)


def test_missing_images_are_named_and_no_other_of_their_name_is_taken(here):
    draw(here / "cat_2.jpg")
    (here / "pics" / "cat_2.jpg").unlink()
    source = open_source(write(here, lines(["image", "label"])))
    assert "1 of the images it lists are not there: pics/cat_2.jpg." in told(source)
    assert next(item for item in source.items if "cat_2" in item.name).file == here / "pics" / "cat_2.jpg"


def test_where_no_image_is_found_the_paths_that_were_tried_are_told(here):
    with pytest.raises(DataError, match=r"no image .* was found\. For 'D:/x/bird_0' in line 2 .*set/x/bird_0.*suffix"):
        open_source(write(here, lines(["image", "label"], [("bird_0", "a"), ("bird_1", "b")], cell="D:/x/{}")))
    with pytest.raises(DataError, match=r"is an address\. Download"):
        open_source(write(here, lines(["image", "label"], [("a", "x"), ("b", "y")], cell="https://example.org/{}.jpg")))


def test_repeated_rows_are_said_and_two_labels_of_one_image_refused(here):
    source = open_source(write(here, lines(["image", "label"], [*PLAIN, ("cat_0", "cat")])))
    assert "1 rows name, with the same label, an image of another row: pics/cat_0.jpg." in told(source)
    with pytest.raises(DataError, match=r"1 images are listed with several labels: pics/cat_0.jpg\..*multi-label"):
        open_source(write(here, lines(["image", "label"], [*PLAIN, ("cat_0", "dog")])))


def test_a_yes_or_no_column_is_the_users_split(here):
    rows = [(*row, row[0].endswith("1"), int(row[0].endswith("2"))) for row in PLAIN]
    source = open_source(write(here, lines(["image", "label", "is_valid", "is_test"], rows)))
    assert roles(source) == {f"{n}.jpg": {"0": "train", "1": "val", "2": "test"}[n[-1]] for n, _ in PLAIN}
    assert "split is that of column `is_valid` (val where it says yes)" in told(source)
    rows = [(*row, "no" if row[0].endswith("1") else "yes") for row in PLAIN]
    source = open_source(write(here, lines(["image", "label", "is_train"], rows)))
    assert roles(source)["cat_1.jpg"] == "test" and "train where it says yes, test where it says no" in told(source)


def test_a_column_valid_may_mean_quality_and_is_asked_about(here):
    table = write(here, lines(["image", "label", "valid"], [(*row, row[0].endswith("1")) for row in PLAIN]))
    source = open_source(table)
    assert set(roles(source).values()) == {None}
    assert "column `valid` (False, True) is not used" in told(source) and "data.columns.split=valid." in told(source)
    assert roles(open_source(table, columns={"split": "valid"}))["cat_1.jpg"] == "val"


@pytest.mark.parametrize("name", ["set", "subset", "Partition", "phase", "cv_part"])
def test_a_column_of_words_for_splits_is_the_users_split_by_any_name(here, name):
    word = {"0": "Training", "1": "dev", "2": "test"}
    source = open_source(write(here, lines(["image", "label", name], [(*row, word[row[0][-1]]) for row in PLAIN])))
    assert roles(source)["cat_1.jpg"] == "val" and roles(source)["dog_2.jpg"] == "test"
    assert f"the split is that of column `{name}` (train: Training; val: dev; test: test)" in told(source)


def test_folds_are_not_guessed_but_used_where_the_recipe_says_how(here):
    table = write(here, lines(["image", "label", "fold"], [(*row, f"{row[0][-1]}.0") for row in PLAIN]))
    source = open_source(table)
    assert set(roles(source).values()) == {None}
    assert "column `fold` (0.0, 1.0, 2.0) is not used" in told(source) and "data.columns.split=fold" in told(source)
    source = open_source(table, {"val": ["0"]}, {"split": "fold"})
    assert roles(source)["cat_0.jpg"] == "val" and roles(source)["cat_1.jpg"] == "train"
    source = open_source(table, {"val": ["0"], "train": ["2"]}, {"split": "fold"})
    assert len(source.items) == 4 and "2 rows are not used, for data.splits does not name" in told(source)
    with pytest.raises(DataError, match=r"column `fold` holds no '9'\. It holds 0\.0, 1\.0, 2\.0"):
        open_source(table, {"val": ["9"]}, {"split": "fold"})


def test_a_split_column_may_be_left_unused_by_the_recipe(here):
    rows = [(*row, "train" if row[0][-1] != "1" else "A") for row in PLAIN]
    table = write(here, lines(["image", "label", "split"], rows))
    with pytest.raises(DataError, match=r"'A' is not the name of a split.*data\.columns\.split=none"):
        open_source(table)
    source = open_source(table, columns={"split": "none"})
    assert set(roles(source).values()) == {None} and "column `split` is not used." in source.warnings
    assert roles(open_source(table, {"test": ["A"]}))["cat_1.jpg"] == "test"
    with pytest.raises(DataError, match=r"data\.splits names A, but no column is known as the split"):
        open_source(write(here, lines(["image", "label"])), {"test": ["A"]})


def test_one_table_for_each_split(here):
    for number, name in enumerate(("train", "valid", "test_labels")):
        write(here / "lists", lines(["image", "label"], PLAIN[number::3], cell="../pics/{}.jpg"), f"{name}.csv")
    source = open_source(here / "lists")
    assert roles(source)["cat_0.jpg"] == "train" and roles(source)["dog_1.jpg"] == "val"
    assert roles(source)["cat_2.jpg"] == "test" and len(source.items) == 6
    splits = {"train": ["train"], "val": ["test_labels"]}
    source = open_source(here / "lists", splits)
    assert roles(source)["cat_2.jpg"] == "val" and len(source.items) == 4
    assert "valid.csv is not used: data.splits does not name it." in source.warnings


def test_the_tables_of_a_competition_are_told_apart(here):
    write(here, lines(["id", "breed"], cell="{}"), "train.csv")
    write(here, lines(["id"], [(name,) for name, _ in PLAIN], cell="{}"), "test.csv")
    write(here, lines(["id", "breed"], cell="{}"), "sample_submission.csv")
    source = open_source(here)
    assert len(source.items) == 6 and set(roles(source).values()) == {"train"}
    assert "test.csv is not used: it has no column that is known as the label; `finetune predict`" in told(source)
    assert "sample_submission.csv is not used" in told(source)


def test_two_tables_that_may_both_be_meant_are_asked_about(here):
    write(here, lines(["image", "label"]), "a.csv")
    write(here, lines(["image", "label"]), "train.csv")
    with pytest.raises(DataError, match=r"2 tables that may list the images \(a.csv, train.csv\), and a.csv is not"):
        open_source(here)


def test_the_hubs_metadata_beside_images_in_split_folders(tmp_path):
    for role, numbers in (("train", "01"), ("test", "2")):
        rows = [row for row in PLAIN if row[0][-1] in numbers]
        for name, _ in rows:
            draw(tmp_path / role / f"{name}.jpg")
        write(tmp_path / role, lines(["file_name", "label"], rows, cell="{}.jpg"), "metadata.csv")
    source = open_source(tmp_path)
    assert roles(source)["cat_2.jpg"] == "test" and roles(source)["cat_0.jpg"] == "train" and len(source.items) == 6


def test_json_lines_are_read(here):
    rows = [json.dumps({"file_name": f"pics/{name}.jpg", "label": label, "text": "x"}) for name, label in PLAIN]
    source = open_source(write(here, "\n".join(rows), "metadata.jsonl"))
    assert source.classes == ("cat", "dog") and "column `text` is not used." in source.warnings
    with pytest.raises(DataError, match=r"line 2: this is no JSON"):
        open_source(write(here, rows[0] + "\n{broken\n", "metadata.jsonl"))


def test_rows_without_a_label_are_refused_unless_they_are_of_the_test_part(here):
    rows = [(*row, "test" if row[0][-1] == "2" else "train") for row in PLAIN]
    gone = [(n, "NaN" if n == "cat_2" else "" if n == "dog_2" else label, split) for n, label, split in rows]
    source = open_source(write(here, lines(["image", "label", "split"], gone)))
    assert "2 test rows have no label and are not used (lines 4, 7)" in told(source) and len(source.items) == 4
    gone = [(n, "nan" if n == "cat_1" else label, split) for n, label, split in rows]
    with pytest.raises(DataError, match=r"1 rows lack an image or a label \(lines 3\)"):
        open_source(write(here, lines(["image", "label", "split"], gone)))


def test_several_labels_in_a_cell_are_refused_in_words(here):
    for cell in ("cat dog", "cat|dog", "cat;dog", '"cat,dog"', "\"['cat', 'dog']\"", "cat&dog"):
        rows = [*PLAIN[1:], (PLAIN[0][0], cell)]
        with pytest.raises(DataError, match=r"1 rows hold several labels in one cell.*multi-label"):
            open_source(write(here, lines(["image", "label"], rows)))
    rows = [(name, label) for (name, _), label in zip(PLAIN, ["a|b", "b|c", "c|a"] * 2, strict=True)]
    with pytest.raises(DataError, match="6 rows hold several labels"):
        open_source(write(here, lines(["image", "label"], rows)))


def test_labels_of_two_words_are_no_two_labels(here):
    rows = [(name, label) for (name, _), label in zip(PLAIN, ["apple", "pie", "apple pie"] * 2, strict=True)]
    assert open_source(write(here, lines(["image", "label"], rows))).classes == ("apple", "apple pie", "pie")
    rows = [(name, f"{label}, domestic") for name, label in PLAIN]
    text = lines(["image", "label"], [(name, f'"{label}"') for name, label in rows])
    assert open_source(write(here, text)).classes == ("cat, domestic", "dog, domestic")


def test_one_hot_columns_are_called_so(here):
    rows = [(name, int(label == "cat"), f"{float(label == 'dog')}") for name, label in PLAIN]
    with pytest.raises(DataError, match=r"2 columns hold only 0 and 1 \(cat, dog\): labels as one-hot.*multi-label"):
        open_source(write(here, lines(["image", "cat", "dog"], rows)))


def test_measured_values_and_a_label_for_each_row_are_refused(here):
    many = [(f"x{number}", f"{number / 7:.3f}", f"name {number}") for number in range(12)]
    for name, *_ in many:
        draw(here / "pics" / f"{name}.jpg")
    table = write(here, lines(["image", "price", "title"], many))
    with pytest.raises(DataError, match=r"12 different numbers in 12 rows.*measured quantity.*no regression"):
        open_source(table, columns={"label": "price"})
    with pytest.raises(DataError, match=r"nearly every row has a label of its own \(12 labels in 12 rows"):
        open_source(table, columns={"label": "title"})
    ratings = [(name, f"{number % 4 / 2}", "") for number, (name, *_) in enumerate(many)]
    assert len(open_source(write(here, lines(["image", "label", "x"], ratings))).classes) == 4


@pytest.mark.parametrize("other", ["Cat", "CAT", "c\uff41t"])
def test_labels_spelt_nearly_alike_are_named_with_their_numbers(here, other):
    source = open_source(write(here, lines(["image", "label"], [(PLAIN[0][0], other), *PLAIN[1:]])))
    assert other in source.classes and "1 labels are written in more than one way" in told(source)
    assert f"'{other}' (1 images)" in told(source) and "'cat' (2 images)" in told(source)


def test_a_rare_label_spelt_nearly_like_a_common_one_is_named(here):
    rows = [(f"n{number}", "dandelion" if number < 20 else "tulip") for number in range(24)]
    for name, _ in rows:
        draw(here / "pics" / f"{name}.jpg")
    source = open_source(write(here, lines(["image", "label"], [*rows, ("cat_0", "dandelon")])))
    assert "label 'dandelon' (1 images) is spelt nearly like 'dandelion' (20 images)." in told(source)
    source = open_source(write(here, lines(["image", "label"], [*rows[:5], *rows[20:], ("cat_0", "dandelon")])))
    assert "spelt nearly" not in told(source)


def test_a_number_written_in_two_ways_is_refused(here):
    rows = [(name, "1" if label == "cat" else "2") for name, label in PLAIN]
    with pytest.raises(DataError, match=r"'1' \(2 images\) and '1\.0' \(1 images\)\. Write each label in one way"):
        open_source(write(here, lines(["image", "label"], [*rows[1:], ("cat_0", "1.0")])))


def test_a_class_called_like_no_label_is_named(here):
    rows = [(name, "None" if label == "dog" else label) for name, label in PLAIN]
    source = open_source(write(here, lines(["image", "label"], rows)))
    assert "'None' (3 images) reads as if there were no label, and is taken as a class." in source.warnings


def test_class_folders_spelt_nearly_alike_are_named(tmp_path):
    for folder in ("Daisy", "daisy", "rose"):
        draw(tmp_path / folder / "1.png")
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this file system does not tell capitals apart")
    assert "'Daisy' (1 images) and 'daisy' (1 images)" in told(open_source(tmp_path))


def test_known_names_of_columns_find_the_separator_where_another_occurs_more_often(here):
    rows = [(*row, "a,b,c,d") for row in PLAIN]
    source = open_source(write(here, lines(["image", "label", "w,x,y,z"], rows, separator=";")))
    assert source.classes == ("cat", "dog") and source.warnings == ("column `w,x,y,z` is not used.",)


@pytest.mark.parametrize(
    ("suffix", "do"), [("xlsx", "Save the sheet as"), ("zip", "Unpack it"), ("txt", "image,label")]
)
def test_a_file_that_is_no_table_is_told_what_to_become(tmp_path, suffix, do):
    (tmp_path / f"t.{suffix}").write_bytes(b"x")
    with pytest.raises(DataError, match=f"is a file but no table.*{do}"):
        open_source(tmp_path / f"t.{suffix}")


def test_a_table_beside_folders_is_read_only_where_its_labels_are_its_own(tmp_path):
    for folder in ("a", "b"):
        for number in range(2):
            draw(tmp_path / folder / f"{folder}{number}.png")
    rows = [("a/a0", "cat"), ("a/a1", "dog"), ("b/b0", "cat"), ("b/b1", "dog")]
    table = write(tmp_path, lines(["image", "label"], rows, cell="{}.png"))
    assert open_source(tmp_path).classes == ("cat", "dog")
    assert "t.csv gives the images labels of its own" in told(open_source(tmp_path))
    for text in (
        lines(["image", "label"], [(name, name[0]) for name, _ in rows], cell="{}.png"),  # labels are the folders
        lines(["image", "label"], rows, cell="gone/{}.jpeg"),  # names no image that is there
        lines(["image", "score"], rows, cell="{}.png"),  # has no label
    ):
        write(tmp_path, text)
        assert open_source(tmp_path).classes == ("a", "b")
        assert f"t.csv lies beside class folders and was not read; to use it, give {table}." in told(
            open_source(tmp_path)
        )


def test_images_lie_in_a_folder_for_images_near_the_table_but_in_no_other_data_set(here):
    table = write(here.parent / "lists", lines(["image", "label"], cell="{}.jpg"))
    (here / "pics").rename(here.parent / "others")
    with pytest.raises(DataError, match="no image of its rows was found"):
        open_source(table)
    (here.parent / "others").rename(here.parent / "Images")
    assert len(open_source(table).items) == 6


def test_a_header_without_the_name_of_the_first_column_is_told_by_the_longer_rows(here):
    text = "image,label\n" + "".join(
        f"{number},pics/{name}.jpg,{label}\n" for number, (name, label) in enumerate(PLAIN)
    )
    with pytest.raises(DataError, match=r"6 rows have more cells than the header.*the columns that the header lacks"):
        open_source(write(here, text))


def test_cells_separated_by_blanks_are_told(here):
    with pytest.raises(DataError, match=r"'pics/cat_0.jpg cat', is a single cell\. Separate cells by commas"):
        open_source(write(here, lines(["pics/cat_0.jpg", "cat"], PLAIN[1:], separator=" ")))


def test_capitals_of_file_names_count_and_the_neighbour_is_told(here):
    with pytest.raises(DataError, match=r"There is cat_0.jpg: capitals count\."):
        open_source(write(here, lines(["image", "label"], cell="pics/{}.JPG")))
