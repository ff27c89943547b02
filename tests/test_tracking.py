import http.server
import json
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import uuid
import warnings
from contextlib import closing, suppress

import pytest
from made_scores import make_scores, split_scores

from finetune.config.measures import Measure, Proportion
from finetune.process import QUIET
from finetune.tracking import mlflow_store
from finetune.tracking import state as state_module
from finetune.tracking import tracker as tracker_module
from finetune.tracking.tracker import Tracker, default_uri, send_remaining, ui_command

HEADER = "stage,epoch,step,name,value\n"


def judged(top1):
    """Scores that are few, for each of them is looked for."""
    ends = {"low": 0.7, "high": 0.9, "n": 153}
    measures = {"balanced_accuracy": 0.8, "log_loss": 0.5, "ece": 0.05}
    known = {name: Measure(value=value, **ends) for name, value in measures.items()} | {
        "macro_f1": None,
        "majority": None,
    }
    return split_scores().model_copy(update={**known, "top1": Proportion(value=top1, **ends)})


SCORES = make_scores(judged(0.8), probe=judged(0.6), val=judged(0.85)).model_dump(mode="json")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """A working directory of its own, in which MLflow must leave nothing, and quick retries."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tracker_module, "GATHER_SECONDS", 0.01)
    yield
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """An embedded store as the tracker makes it, made once."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    with warnings.catch_warnings():
        mlflow_store.prepare_mlflow()
        mlflow_store.create_store(database)
    return database


@pytest.fixture
def run(tmp_path):
    """A run folder with a plan and 1,200 rows of curves."""
    folder = tmp_path / "runs" / "flowers-tiny"
    folder.mkdir(parents=True)
    plan = {"name": "flowers", "seed": 0, "data": {"split": {"val": 0.15}}, "classes": ["a", "b"]}
    (folder / "plan.yaml").write_text(json.dumps(plan | {"long": "x" * 7000, "many": {f"k{i}": i for i in range(120)}}))
    (folder / "curves.csv").write_text(HEADER + rows_of("train/loss", range(1200)))
    return folder


def rows_of(name, steps):
    return "".join(f"head,{step // 100},{step},{name},{step / 7}\n" for step in steps)


def append(folder, text):
    with (folder / "curves.csv").open("a") as file:
        file.write(text)


def tracker_of(folder, said, uri=None):
    uri = uri or default_uri(folder.parent)
    return Tracker(folder, uri=uri, experiment="flowers", run_name="tiny", tags={"version": "1"}, warn=said.append)


def state_of(folder):
    return json.loads((folder / "tracking.json").read_text())


def client_of(folder):
    mlflow_store.prepare_mlflow()  # filters for this test what MLflow warns of
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=state_of(folder)["uri"])


def steps_of(folder, name="train/loss"):
    history = client_of(folder).get_metric_history(state_of(folder)["mlflow_run_id"], name)
    assert all(metric.value == pytest.approx(metric.step / 7) for metric in history)
    return sorted(metric.step for metric in history)


def wait_until(is_true, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_importing_the_module_costs_neither_mlflow_nor_torch():
    code = "import sys, finetune.tracking.tracker; print({'mlflow', 'torch', 'sqlalchemy'} & set(sys.modules))"
    root = tracker_module.__file__.rsplit("/finetune/", 1)[0]
    answer = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


@pytest.mark.slow
def test_a_run_arrives_whole_and_quietly_in_a_new_embedded_store(run, capfd):
    said = []
    tracker = tracker_of(run, said)
    tracker.start()
    append(run, rows_of("val/loss", [1200, 1100]) + "head,12,1199,val/top1,0.4\nhead,11,1100,val/top1,0.75\n")
    tracker.notify()
    (run / "scores.json").write_text(json.dumps(SCORES))
    (run / "report.html").write_text("<p>done</p>")
    unsent = tracker.close("FINISHED", deadline_seconds=60)
    assert not unsent, unsent
    assert said == []
    assert capfd.readouterr() == ("", "")
    assert steps_of(run) == list(range(1200))
    client, state = client_of(run), state_of(run)
    stored = client.get_run(state["mlflow_run_id"])
    assert (stored.info.run_name, stored.info.status, stored.data.tags["version"]) == ("tiny", "FINISHED", "1")
    assert stored.data.params["data.split.val"] == "0.15"
    assert stored.data.params["classes"] == '["a", "b"]'
    assert stored.data.params["many.k119"] == "119"
    assert len(stored.data.params["long"]) == 6000
    finals = {name: value for name, value in stored.data.metrics.items() if name not in ("train/loss", "val/loss")}
    tops, others = {"test": 0.8, "final/val": 0.85, "probe/test": 0.6}, {"balanced_accuracy": 0.8, "log_loss": 0.5}
    others["ece"] = 0.05
    assert finals == pytest.approx(
        {f"{part}/{name}": value for part, top1 in tops.items() for name, value in {"top1": top1, **others}.items()}
        | {f"{part}/{name}_low": 0.7 for part in tops for name in ("top1", *others)}
        | {f"{part}/{name}_high": 0.9 for part in tops for name in ("top1", *others)}
        | {"val/top1": 0.4}
        | {"best/val_loss": 1100 / 7, "best/val_top1": 0.75, "best/epoch": 11.0}
    )
    names = {file.path for file in client.list_artifacts(state["mlflow_run_id"])}
    assert names == {"report.html", "plan.yaml", "scores.json", "curves.csv"}
    copies = list((run.parent / "mlartifacts").glob("*/artifacts/report.html"))
    assert [copy.read_text() for copy in copies] == ["<p>done</p>"]
    assert (state["sent_rows"], state["sent_params"], state["sent_scores"], state["finished"]) == (
        1204,
        True,
        True,
        True,
    )


def test_a_row_is_sent_once_it_is_there_to_stay_and_a_resume_continues_the_same_run(run, empty_store):
    shutil.copy(empty_store, run.parent)
    first = tracker_of(run, [])
    first.start()
    append(run, rows_of("train/loss", range(1200, 1300)))  # of an epoch that never ends
    assert not first.close("KILLED", deadline_seconds=30)
    first_id = state_of(run)["mlflow_run_id"]
    assert steps_of(run) == list(range(1200))
    (run / "curves.csv").write_text(HEADER + rows_of("train/loss", range(1200)))  # the resume rewinds
    second = tracker_of(run, [])
    second.start()
    append(run, rows_of("train/loss", range(1200, 1350)))
    second.notify()
    wait_until(lambda: state_of(run)["sent_rows"] == 1350)
    assert client_of(run).get_run(first_id).info.status == "RUNNING"
    assert not second.close("FINISHED", deadline_seconds=30)
    assert state_of(run)["mlflow_run_id"] == first_id
    assert steps_of(run) == list(range(1350))
    stored = client_of(run).get_run(first_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.tags["stage/head"] == "from step 0"


@pytest.mark.parametrize("does_restart", [False, True], ids=["same process", "next process"])
def test_rows_that_training_took_back_lead_to_a_new_mlflow_run(run, empty_store, does_restart):
    shutil.copy(empty_store, run.parent)
    tracker = tracker_of(run, [])
    tracker.start()
    wait_until(lambda: state_of(run)["sent_rows"] == 1200)
    first_id = state_of(run)["mlflow_run_id"]
    if does_restart:
        assert not tracker.close("KILLED", deadline_seconds=30)
    rewritten = run / "rewritten"
    rewritten.write_text(HEADER + rows_of("train/loss", range(100)) + rows_of("train/loss", range(200, 1400)))
    rewritten.replace(run / "curves.csv")  # longer than before, and other rows from the 101st on
    if does_restart:
        tracker = tracker_of(run, [])
        tracker.start()
    tracker.notify()
    assert not tracker.close("FINISHED", deadline_seconds=30)
    second_id = state_of(run)["mlflow_run_id"]
    assert second_id != first_id
    assert steps_of(run) == [*range(100), *range(200, 1400)]
    old = client_of(run).get_run(first_id)
    assert (old.info.status, old.data.tags["finetune.replaced_by"]) == ("KILLED", second_id)


def test_an_answer_that_is_lost_leaves_no_row_twice_and_no_second_run(run, empty_store, monkeypatch):
    shutil.copy(empty_store, run.parent)
    mlflow_store.prepare_mlflow()
    from mlflow import MlflowClient

    def deaf(method):
        def call(*args, **kwargs):
            method(*args, **kwargs)
            raise ConnectionResetError("the answer was lost")

        return call

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", deaf(MlflowClient.create_run))
        tracker = tracker_of(run, said := [])
        tracker.start()
        wait_until(lambda: said)
        assert not tracker.close("FINISHED", deadline_seconds=30)
    append(run, rows_of("train/loss", range(1200, 1300)))
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", deaf(MlflowClient.log_batch))
        assert send_remaining(run, said.append).rows == 100
    os.utime(run / "curves.csv", (1, 1))  # a later look at the file sees another time
    assert not send_remaining(run, pytest.fail)
    assert steps_of(run) == list(range(1300))
    assert len(client_of(run).search_runs(["1"])) == 1
    assert len(said) == 2


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.slow
def test_a_sender_killed_before_or_after_any_of_its_steps_leaves_each_row_once(tmp_path, empty_store, monkeypatch):
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs")
    mlflow_store.prepare_mlflow()
    from mlflow import MlflowClient

    monkeypatch.setattr(tracker_module, "CHUNK_ROWS", 4)
    steps = [(MlflowClient, name) for name in ("create_run", "log_batch", "set_terminated")]
    steps += [(state_module.SentState, "save")]
    left = [0, False]  # steps until the kill, and whether it comes after the step

    def deadly(method):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and not left[1]:
                raise Killed
            answer = method(*args, **kwargs)
            if left[0] == 0:
                raise Killed
            return answer

        return call

    for home, name in steps:
        monkeypatch.setattr(home, name, deadly(getattr(home, name)))
    kills = 0
    for number in range(1, 100):
        for comes_after in (False, True):
            folder = tmp_path / "runs" / f"killed-{number}-{comes_after}"
            folder.mkdir()
            (folder / "curves.csv").write_text(HEADER + rows_of("train/loss", range(10)))
            (folder / "scores.json").write_text(json.dumps(SCORES))
            left[:] = [0, False]
            tracker = tracker_of(folder, [])
            tracker._save()
            tracker._end("FINISHED")
            left[:] = [number, comes_after]
            with suppress(Killed):
                tracker._attempt(is_last=True, reopens=True)
            is_over = left[0] > 0
            kills += not is_over
            left[:] = [0, False]
            os.utime(folder / "curves.csv", (1, 1))  # a later look at the file sees another time
            assert not send_remaining(folder, pytest.fail)
            client, state = client_of(folder), state_of(folder)
            assert steps_of(folder) == list(range(10)), (number, comes_after)
            assert len(client.get_metric_history(state["mlflow_run_id"], "test/top1")) == 1
            assert client.get_run(state["mlflow_run_id"]).info.status == "FINISHED"
        if is_over:
            break
    assert kills > 20
    assert len(client.search_runs([state_id(client)], max_results=1000)) == kills + 2


def state_id(client):
    return client.get_experiment_by_name("flowers").experiment_id


def test_a_store_made_anew_gets_the_whole_run_again(run, empty_store):
    shutil.copy(empty_store, run.parent)
    for _ in range(2):
        tracker = tracker_of(run, [])
        tracker.start()
        assert not tracker.close("FINISHED", deadline_seconds=30)
        assert steps_of(run) == list(range(1200))
        client_of(run)._tracking_client.store.engine.dispose()
        shutil.copy(empty_store, run.parent)


def test_files_that_changed_are_sent_again_and_others_are_not(run, empty_store):
    shutil.copy(empty_store, run.parent)
    tracker = tracker_of(run, [])
    tracker.start()
    assert not tracker.close("FINISHED", deadline_seconds=30)
    (copy,) = (run.parent / "mlartifacts").glob("*/artifacts/plan.yaml")
    copy.write_text("ours")
    (run / "report.html").write_text("new")
    assert not send_remaining(run, pytest.fail)
    assert (copy.with_name("report.html").read_text(), copy.read_text()) == ("new", "ours")


def test_a_dead_port_costs_one_warning_and_no_time(run):
    said = []
    tracker = tracker_of(run, said, f"http://me:secret@127.0.0.1:{free_port()}")
    tracker.start()
    wait_until(lambda: said)
    tracker.notify()
    started = time.monotonic()
    unsent = tracker.close("FINISHED", deadline_seconds=10)
    assert time.monotonic() - started < 3
    assert (unsent.rows, unsent.files) == (1200, ("plan.yaml", "curves.csv"))
    assert "refused" in unsent.reason
    assert len(said) == 1
    assert "secret" not in said[0] + unsent.reason
    assert str(run) in said[0]
    assert send_remaining(run, said.append).rows == 1200
    assert len(said) == 2


def test_a_hanging_server_delays_nobody(run):
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        tracker = tracker_of(run, [], f"http://127.0.0.1:{hanging.getsockname()[1]}")
        tracker.start()
        hanging.settimeout(20)
        request, _ = hanging.accept()  # it has asked, and waits for an answer
        seconds = []
        for _ in range(200):
            started = time.perf_counter()
            tracker.notify()
            seconds.append(time.perf_counter() - started)
        assert sorted(seconds)[100] < 1e-3
        started = time.monotonic()
        unsent = tracker.close("KILLED", deadline_seconds=0.5)
        assert time.monotonic() - started < 1.0
        assert (unsent.rows, unsent.reason) == (1200, "not done within 0.5 s")
        request.close()
    tracker._thread.join(10)
    assert not tracker._thread.is_alive()
    assert state_of(run)["status"] == "KILLED"


@pytest.mark.parametrize("answer", [(500, b"broken"), (200, b"<html>hello</html>"), (200, b"{}")], ids=str)
def test_a_server_that_answers_nonsense_costs_one_warning(run, answer):
    class Nonsense(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nonsense) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tracker = tracker_of(run, said := [], f"http://127.0.0.1:{server.server_port}")
        tracker.start()
        wait_until(lambda: said)
        unsent = tracker.close("FINISHED", deadline_seconds=10)
        server.shutdown()
    assert unsent.rows == 1200
    assert unsent.reason
    assert unsent.reason != "the sender died"
    assert len(said) == 1


def test_a_disk_on_which_no_store_can_be_made_costs_one_warning_and_leaves_no_half_store(run):
    tracker = tracker_of(run, said := [])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # an empty store has some 950 kB
    try:
        tracker.start()
        wait_until(lambda: said)
        assert tracker.close("FINISHED", deadline_seconds=30).rows == 1200
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == 1
    assert not (run.parent / "mlflow.db").exists()
    assert not send_remaining(run, pytest.fail)
    assert steps_of(run) == list(range(1200))


def test_a_store_is_made_in_memory_of_which_nothing_is_left(tmp_path, monkeypatch):
    mlflow_store.prepare_mlflow()
    name = uuid.uuid4()
    monkeypatch.setattr(uuid, "uuid4", lambda: name)
    with mlflow_store.mlflow_environment("sqlite:///", None):
        mlflow_store.create_store(tmp_path / "one.db")
    with closing(sqlite3.connect(f"file:{name.hex}?mode=memory&cache=shared", uri=True)) as memory:
        assert memory.execute("select count(*) from sqlite_master").fetchone() == (0,)
    with closing(sqlite3.connect(tmp_path / "one.db")) as stored:
        assert stored.execute("select count(*) from sqlite_master").fetchone() > (50,)


def test_off_does_nothing_and_an_untracked_folder_has_nothing_to_send(run):
    tracker = tracker_of(run, [], "off")
    tracker.start()
    tracker.notify()
    assert not tracker.close("FINISHED")
    assert not send_remaining(run, pytest.fail)
    assert not (run / "tracking.json").exists()


def test_a_half_written_line_is_read_when_it_is_whole(tmp_path):
    (tmp_path / "curves.csv").write_text(HEADER + "head,0,1,val/loss,0.5\nhead,0,2,val/lo")
    curves = state_module.CurveReader(tmp_path)
    assert [(row.step, row.value) for row in curves.new_rows()] == [(1, 0.5)]
    append(tmp_path, "ss,0.25\nhead,,,damaged,\nhead,1,3,val/loss,nan\n")
    assert [(row.number, row.step) for row in curves.new_rows()] == [(1, 2), (3, 3)]
    (tmp_path / "curves.csv").write_text(HEADER + "head,0,1,val/loss,0.5\n")
    assert [(row.number, row.step) for row in curves.new_rows()] == [(0, 1)]


def test_the_environment_is_lent_and_the_users_own_patience_wins(run, empty_store, monkeypatch):
    shutil.copy(empty_store, run.parent)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "false")
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    before = dict(os.environ)
    tracker = tracker_of(run, [])
    tracker.start()
    held = {name: os.environ.get(name) for name in (*QUIET, *mlflow_store.PATIENCE)}
    assert not tracker.close("FINISHED", deadline_seconds=30)
    assert held == {**QUIET, **mlflow_store.PATIENCE, "MLFLOW_HTTP_REQUEST_TIMEOUT": "77"}
    assert dict(os.environ) == before


FOLLOW = """
    import sys, time
    from pathlib import Path
    from finetune.tracking.tracker import Tracker, default_uri
    folder = Path(sys.argv[1])
    tracker = Tracker(folder, uri=default_uri(folder.parent), experiment="e", run_name="r", tags={}, warn=print)
    tracker.start()
    if sys.argv[2] == "stay":
        time.sleep(60)
    print(tracker.close("FINISHED", 60))
"""


def follow(folder, how):
    root = tracker_module.__file__.rsplit("/finetune/", 1)[0]
    command = [sys.executable, "-c", textwrap.dedent(FOLLOW), str(folder), how]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_two_processes_make_one_store(run):
    other = run.with_name("flowers-other")
    shutil.copytree(run, other)
    both = [follow(folder, "end") for folder in (run, other)]
    assert [process.communicate(timeout=120)[0] for process in both] == ["Unsent(rows=0, files=(), reason=None)\n"] * 2
    assert steps_of(run) == steps_of(other) == list(range(1200))
    assert not (run.parent / "mlflow.db.new").exists()


@pytest.mark.slow
def test_a_killed_process_is_followed_by_one_that_sends_the_rest_once(run):
    process = follow(run, "stay")
    wait_until(lambda: (run / "tracking.json").exists() and state_of(run)["sent_rows"] >= 500, seconds=60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    append(run, rows_of("train/loss", range(1200, 1300)))
    killed = state_of(run)["mlflow_run_id"]
    assert not send_remaining(run, pytest.fail)
    assert state_of(run)["mlflow_run_id"] == killed
    assert steps_of(run) == list(range(1300))
    assert not state_of(run)["finished"]  # no scores: it may yet be resumed


@pytest.mark.slow
def test_a_server_killed_midway_gets_the_rest_when_it_is_back(run):
    port = free_port()

    def serve():
        command = [*ui_command(run.parent, port), "--workers", "1"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def kill(server):
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()

    def answers():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    server = serve()
    try:
        wait_until(answers, seconds=300)
        tracker = tracker_of(run, said := [], f"http://127.0.0.1:{port}")
        tracker.start()
        wait_until(lambda: state_of(run)["sent_rows"] == 1200, seconds=60)
        kill(server)
        append(run, rows_of("train/loss", range(1200, 1300)))
        (run / "report.html").write_text("<p>done</p>")
        tracker.notify()
        wait_until(lambda: said)
        unsent = tracker.close("FINISHED", deadline_seconds=10)
        assert (unsent.rows, unsent.files) == (100, ("report.html", "plan.yaml", "curves.csv"))
        server = serve()
        wait_until(answers, seconds=300)
        assert not send_remaining(run, pytest.fail)
        assert len(said) == 1
        assert steps_of(run) == list(range(1300))
        stored = client_of(run).get_run(state_of(run)["mlflow_run_id"])
        assert stored.info.status == "FINISHED"
        assert [copy.read_text() for copy in (run.parent / "mlartifacts").rglob("report.html")] == ["<p>done</p>"]
    finally:
        kill(server)


@pytest.mark.slow
def test_the_ui_shows_the_runs_of_the_embedded_store_and_their_files(run):
    import urllib.request

    (run / "report.html").write_text("<p>done</p>")
    tracker = tracker_of(run, [])
    tracker.start()
    assert not tracker.close("FINISHED", deadline_seconds=60)
    port, run_id = free_port(), state_of(run)["mlflow_run_id"]
    command = [*ui_command(run.parent, port), "--workers", "1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, start_new_session=True, **quiet)

    def get(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
            return answer.read().decode()

    def is_up():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(is_up, seconds=300)
        assert json.loads(get(f"api/2.0/mlflow/runs/get?run_id={run_id}"))["run"]["info"]["status"] == "FINISHED"
        assert get(f"get-artifact?path=report.html&run_uuid={run_id}") == "<p>done</p>"
        assert re.search("<title>MLflow", get(""))
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_each_value_of_each_stage_is_a_parameter_of_its_own():
    plan = {"seed": 0, "stages": [{"lr_head": 0.1}, {"schedule": {"name": "cosine"}}], "reasons": [{"key": "seed"}]}
    told = dict(state_module.flatten_plan(plan))
    assert told == {
        "seed": "0",
        "stages.0.lr_head": "0.1",
        "stages.1.schedule.name": "cosine",
        "reasons": '[{"key": "seed"}]',
    }
