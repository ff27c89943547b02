"""The door from Python and from the shell: what may be handed in, and what is said where it cannot be used."""

import asyncio
import io
import re
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from commands import command
from PIL import Image

import finetune as ft
from finetune import cli, pipeline
from finetune.config.reading import as_recipe, load_recipe
from finetune.data.held import hold
from finetune.data.splits import refuse_idle
from finetune.errors import BackboneError, DataError, RunError
from finetune.evaluation.other_data import evaluate_elsewhere
from finetune.model_selection.zoo import add_card
from finetune.preparing import say_on_stderr

TINY = ["backbone=tiny_resnet18.cifar10", "data.image_size=32", "train.strategy=probe", "tracking.enabled=false"]


def quiet(text):
    """Nobody listens."""


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    return ft.train(str(shapes), TINY, runs=str(tmp_path_factory.mktemp("door")), say=quiet)


@pytest.fixture
def photo(shapes):
    return shapes / "disc" / "00.png"


# from Python


def test_a_run_may_be_named_by_itself_or_by_its_folder(run, photo):
    answers = [ft.predict(one, str(photo)) for one in (run, run.path, str(run.path))]
    assert answers[0] == answers[1] == answers[2] and answers[0][0].label
    assert str(run) == str(run.path)
    again = [ft.report(one, say=quiet) for one in (run, str(run.path))]
    assert again == [run.file("report.html")] * 2
    assert ft.resume(str(run.path), say=quiet).path == ft.resume(run, say=quiet).path == run.path
    assert ft.evaluate(run, say=quiet).test == run.scores.test


def test_images_in_memory_get_the_answer_of_their_file(run, photo):
    with Image.open(photo) as image:
        given = [photo, str(photo), image, np.asarray(image)]
        answers = ft.predict(run, given)
        assert ft.predict(run, image)[0] == ft.predict(run, [image])[0] == ft.predict(run, (one for one in [image]))[0]
    assert [answer.name for answer in answers] == [str(photo), str(photo), "image 2", "image 3"]
    assert all(answer.probabilities == answers[0].probabilities for answer in answers)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_picture_of_any_mode_is_held_as_it_is(mode):
    image = Image.new(mode, (5, 4))
    with Image.open(io.BytesIO(hold(image, "it").data)) as held:
        assert (held.mode, held.size, held.tobytes()) == (mode, (5, 4), image.tobytes())


@pytest.mark.parametrize("turn", [1, 6])
def test_a_photograph_held_upright_by_its_camera_is_so_in_memory_too(turn):
    image = Image.new("RGB", (5, 4))
    image.getexif()[0x0112] = turn
    with Image.open(io.BytesIO(hold(image, "it").data)) as held:
        assert held.getexif().get(0x0112, 1) == turn


@pytest.mark.parametrize(
    "array", [np.zeros((2, 4, 4, 3), np.uint8), np.zeros((4, 4, 3)), np.zeros((3, 4, 4), np.uint8)]
)
def test_an_array_that_is_no_image_is_refused_with_what_to_give(run, array):
    with pytest.raises(ValueError, match=r"image 0 is an array .* give \(H, W, 3\) in RGB"):
        ft.predict(run, array)


def test_what_is_no_image_at_all_is_refused_with_what_to_give(run):
    with pytest.raises(TypeError, match="image 0 is a int; give a path, a Pillow image"):
        ft.predict(run, [3])
    with pytest.raises(DataError, match=r"no images were given"):
        ft.predict(run, [])


def test_a_folder_or_a_file_stands_for_its_recipe(shapes, tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    assert as_recipe(tmp_path / "mine.yaml", "train.epochs=2") == load_recipe(
        str(tmp_path / "mine.yaml"), ["train.epochs=2"]
    )
    recipe = load_recipe(shapes, TINY)
    assert as_recipe(recipe) is recipe
    facts = ft.survey(shapes, TINY)
    assert facts.num_images == 72
    assert ft.make_plan(str(shapes), facts).classes == ("disc", "square", "stripes")
    with pytest.raises(TypeError, match="give the overrides to load_recipe"):
        ft.survey(recipe, ["seed=1"])


class _Notebook(io.TextIOBase):
    """As of Jupyter: takes text, and is no file."""

    def write(self, text):
        return len(text)

    def fileno(self):
        raise io.UnsupportedOperation("fileno")


@pytest.mark.slow
def test_it_runs_in_a_thread_under_an_event_loop_and_without_a_file_for_output(
    run, photo, shapes, tmp_path, monkeypatch
):
    done = []

    def work():
        wishes = [*TINY[:2], "train.strategy=full", "train.epochs=1", "tracking.enabled=false"]
        made = ft.train(shapes, wishes, runs=tmp_path)
        done.append(ft.predict(made, photo)[0].label)

    async def notebook():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        done.append(ft.predict(run, photo)[0].label)

    monkeypatch.setattr(sys, "stdout", _Notebook())
    monkeypatch.setattr(sys, "stderr", _Notebook())
    asyncio.run(notebook())
    assert len(done) == 2


def test_closed_standard_error_leaves_standard_output_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    say_on_stderr("for people")
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_python_of_the_readme_runs(shapes, tmp_path, monkeypatch, photo):
    root = Path(ft.__file__).parents[1]
    texts = [path.read_text(encoding="utf-8") for path in (root / "README.md", *sorted((root / "docs").glob("*.md")))]
    blocks = [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    assert blocks and "ft.train" in blocks[0]
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").write_bytes(photo.read_bytes())
    quick = str(["train.strategy=partial", "train.epochs=1", *TINY[:2], TINY[3]])
    text = blocks[0].replace('["train.strategy=partial"]', quick).replace("path/to/images", str(shapes))
    assert quick in text and str(shapes) in text
    exec(compile(text, "README.md", "exec"), {"__name__": "readme"})
    assert list(tmp_path.glob("runs/*/report.html"))


# one class, no class


def test_a_run_is_judged_on_images_of_one_class(run, shapes, tmp_path):
    shutil.copytree(shapes / "disc", tmp_path / "discs" / "disc")
    found = evaluate_elsewhere(run, tmp_path / "discs")
    assert found.n == 24 and found.missing_classes == ("square", "stripes")
    assert found.scores.top1.n == 24


@pytest.mark.parametrize(
    ("given", "val", "do"),
    [([None] * 2, 0.0, "raise it"), ([None] * 2, 0.15, "too few to cut"), (["train", "val"], 0.15, "cannot be read")],
)
def test_raising_a_share_is_advised_only_where_it_helps(given, val, do):
    with pytest.raises(DataError, match=f"no images play the role val: .*{do}") as raised:
        refuse_idle(["train"] * 2, given, val)
    assert ("raise" in str(raised.value)) == (val == 0)
    refuse_idle(["train", "val"], given, val)


# from the shell


def test_help_is_asked_for_in_any_way(monkeypatch, capsys):
    for words in ([], ["-h"], ["--help"], ["zoo"], ["recipes"], ["zoo", "-h"], ["train", "-h"], ["zoo", "rank", "-h"]):
        monkeypatch.setattr(sys, "argv", ["finetune", *words])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        said = capsys.readouterr()
        assert not leave.value.code, words
        assert said.out.lstrip().startswith("Usage: ") and not said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json", "train"], "stand behind it: `finetune VERB --json`"),
        (["train", "--epoch", "3"], "`finetune train --help` says what it takes"),
        (["trian"], "Did you mean 'train'"),
        (["train", "train.epochs"], "lacks its value: train.epochs=VALUE"),
        (["train", "train.epochs", "=", "3"], "without blanks"),
        (["train", "seed=1", "seed=2"], "seed stands there more than once"),
        (["train", "--epochs", "3", "train.epochs=4"], "train.epochs stands there more than once"),
        (["train", "--epochs", "three"], "train.epochs: Input should be a valid integer"),
        (["plan", "--image-size", "many"], "data.image_size"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_one(monkeypatch, capsys, words, message):
    code, said = command(monkeypatch, capsys, *words)
    assert code == 2 and message in said and "Traceback" not in said


def test_short_forms_are_overrides(monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "train", lambda recipe, runs: seen.append((recipe, runs)) or _stop())
    short = "--backbone b --strategy full --epochs 3 --lr 0.1 --image-size 64 --seed 5 --out here"
    monkeypatch.setattr(sys, "argv", ["finetune", "train", *short.split()])
    with pytest.raises(SystemExit):
        cli.main()
    words = "backbone=b train.strategy=full train.epochs=3 train.optimizer.lr=0.1 data.image_size=64 seed=5"
    assert seen == [(load_recipe(None, words.split()), Path("here"))]


def _stop():
    raise RunError("enough")


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path, monkeypatch):
    from finetune.cli.words import read_wish

    (tmp_path / "a=b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_wish(["a=b", "seed=3"]).data.root == "a=b"


def test_paths_that_are_not_there_are_answered_with_their_neighbours(run, shapes, photo, tmp_path, monkeypatch):
    near = f"Nearest: {run.path.name}"
    for verb in (ft.evaluate, ft.report, ft.resume, lambda path: ft.predict(path, photo)):
        with pytest.raises(RunError, match=re.escape(near)):
            verb(f"{run.path}x")
    monkeypatch.setenv("FINETUNE_RUNS", str(run.path.parent))
    with pytest.raises(RunError, match=re.escape(near)):
        ft.evaluate(run.path.name + "x")
    with pytest.raises(DataError, match=r"000.png does not exist. Nearest: .*00\.png"):
        ft.predict(run, shapes / "disc" / "000.png")
    (tmp_path / "card").mkdir()
    with pytest.raises(BackboneError, match=r"cardd is not there. Nearest: card"):
        add_card(tmp_path / "cardd")
    with pytest.raises(DataError, match="Nearest: shapes"):
        ft.train(ft.load_recipe(None, [f"data.root={shapes}s"]), runs=tmp_path, say=quiet)


def test_the_likeliest_classes_are_told_in_text(run, photo, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune", "predict", str(run), str(photo), "--top", "2"])
    with pytest.raises(SystemExit):
        cli.main()
    name, *told = capsys.readouterr().out.rstrip("\n").split("\t")
    (answer,) = ft.predict(run, photo)
    two = sorted(answer.probabilities.items(), key=lambda one: -one[1])[:2]
    assert name == str(photo) and told == [text for label, share in two for text in (label, f"{share:.4f}")]
