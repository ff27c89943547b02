"""One walk for all: what training leaves out, predicting and measuring leave out, too."""

import pytest
from PIL import Image

from finetune.data.sources import open_source
from finetune.data.walking import Left, image_files
from finetune.features.source_statistics import _list_images
from finetune.inference.batch_predict import expand_names, find_images

JUNK = (".ipynb_checkpoints", "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information")


def draw(file, shade=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (shade, 0, 0)).save(file)
    return file


@pytest.fixture
def messy(tmp_path):
    """Four images in two classes, junk beside and inside them, a linked folder, and a loop."""
    root = tmp_path / "data"
    for number, name in enumerate(("a/1.jpg", "a/2.png", "b/1.jpg")):
        draw(root / name, number)
    draw(tmp_path / "elsewhere" / "3.jpg", 9)
    (root / "b" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "up").symlink_to("..")
    for folder in JUNK:
        draw(root / folder / "x.jpg")
        draw(root / "a" / folder / "x.jpg")
    for name in ("._1.jpg", "Thumbs.db", ".DS_Store"):
        (root / "a" / name).write_bytes(b"x")
    return root


TAKEN = ["a/1.jpg", "a/2.png", "b/1.jpg", "b/linked/3.jpg"]


def test_training_and_predicting_take_the_same_files(messy):
    assert [item.name for item in open_source(messy).items] == TAKEN
    assert [path.relative_to(messy).as_posix() for path in find_images([messy])] == TAKEN
    assert [path.relative_to(messy).as_posix() for path in expand_names([messy])] == TAKEN


def test_a_pattern_leaves_out_what_a_folder_leaves_out(messy):
    found = {path.relative_to(messy).as_posix() for path in expand_names([f"{messy}/a/**/*.jpg"])}
    assert found == {"a/1.jpg"}
    assert len(list(expand_names([f"{messy}/@eaDir/*.jpg"]))) == 1  # who writes the name means it


def test_what_is_walked_may_itself_lie_in_a_hidden_folder(tmp_path):
    draw(tmp_path / ".cache" / "new" / "1.jpg")
    assert len(list(find_images([tmp_path / ".cache" / "new"]))) == 1


def test_statistics_of_a_source_walk_the_same_way(tmp_path):
    draw(tmp_path / "1.jpg")
    draw(tmp_path / "@eaDir" / "1.jpg")
    source = _list_images(tmp_path)
    assert ([item.name for item in source.items], source.classes) == (["1.jpg"], ())


def test_links_that_lead_back_are_named_and_links_elsewhere_followed(messy):
    left = Left()
    taken = sorted(file.name for file in image_files(messy / "b", left, messy))
    assert taken == ["1.jpg", "3.jpg"]
    assert left.links == [f"{messy / 'b' / 'up'} (to {messy.resolve()})"]


def test_a_link_to_another_class_does_not_put_its_images_here(tmp_path):
    draw(tmp_path / "a" / "1.jpg")
    draw(tmp_path / "b" / "2.jpg", 1)
    (tmp_path / "a" / "more").symlink_to(tmp_path / "b")
    source = open_source(tmp_path)
    assert [item.name for item in source.items] == ["a/1.jpg", "b/2.jpg"]
    assert any("1 links lead back into the data" in line and "more" in line for line in source.warnings)


def test_hidden_images_are_counted_and_the_systems_files_are_not(tmp_path):
    draw(tmp_path / "1.jpg")
    draw(tmp_path / ".old.jpg")
    for name in ("Thumbs.db", "._1.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "gone").symlink_to("nowhere")
    left = Left()
    assert len(list(image_files(tmp_path, left))) == 1
    assert left.kinds == {"hidden": 1, ".txt": 1, "links to nothing": 1}
