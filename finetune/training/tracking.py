"""The tracker: a follower of the run folder that tells MLflow what the folder already holds.

Everything measured is written to the run folder first; `tracking.json` remembers how much of it MLflow has.
So a dead server or a killed process loses nothing: whoever follows next goes on at the same MLflow run.
MLflow costs seconds to import and any request may hang, so both happen in a thread of their own; training
only ever sets an event.

A metric bears the time at which its row was seen in the file. The times of a chunk are saved before it is
sent: sent again after a lost answer it is the same to the last bit, and MLflow's database drops it.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.training.ledger import (
    CurveReader,
    CurveRow,
    SentState,
    artifact_digests,
    best_values,
    count_rows,
    cut_text,
    file_digest,
    final_values,
    flatten_plan,
    without_password,
)
from finetune.training.mlflow_store import (
    artifact_root,
    experiment_id,
    has_run,
    lock_store,
    open_client,
    prepare_mlflow,
)

OFF = "off"
"""The uri that says: no tracking. Nothing is sent, and no `tracking.json` is written."""
CHUNK_ROWS = 500
WAKE_SECONDS = 3.0
GATHER_SECONDS = 0.5
"""Rows that come in quick succession wait this long for each other: one request, one commit."""
LONGEST_PAUSE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Unsent:
    """What the tracking server does not have yet: rows of curves.csv, and files. False where nothing is left."""

    rows: int = 0
    files: tuple[str, ...] = ()
    reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self.rows or self.files or self.reason)


def default_uri(runs_folder: Path) -> str:
    """The embedded store: an SQLite file beside the runs."""
    return f"sqlite:///{runs_folder.resolve() / 'mlflow.db'}"


def ui_command(runs_folder: Path, port: int) -> list[str]:
    """The command that serves the embedded store on 127.0.0.1; Ctrl-C stops it."""
    store = ["--backend-store-uri", default_uri(runs_folder)]
    store += ["--artifacts-destination", artifact_root(runs_folder / "mlflow.db")]
    return [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(port)]


class Tracker:
    """Sends one run folder to MLflow while it is being written. Only `close` ever waits.

    With the uri `off` every method does nothing. `warn` is called at most once, from the sender's thread.
    A folder that was sent to the same uri before continues its MLflow run.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        uri: str,
        experiment: str,
        run_name: str,
        tags: Mapping[str, str],
        warn: Callable[[str], None],
    ) -> None:
        self._folder, self._file, self._warn = run_folder, run_folder / "tracking.json", warn
        self._state = SentState(uri=uri, experiment=experiment, run_name=run_name, tags=dict(tags))
        self._curves, self._waiting = CurveReader(run_folder), list[CurveRow]()
        self._client: Any = None
        self._reason: str | None = None
        self._wake, self._closing, self._mutex = threading.Event(), threading.Event(), threading.RLock()
        self._thread = threading.Thread(target=self._follow, name="finetune-tracking", daemon=True)

    def start(self) -> None:
        """Begin to follow; call it after `resume` has cut the curves, and before the first row is written."""
        fresh, earlier = self._state, SentState.load(self._file)
        if fresh.uri == OFF:
            return
        if earlier and (earlier.uri, earlier.experiment) == (fresh.uri, fresh.experiment):
            self._state = earlier
            earlier.status, earlier.ended_ms, earlier.finished = None, None, False
        self._look()
        with suppress(OSError):  # a full disk is the sender's to report: it saves before it sends
            self._save()
        self._wake.set()
        self._thread.start()

    def notify(self) -> None:
        """Say that the folder has something new. Never blocks."""
        self._wake.set()

    def close(self, status: str, deadline_seconds: float = 10.0) -> Unsent:
        """Send the rest and end the MLflow run as `status` (FINISHED, FAILED or KILLED); what was not sent.

        Returns by the deadline whatever the server does: the thread is a daemon, and keeps nobody waiting.
        """
        if not self._thread.ident:
            return Unsent()
        self._end(status)
        self._closing.set()
        self._wake.set()
        self._thread.join(max(0.0, deadline_seconds))
        return self._unsent(f"not done within {deadline_seconds:g} s" if self._thread.is_alive() else "the sender died")

    def _end(self, status: str) -> None:
        with self._mutex:
            self._state.status, self._state.ended_ms = status, time.time_ns() // 1_000_000
            with suppress(OSError):
                self._save()

    def _save(self) -> None:
        with self._mutex:
            self._state.save(self._file)

    def _look(self) -> None:
        """Read new rows, and with them the time."""
        rows = list(self._curves.new_rows())
        was_rewritten = bool(rows and self._waiting) and rows[0].number <= self._waiting[-1].number
        self._waiting = rows if was_rewritten else self._waiting + rows
        if self._curves.count < self._state.sent_rows:  # `resume` has cut the file: the rows that follow are new
            self._state.sent_rows, self._state.chunk_times_ms = self._curves.count, []

    def _unsent(self, otherwise: str) -> Unsent:
        """Counted afresh from the folder, so that it holds even while the sender hangs."""
        state, rows = self._state, count_rows(self._folder)
        files = tuple(
            name for name, digest in artifact_digests(self._folder) if state.artifacts_sent.get(name) != digest
        )
        if rows <= state.sent_rows and not files and (state.finished or not state.status):
            return Unsent()
        return Unsent(rows=max(0, rows - state.sent_rows), files=files, reason=self._reason or otherwise)

    def _follow(self) -> None:
        failures, retry_at, has_warned = 0, 0.0, False
        while True:
            self._wake.wait(WAKE_SECONDS)
            self._closing.wait(GATHER_SECONDS)
            self._wake.clear()
            is_closing = self._closing.is_set()  # asked before the pass: the last pass sees everything
            if is_closing or time.monotonic() >= retry_at:
                self._attempt(is_last=is_closing, reopens=True)
                if self._reason and not has_warned:
                    has_warned = True
                    self._warn(self._complaint())
                failures = failures + 1 if self._reason else 0
                retry_at = time.monotonic() + min(2.0 ** (failures - 1), LONGEST_PAUSE_SECONDS) if failures else 0.0
            else:
                self._look()
            if is_closing:
                return

    def _complaint(self) -> str:
        return (
            f"MLflow at {without_password(self._state.uri)} does not take this run ({self._reason}). Nothing is lost: "
            f"all is in {self._folder}, and `finetune report {self._folder}` sends later what could not be sent."
        )

    def _attempt(self, *, is_last: bool, reopens: bool) -> None:
        """One pass over the folder. All that a server or a store may raise ends here, as a reason."""
        try:
            errors = prepare_mlflow()
        except ImportError as fault:
            self._reason = f"mlflow cannot be imported: {fault}"
            return
        try:
            with lock_store(self._folder, seconds=5.0):
                self._refresh()
                self._look()
                self._send(is_last=is_last, reopens=reopens)
            self._reason = None
        except errors as fault:
            self._client = None  # the next pass connects anew, and asks whether the run is still there
            self._reason = cut_text(" ".join(without_password(str(fault)).split()), 300) or type(fault).__name__

    def _refresh(self) -> None:
        """Take over what another process has sent since our last pass."""
        with self._mutex:
            latest, ours = SentState.load(self._file), self._state
            if latest and latest.key == ours.key:
                latest.status, latest.ended_ms = ours.status, ours.ended_ms
                self._state = latest

    def _send(self, *, is_last: bool, reopens: bool) -> None:
        state = self._state
        if self._client is None:
            self._client = self._connect(state)
            if reopens and not is_last:
                self._client.update_run(state.mlflow_run_id, status="RUNNING")
        self._send_rows(state)
        self._send_params(state)
        if is_last:
            self._send_scores(state)
            self._send_artifacts(state)
            if state.status and not state.finished:
                self._client.set_terminated(state.mlflow_run_id, status=state.status, end_time=state.ended_ms)
                state.finished = True
            self._save()

    def _connect(self, state: SentState) -> Any:
        client = open_client(state.uri)
        if state.mlflow_run_id and not has_run(client, state.mlflow_run_id):  # somebody made the store anew
            state.mlflow_run_id, state.sent_rows, state.chunk_times_ms = None, 0, []
            state.sent_params, state.sent_scores, state.artifacts_sent, state.finished = False, False, {}, False
            self._curves, self._waiting = CurveReader(self._folder), []
            self._look()
        if not state.mlflow_run_id:
            experiment, query = experiment_id(client, state), f"tags.`finetune.run_key` = '{state.key}'"
            found = client.search_runs([experiment], filter_string=query, max_results=1)
            tags = {**state.tags, "finetune.run_key": state.key}
            run = found[0] if found else client.create_run(experiment, tags=tags, run_name=state.run_name)
            if not run.info.run_id:
                raise ValueError("the server answers, but not as MLflow does: it made a run without an id")
            state.mlflow_run_id = run.info.run_id
            self._save()
        return client

    def _send_rows(self, state: SentState) -> None:
        while waiting := [row for row in self._waiting if row.number >= state.sent_rows]:
            chunk = waiting[:CHUNK_ROWS]
            remembered = state.chunk_times_ms[: len(chunk)]
            state.chunk_times_ms = remembered + [row.time_ms for row in chunk[len(remembered) :]]
            self._save()
            self._log([(row.name, row.value, row.step) for row in chunk], state.chunk_times_ms)
            state.sent_rows, state.chunk_times_ms = chunk[-1].number + 1, []
            self._save()
            self._waiting = waiting[len(chunk) :]
        state.sent_rows = max(state.sent_rows, self._curves.count)

    def _log(self, metrics: list[tuple[str, float, int]], times_ms: list[int]) -> None:
        from mlflow.entities import Metric

        batch = [Metric(*metric[:2], time_ms, metric[2]) for metric, time_ms in zip(metrics, times_ms, strict=True)]
        self._client.log_batch(self._state.mlflow_run_id, metrics=batch)

    def _send_params(self, state: SentState) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        plan = self._folder / "plan.yaml"
        if state.sent_params or not plan.exists():
            return
        values = list(flatten_plan(yaml.safe_load(plan.read_text(encoding="utf-8"))))
        for limit in (6000, 500):  # characters; servers before MLflow 2.8 take 500
            params = [Param(name, cut_text(text, limit)) for name, text in values]
            try:
                for first in range(0, len(params), 100):
                    self._client.log_batch(state.mlflow_run_id, params=params[first : first + 100])
                break
            except MlflowException as fault:
                if limit == 500 or fault.error_code != "INVALID_PARAMETER_VALUE":
                    raise
        state.sent_params = True
        self._save()

    def _send_scores(self, state: SentState) -> None:
        path = self._folder / "scores.json"
        if not path.exists() or (state.sent_scores and state.artifacts_sent.get(path.name) == file_digest(path)):
            return
        rows, time_ms = list(CurveReader(self._folder).new_rows()), path.stat().st_mtime_ns // 1_000_000
        last_step = max((row.step for row in rows), default=0)
        finals = [
            (name, value, last_step) for name, value in final_values(json.loads(path.read_text(encoding="utf-8")))
        ]
        finals += best_values(rows)
        self._log(finals, [time_ms] * len(finals))
        state.sent_scores = True
        self._save()

    def _send_artifacts(self, state: SentState) -> None:
        for name, digest in artifact_digests(self._folder):
            if state.artifacts_sent.get(name) != digest:
                self._client.log_artifact(state.mlflow_run_id, str(self._folder / name))
                state.artifacts_sent = {**state.artifacts_sent, name: digest}
                self._save()


def send_remaining(run_folder: Path, warn: Callable[[str], None]) -> Unsent:
    """Send now what an earlier tracker could not, to the same MLflow run; what is still left then.

    Stops at the first request that fails. A folder that was never tracked has nothing to send. An MLflow run
    that nobody ended (the process was killed) is ended as FINISHED where the folder holds scores.
    """
    state = SentState.load(run_folder / "tracking.json")
    if state is None:
        return Unsent()
    tracker = Tracker(run_folder, uri=state.uri, experiment=state.experiment, run_name="", tags={}, warn=warn)
    tracker._state = state
    if not state.status and (run_folder / "scores.json").exists():
        tracker._end("FINISHED")
    if tracker._unsent("not tried yet"):
        tracker._attempt(is_last=True, reopens=False)
        if tracker._reason:
            warn(tracker._complaint())
    return tracker._unsent("stopped early")
