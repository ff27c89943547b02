"""A real MLflow server behind a door that asks for a password: what it gets, and what nobody may see."""

import base64
import http.client
import http.server
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from finetune.process import quiet_environment
from finetune.tracking.state import CurveReader

pytestmark = pytest.mark.slow

USER, PASSWORD, TYPED = "me", "s3cret/w@rd", "s3cret%2Fw%40rd"
SMALL = ["data.image_size=32", "train.batch_size=16", "train.epochs=2", "backbone=tiny_resnet18.cifar10"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_up(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Door(http.server.BaseHTTPRequestHandler):
    """Lets those in who know the password, and keeps what they bring."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        known = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != known:
            return self.answer(401, b"You are not authenticated")
        self.server.brought.append(f"{self.command} {self.path}".encode() + body)
        kept = {name: value for name, value in self.headers.items() if name.lower() not in ("authorization", "host")}
        with closing(http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)) as behind:
            behind.request(self.command, self.path, body, kept)
            with behind.getresponse() as found:
                return self.answer(found.status, found.read(), found.headers.get("Content-Type"))

    do_POST = do_PUT = do_PATCH = do_GET

    def answer(self, status, body, kind="text/plain"):
        self.send_response(status)
        self.send_header("Content-Type", kind or "text/plain")
        self.send_header("Content-Length", str(len(body)))
        with suppress(BrokenPipeError, ConnectionResetError):  # who asked has waited long enough
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The door before a server with an empty store; `.folder` is where the server keeps everything."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", f"{folder}/artifacts", "--workers", "1", "--port", str(port)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, cwd=folder, env=quiet_environment(), **silent)
    deadline = time.monotonic() + 300
    while not is_up(port):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door) as door:
        door.daemon_threads, door.behind, door.brought, door.folder = True, port, [], folder
        threading.Thread(target=door.serve_forever, daemon=True).start()
        yield door
        door.shutdown()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finetune(tmp_path, *words, closes_stdout=False, **variables):
    own = {"FINETUNE_RUNS": str(tmp_path / "runs"), "HOME": str(tmp_path), "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
    env = {**os.environ, **own, **variables}
    command = [sys.executable, "-m", "finetune", *words]
    if closes_stdout:
        command = ["sh", "-c", 'exec "$0" "$@" >&-', *command]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done


def stored(server, sql, *values):
    with sqlite3.connect(f"file:{server.folder}/mlflow.db?mode=ro", uri=True) as store:
        found = store.execute(sql, values).fetchall()
    store.close()
    return found


def the_run(tmp_path):
    (folder,) = (tmp_path / "runs").iterdir()
    return folder, json.loads((folder / "tracking.json").read_text())


def status_of(server, state):
    return stored(server, "select status from runs where run_uuid = ?", state["mlflow_run_id"])[0][0]


def bring_the_rest(server, tmp_path, **how):
    """The state once the run is ended there; a server that is slower than `close` waits is told by `report`."""
    for _ in range(5):
        folder, state = the_run(tmp_path)
        if state["finished"]:
            break
        finetune(tmp_path, "report", str(folder), **how)
    assert status_of(server, state) == "FINISHED"
    return folder, state


def in_mlflow(server, state):
    sql = "select key, step, value from metrics where run_uuid = ? and is_nan = 0"
    return sorted(
        row for row in stored(server, sql, state["mlflow_run_id"]) if not row[0].startswith(("best/", "final/"))
    )


def test_a_password_is_used_and_seen_by_nobody_and_the_environment_gives_it_back(server, shapes, tmp_path):
    uri = f"http://{USER}:{TYPED}@127.0.0.1:{server.server_port}"
    ascii_only, logged_in = (
        {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
        {
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        },
    )
    words = ("train", "--json", f"data.root={shapes}", *SMALL, "train.strategy=full", f"tracking.uri={uri}")
    done = finetune(tmp_path, *words, **ascii_only)
    answer = json.loads(done.stdout)
    assert answer["plan"]["tracking"]["uri"] == f"http://127.0.0.1:{server.server_port}"
    folder, _ = bring_the_rest(server, tmp_path, **ascii_only, **logged_in)
    assert list(server.folder.glob("artifacts/**/report.html"))

    (folder / "curves.csv").write_text((folder / "curves.csv").read_text() + "1-full,1,99,val/extra,0.5\n")
    refused = finetune(tmp_path, "report", str(folder))
    assert "401" in refused.stderr and "MLFLOW_TRACKING_USERNAME" in refused.stderr
    asked = finetune(tmp_path, "report", str(folder), MLFLOW_TRACKING_USERNAME=USER, MLFLOW_TRACKING_PASSWORD=PASSWORD)
    assert "MLflow" not in asked.stderr
    assert ("val/extra", 99, 0.5) in in_mlflow(server, the_run(tmp_path)[1])

    everything = [path.read_bytes() for root in (tmp_path, server.folder) for path in root.rglob("*") if path.is_file()]
    everything += [text.encode() for run in (done, refused, asked) for text in (run.stdout, run.stderr)]
    everything += server.brought
    assert any(b"val/top1" in text for text in server.brought)
    for secret in (b"s3cret", b"w@rd", b"w%40rd"):
        assert not any(secret in text for text in everything)


def test_the_environment_names_the_server_and_a_closed_stdout_does_not_leave_the_run_open(server, shapes, tmp_path):
    credentials = tmp_path / ".mlflow" / "credentials"
    credentials.parent.mkdir()
    credentials.write_text(f"[mlflow]\nmlflow_tracking_username = {USER}\nmlflow_tracking_password = {PASSWORD}\n")
    how = {"closes_stdout": True, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{server.server_port}"}
    words = ("train", f"data.root={shapes}", *SMALL, "train.strategy=gradual")
    done = finetune(tmp_path, *words, **how, MLFLOW_EXPERIMENT_NAME="ours")
    assert "MLFLOW_TRACKING_URI is set" in done.stderr
    folder, state = bring_the_rest(server, tmp_path, **how)
    sql = "select e.name from experiments e join runs r on r.experiment_id = e.experiment_id where r.run_uuid = ?"
    assert stored(server, sql, state["mlflow_run_id"]) == [("ours",)]
    rows = [(row.name, row.step, row.value) for row in CurveReader(folder).new_rows()]
    assert len({(name, step) for name, step, _ in rows}) == len(rows)
    curves = {name for name, _, _ in rows}
    assert [row for row in in_mlflow(server, state) if row[0] in curves] == sorted(rows)
    tags = {key for (key,) in stored(server, "select key from tags where run_uuid = ?", state["mlflow_run_id"])}
    stages = {path.name for path in Path(folder / "stages").iterdir()}
    assert len(stages) > 1
    assert {f"stage/{name}" for name in stages} <= tags
