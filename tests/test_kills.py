"""`kill -9` at any moment, then resume: curves.csv and MLflow hold every row, and each once."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from finetune.tracking.state import CurveReader

pytestmark = pytest.mark.slow

SMALL = ["data.image_size=32", "train.batch_size=8", "train.epochs=4", "backbone=tiny_resnet18.cifar10"]


def rows_of(folder):
    return [(row.name, row.step) for row in CurveReader(folder).new_rows()]


def in_mlflow(folder):
    state = json.loads((folder / "tracking.json").read_text())
    with closing(sqlite3.connect(folder.parent / "mlflow.db")) as store:
        sql = "select key, step, timestamp from metrics where run_uuid = ?"
        return [(key, step) for key, step, _ in store.execute(sql, [state["mlflow_run_id"]])], state


def count_lines(folder):
    path = folder / "curves.csv"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def has_stage(folder, number, name):
    return any(folder.glob(f"stages/{number}-*/{name}"))


def rows_sent(folder):
    path = folder / "tracking.json"
    return json.loads(path.read_text())["sent_rows"] if path.exists() else 0


MOMENTS = {
    "rows of an epoch that has not ended": lambda folder: count_lines(folder) > 12,
    "between the first and the second stage": lambda folder: has_stage(folder, 1, "held_out.safetensors"),
    "in the second stage": lambda folder: has_stage(folder, 2, "last.ckpt"),
    "in the refit of the first stage": lambda folder: any(folder.glob("stages/*-refit/last.ckpt")),
    "when MLflow has some rows": lambda folder: rows_sent(folder) > 0,
    "while MLflow is told the end": lambda folder: (folder / "report.html").exists(),
}


def run(tmp_path, *words):
    env = {**os.environ, "FINETUNE_RUNS": str(tmp_path / "runs")}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-m", "finetune", *words], env=env, **silent)


def kill_when(process, is_now):
    while not is_now():
        assert process.poll() is None, "the run was faster"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_every_row_is_there_once_after_kills(shapes, tmp_path):
    process = run(tmp_path, "train", f"data.root={shapes}", *SMALL, "train.strategy=gradual", "train.patience=4")
    while not list((tmp_path / "runs").glob("shapes-*")):
        time.sleep(0.01)
    (folder,) = (tmp_path / "runs").glob("shapes-*")
    for is_now in MOMENTS.values():
        kill_when(process, lambda is_now=is_now: is_now(folder))
        process = run(tmp_path, "resume", str(folder))
    assert process.wait(timeout=600) == 0
    rows = rows_of(folder)
    assert len(set(rows)) == len(rows)
    told, state = in_mlflow(folder)
    assert state["finished"]
    names = {name for name, _ in rows}
    assert sorted(row for row in told if row[0] in names) == sorted(rows)
