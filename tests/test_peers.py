"""The comparison with peers: what all are given, how all are judged, and that a stopped benchmark goes on. No peer
runs."""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_shapes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "peers"), str(BENCHMARKS / "peers" / "doors")]
run = pytest.importorskip("run", reason="benchmarks/ is not beside tests/")
cells = pytest.importorskip("cells")
judging = pytest.importorskip("judge")
tables = pytest.importorskip("table")
door = pytest.importorskip("door")
CELL = run.Cell("shapes", 3, 0, "backbone", 64, None)


@pytest.fixture
def shared_set(tmp_path):
    """A shared folder with one set: three classes, six images each for training and four for test."""
    for role, count in (("train", 6), ("test", 4)):
        draw_shapes(tmp_path / "shared" / "data" / "shapes" / role, per_class=count)
    return tmp_path / "shared"


def _files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_cell_has_so_many_labelled_images_per_class_and_every_test_image(shared_set, tmp_path):
    folder = cells.cell_folder("shapes", 3, 0, shared_set, tmp_path / "work")
    assert {path.name: len(_files(path)) for path in (folder / "train").iterdir()} == dict.fromkeys(
        ("disc", "square", "stripes"), 3
    )
    assert _files(folder / "test") == _files(shared_set / "data" / "shapes" / "test")
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_cells_of_one_seed_are_nested_and_of_two_differ(shared_set, tmp_path):
    def labelled(per_class, seed):
        return set(_files(cells.cell_folder("shapes", per_class, seed, shared_set, tmp_path / "work") / "train"))

    assert labelled(2, 0) < labelled(4, 0)
    assert labelled(2, 0) != labelled(2, 1)


def test_two_images_of_one_name_are_refused(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "x.png").write_bytes(b"")
    table = tmp_path / "table.csv"
    table.write_text(f"image,label,split\n{tmp_path}/a/x.png,k,train\n{tmp_path}/b/x.png,k,train\n")
    with pytest.raises(ValueError, match=r"two images are called x\.png"):
        cells.lay_out(table, tmp_path / "cell")


def _answers(folder, probabilities, names=("a/1.png", "a/2.png", "b/3.png", "b/4.png"), classes=("a", "b")):
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/4.png"):
        (folder / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "test" / name).touch()
    np.savez(folder / "answers.npz", names=list(names), probabilities=np.array(probabilities), classes=list(classes))
    return judging.judge(folder / "answers.npz", folder / "test")


ROWS = [[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]]


def test_accuracy_and_log_loss_are_those_of_the_probabilities(tmp_path):
    found = _answers(tmp_path, ROWS)
    assert found.top1.value == 0.75 and found.top1.n == 4
    assert found.log_loss.value == pytest.approx(-np.log([0.9, 0.4, 0.8, 0.7]).mean())
    assert found.hits.tolist() == [True, False, True, True]


def test_neither_the_order_of_files_nor_of_classes_matters(tmp_path):
    turned = _answers(tmp_path, np.array(ROWS)[::-1, ::-1], ("b/4.png", "b/3.png", "a/2.png", "a/1.png"), ("b", "a"))
    assert turned == judging.Judged(turned.top1, turned.log_loss, turned.hits)
    assert turned.hits.tolist() == [True, False, True, True]
    assert turned.log_loss.value == pytest.approx(-np.log([0.9, 0.4, 0.8, 0.7]).mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("a/1.png", "a/2.png", "b/3.png", "b/5.png")}, "names differ"),
        ({"names": ("a/1.png", "a/1.png", "b/3.png", "b/4.png")}, "names differ"),
        ({"classes": ("a", "c")}, "classes are"),
        ({"probabilities": [[2.0, -1.0]] * 4}, "does not sum to 1"),
        ({"probabilities": [[0.9, 0.9]] * 4}, "does not sum to 1"),
        ({"probabilities": [[np.nan, 1.0]] * 4}, "not finite"),
        ({"probabilities": [[0.2, 0.3, 0.5]] * 4}, "probabilities are"),
    ],
)
def test_answers_that_are_none_are_refused(tmp_path, change, message):
    with pytest.raises(judging.AnswersError, match=message):
        _answers(tmp_path, **{"probabilities": ROWS, **change})


def test_hits_come_back_from_the_table():
    hits = np.array([True, False, True, True, False, False, True, False, True])
    assert judging.from_hex(judging.to_hex(hits), 9).tolist() == hits.tolist()


def _row(peer, status="ok", **more):
    return dict(zip(run.KEYS, CELL.key(peer), strict=True)) | {"status": status, "commit": "abc"} | more


def test_what_has_a_row_is_left_out_and_what_failed_is_retried_when_asked():
    rows = [_row("ours"), _row("fastai", "failed")]
    peers = ["ours", "fastai", "keras"]
    assert run.missing([CELL], peers, rows, False, "abc") == [(CELL, "keras")]
    assert run.missing([CELL], peers, rows, True, "abc") == [(CELL, "fastai"), (CELL, "keras")]
    assert run.missing([CELL], peers, [*rows, _row("fastai")], True, "abc") == [(CELL, "keras")]
    other = run.Cell("shapes", 3, 1, "backbone", 64, None)
    assert len(run.missing([other], peers, rows, False, "abc")) == 3


def test_ours_is_run_again_when_it_has_changed_and_peers_are_not():
    rows = [_row("ours"), _row("fastai")]
    assert run.missing([CELL], ["ours", "fastai"], rows, False, "def") == [(CELL, "ours")]


def _script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(text)
    return [sys.executable, str(path)]


def test_time_and_memory_of_children_count(tmp_path):
    work = "x = bytearray(150_000_000)\nimport time\nwhile time.process_time() < 0.4: pass\n"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {work!r}])\nraise SystemExit(3)\n"
    spent = run.run_tree(_script(tmp_path, parent), tmp_path / "log.txt", {}, seconds=60, cores=1)
    assert spent.code == 3 and not spent.was_stopped
    assert 0.4 <= spent.cpu_seconds < 5
    assert spent.peak_mb > 140


def test_a_peer_over_its_time_is_stopped_with_its_children(tmp_path):
    text = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\nchild.wait()\n"
    )
    spent = run.run_tree(_script(tmp_path, text), tmp_path / "log.txt", {}, seconds=1.0, cores=1)
    assert spent.was_stopped and spent.wall_seconds < 30
    child = Path("/proc") / (tmp_path / "log.txt").read_text().strip() / "stat"
    assert not child.exists() or child.read_text().split(") ")[1][0] in "ZX"


def test_a_peer_is_run_scored_and_its_row_told(shared_set, tmp_path, monkeypatch):
    doors = tmp_path / "doors"
    doors.mkdir()
    (doors / "fake.py").write_text(
        f"import sys\nsys.path.insert(0, {str(BENCHMARKS / 'peers' / 'doors')!r})\n"
        "from door import read_task\ntask = read_task()\n# user code\nclasses = task.classes  # all\n\n"
        "# a comment\nrows = [[float(name == path.parent.name) for name in classes] for path in task.test_files]\n"
        "# end of user code\ntask.mark_first_batch()\ntask.mark_fitted()\n"
        "task.write([task.name_of(path) for path in task.test_files], rows, classes, ('numpy',))\n"
    )
    monkeypatch.setitem(run.PEERS, "fake", run.Peer("fake", None))
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "weights_folder", lambda backbone, zoo, work: tmp_path)
    arguments = argparse.Namespace(
        work=tmp_path / "work", shared=shared_set, timm_source=tmp_path, cores=1, seconds=60, quiet="no", commit="abc"
    )
    row = run.run_peer("fake", CELL, arguments)
    assert (row["status"], row["top1"], row["num_train"], row["num_test"], row["user_lines"]) == (
        "ok",
        "1.0000",
        9,
        12,
        2,
    )
    assert row["versions"].startswith("numpy=") and 0 < row["start_seconds"] <= row["fit_seconds"]
    assert set(row) - {"note"} == set(run.FIELDS) - {"note"}
    (doors / "fake.py").write_text("raise SystemExit('the images are odd')\n")
    failed = run.run_peer("fake", CELL, arguments)
    assert (failed["status"], failed["note"]) == ("failed", "the images are odd")


def test_labelled_images_are_divided_by_class_and_none_is_in_both(shared_set, tmp_path):
    folder = cells.cell_folder("shapes", 5, 0, shared_set, tmp_path / "work")
    task = door.Task(folder, tmp_path, tmp_path, 64, 0, "", None, False, False)
    door.divide(task, tmp_path / "parts", "val")
    train, val = (
        set(path.name for path in (tmp_path / "parts" / part / "disc").iterdir()) for part in ("train", "val")
    )
    assert len(train) == 4 and len(val) == 1 and not train & val


def test_every_peer_has_a_script_with_marked_lines_that_cites_a_page():
    for name, peer in run.PEERS.items():
        script = BENCHMARKS / "peers" / "doors" / f"{peer.script}.py"
        assert run.user_lines(script) > 0, name
        assert "https://" in script.read_text() or peer.environment is None, name


def test_times_of_a_busy_machine_are_not_told(tmp_path):
    scores = {
        "top1": "0.75",
        "log_loss": "0.5",
        "log_loss_low": "0.4",
        "log_loss_high": "0.6",
        "num_test": "4",
        "user_lines": "9",
        "threads": "1",
        "fit_cpu_seconds": "41",
        "fit_seconds": "57",
        "start_seconds": "8",
    }
    rows = [
        _row("ours", quiet="yes", hits=judging.to_hex(np.array([1, 1, 1, 0], bool)), **scores),
        _row("fastai", quiet="no", hits=judging.to_hex(np.array([1, 1, 1, 1], bool)), **scores),
        _row("keras", "failed", note="no such file /home/me/x/data.png | sorry"),
    ]
    text = tables.page(rows)
    ours, fastai = (next(line for line in text.splitlines() if f"| `{name}`" in line) for name in ("ours", "fastai"))
    assert "| 41 | 57 | 8 |" in ours and "| - | - | - |" in fastai
    assert "| +25.0 [" in fastai and "75.0 [" in ours
    assert "No score: `keras` failed: no such file data.png / sorry" in text


def test_the_newest_row_of_a_peer_counts():
    first, second = _row("ours", "failed"), _row("ours", commit="def")
    assert tables.newest([first, second]) == [second]


def test_the_committed_rows_can_be_read():
    with run.RESULTS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert tuple(row) == run.FIELDS
        if row["status"] == "ok":
            assert len(tables.hits_of(row)) == int(row["num_test"])
            assert np.mean(tables.hits_of(row)) == pytest.approx(float(row["top1"]), abs=1e-4)


def test_a_weights_folder_is_what_timm_loads(tmp_path):
    import timm
    import torch
    import yaml
    from safetensors.torch import load_file, save_file

    card = {
        "arch": "mobilenetv2_035",
        "arch_kwargs": {"pad_type": "same"},
        "num_classes": 7,
        "input_size": [3, 64, 64],
        "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "weights": {"file": "w.safetensors"},
    }
    model = timm.create_model("mobilenetv2_035", pad_type="same", num_classes=7)
    (tmp_path / "zoo" / "tiny").mkdir(parents=True)
    (tmp_path / "zoo" / "tiny" / "card.yaml").write_text(yaml.safe_dump(card))
    halves = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_file(halves, tmp_path / "zoo" / "tiny" / "w.safetensors")
    folder = cells.weights_folder("tiny", tmp_path / "zoo", tmp_path / "work")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model.load_state_dict({name: value.to(model.state_dict()[name].dtype) for name, value in halves.items()})
    x = torch.rand(1, 3, 65, 65)
    torch.testing.assert_close(again(x), model.eval()(x))
    view = timm.data.resolve_data_config({}, model=again)
    assert (list(view["mean"]), list(view["std"]), view["crop_pct"]) == ([0.5] * 3, [0.25] * 3, 0.9)
    assert json.loads((folder / "config.json").read_text())["architecture"] == "mobilenetv2_035"
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float32}


def test_the_weights_go_back_into_keras_in_its_own_order():
    import timm

    keras_door = pytest.importorskip("with_keras")
    weights = timm.create_model("mobilenetv2_100").state_dict()
    names = list(weights)
    order = keras_door.timm_layers(sorted(names))
    assert order == [name.removesuffix(".weight") for name in names if "conv" in name]
    norms = [keras_door.norm_of(name) for name in order]
    assert norms == [name.removesuffix(".running_var") for name in names if "running_var" in name]
    for name, norm in zip(order, norms, strict=True):
        assert len(weights[f"{name}.weight"]) == len(weights[f"{norm}.bias"])


def test_the_error_in_a_log_is_told_not_the_bar_after_it(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("start\nOSError: image file is truncated\n\r 0%|   | 0/3 [00:01<?, ?it/s]")
    assert run.last_words(log) == "OSError: image file is truncated"
    log.write_text("\x1b[31mtoo bad\x1b[0m\n╰────╯\n")
    assert run.last_words(log) == "too bad"
