"""Nothing that is started here looks up or connects to anybody but this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings

import pytest

WATCH = """
import os, sys

def watch(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        note(event, args[1][0])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        note(event, args[0])

def note(event, host):
    with open(os.environ["LOOKUPS"], "a") as file:
        file.write(f"{event} {host}\\n")

sys.addaudithook(watch)
"""
"""Runs first in every Python process that finds it, workers of servers included."""

VERBS = """
import json, os, sys
from pathlib import Path
from finetune.cli import main

def verb(*words):
    sys.argv = ["finetune", *words]
    try:
        main()
    except SystemExit as leave:
        assert not leave.code, (words, leave.code)

images, runs = sys.argv[1], Path(os.environ["FINETUNE_RUNS"])
small = [images, "data.image_size=32", "train.epochs=1"]
for words in ("recipes list", "recipes show quick", "recipes check", "zoo list", "zoo verify"):
    verb(*words.split())
verb("plan", *small)
verb("train", *small, "train.strategy=full", "augment.preset=medium")
verb("train", *small, "train.strategy=probe")
made = [str(path) for path in sorted(runs.iterdir()) if (path / "plan.yaml").exists()]
verb("resume", made[0])
verb("evaluate", made[0])
verb("predict", made[0], images + "/disc")
verb("compare", *made)
verb("ensemble", *made)
verb("report", made[0])
verb("demo")
"""
HERE = {"127.0.0.1", "localhost", "::1", "None", "", "0.0.0.0"}

pytestmark = pytest.mark.slow


@pytest.fixture
def watched(tmp_path):
    """An environment in which every process notes whom it asks for, and a way to read the notes."""
    folder, notes = tmp_path / "watch", tmp_path / "lookups.txt"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WATCH)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"LOOKUPS": str(notes), "PYTHONPATH": path, "FINETUNE_RUNS": str(tmp_path / "runs")}
    unquiet = ("HF_HUB_OFFLINE", "NO_ALBUMENTATIONS_UPDATE", "DO_NOT_TRACK", "CI", "PYTEST_CURRENT_TEST")
    env = {name: value for name, value in os.environ.items() if name not in unquiet} | own

    def hosts():
        return {line.partition(" ")[2].strip() for line in notes.read_text().splitlines()}

    asks = "import socket; socket.getaddrinfo('localhost', 1)"
    subprocess.run([sys.executable, "-c", asks], env=env, check=True)
    assert hosts() == {"localhost"}  # it does see
    return env, hosts


def test_no_verb_asks_for_anybody_else(watched, shapes):
    env, hosts = watched
    done = subprocess.run(
        [sys.executable, "-c", VERBS, str(shapes)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert hosts() <= HERE


def test_the_ui_and_its_workers_ask_for_nobody_else(watched, tmp_path):
    from finetune.tracking.mlflow_store import create_store, prepare_mlflow

    env, hosts = watched
    with warnings.catch_warnings():
        prepare_mlflow()
        create_store(tmp_path / "runs" / "mlflow.db")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "finetune", "ui", "--port", str(port)]
    said = subprocess.run([*command, "--json"], env=env, capture_output=True, text=True, check=True).stdout
    url = json.loads(said)["url"]
    assert url == f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning"
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    server = subprocess.Popen(command, env=env, cwd=tmp_path, **silent)
    try:
        deadline = time.monotonic() + 300
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        for page in ("", "ajax-api/3.0/mlflow/ui-telemetry", "ajax-api/2.0/mlflow/experiments/search?max_results=5"):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=60) as answer:
                assert answer.status == 200
        time.sleep(2)  # whoever asks, asks in a thread
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert hosts() <= HERE
