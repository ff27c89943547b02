"""The tracker: a follower of the run folder that tells MLflow what the folder already holds.

Everything measured is written to the run folder first; `tracking.json` remembers how much of it MLflow has.
So a dead server or a killed process loses nothing: whoever follows next goes on at the same MLflow run.
MLflow costs seconds to import and any request may hang, so both happen in a thread of their own; training
only ever sets an event.

MLflow takes no row back, so it gets each row once. A row is sent when the state of training that it belongs to is on
disk: no resume will write it again. Its step runs on over the stages, so no two rows of a metric are alike. It bears
the time at which it was seen in the file, and the times of a chunk are saved before it is sent: sent again after a lost
answer it is the same to the last bit, and MLflow's database drops it. Where training itself took rows back (it diverged
and began anew), a new MLflow run gets what the folder now holds.
"""

import math
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.config.addresses import HOW_TO_LOG_IN, Login, hide_logins, login_from_environment, split_login
from finetune.process import lend_filters
from finetune.runs.folder import RunFolder
from finetune.tracking.mlflow_store import (
    artifact_root,
    experiment_id,
    has_run,
    hush_mlflow,
    lock_store,
    mlflow_environment,
    open_client,
    prepare_mlflow,
)
from finetune.tracking.state import (
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
    A folder that was sent to the same uri before continues its MLflow run. A login, given apart or in the uri, is
    kept in memory; without one it is that of the environment.
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
        login: Login | None = None,
    ) -> None:
        uri, own = split_login(uri)
        self._login = login or own or login_from_environment(uri)
        self._folder, self._file, self._warn = run_folder, run_folder / "tracking.json", warn
        self._environment, self._whole_bytes = ExitStack(), math.inf
        self._state = SentState(uri=uri, experiment=experiment, run_name=run_name, tags=dict(tags))
        self._curves, self._waiting = CurveReader(run_folder), list[CurveRow]()
        self._client: Any = None
        self._reason: str | None = None
        self._wake, self._closing, self._mutex = threading.Event(), threading.Event(), threading.RLock()
        self._thread = threading.Thread(target=self._run, name="finetune-tracking", daemon=True)

    def start(self) -> None:
        """Begin to follow; call it after `resume` has cut the curves, and before the first row is written."""
        fresh, earlier = self._state, SentState.load(self._file)
        if fresh.uri == OFF:
            return
        if earlier and (earlier.uri, earlier.experiment) == (fresh.uri, fresh.experiment):
            self._state = earlier
            earlier.status, earlier.ended_ms, earlier.finished = None, None, False
        self._environment.enter_context(mlflow_environment(fresh.uri, self._login))
        self._environment.enter_context(lend_filters())
        hush_mlflow()  # here too: what the main thread puts back meanwhile are then filters that hold it
        self.notify()
        self._look()
        with suppress(OSError):  # a full disk is the sender's to report: it saves before it sends
            self._save()
        self._thread.start()

    def notify(self) -> None:
        """Say that what the folder holds now is there to stay: no resume takes it back. Never blocks."""
        curves = self._folder / "curves.csv"
        self._whole_bytes = curves.stat().st_size if curves.exists() else 0
        self._wake.set()

    def close(self, status: str, deadline_seconds: float = 10.0) -> Unsent:
        """Send the rest and end the MLflow run as `status` (FINISHED, FAILED or KILLED); what was not sent.

        Returns by the deadline whatever the server does: the thread is a daemon, and keeps nobody waiting.
        """
        if not self._thread.ident:
            return Unsent()
        if status == "FINISHED":
            self.notify()
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
        seen = self._curves.count
        rows = list(self._curves.new_rows(self._whole_bytes))
        was_rewritten = self._curves.count < seen or bool(rows and rows[0].number < seen)
        self._waiting = rows if was_rewritten else self._waiting + rows
        if (was_rewritten or not seen) and self._were_taken_back(rows):
            self._begin_anew()

    def _were_taken_back(self, rows: list[CurveRow]) -> bool:
        """Whether `rows`, the first ones of the file, are others than those that MLflow has or may have."""
        told = [row.chain for row in rows if row.number < self._state.told_rows]
        return self._curves.count < max(self._state.sent_rows, self._state.told_rows) or (
            bool(self._state.told_chain) and told[-1:] != [self._state.told_chain]
        )

    def _begin_anew(self) -> None:
        """Send the folder whole, to a new MLflow run."""
        with self._mutex:
            old = self._state
            self._state = SentState(uri=old.uri, experiment=old.experiment, run_name=old.run_name, tags=old.tags)
            self._state.replaced = [*old.replaced, *filter(None, [old.mlflow_run_id])]
            self._state.status, self._state.ended_ms = old.status, old.ended_ms
            with suppress(OSError):  # the sender saves before it sends
                self._save()
        self._client, self._curves = None, CurveReader(self._folder)
        self._waiting = list(self._curves.new_rows(self._whole_bytes))

    def _unsent(self, otherwise: str) -> Unsent:
        """Counted afresh from the folder, so that it holds even while the sender hangs."""
        state, rows = self._state, count_rows(self._folder, self._whole_bytes)
        files = tuple(
            name for name, digest in artifact_digests(self._folder) if state.artifacts_sent.get(name) != digest
        )
        if rows <= state.sent_rows and not files and (state.finished or not state.status):
            return Unsent()
        return Unsent(rows=max(0, rows - state.sent_rows), files=files, reason=self._reason or otherwise)

    def _run(self) -> None:
        with self._environment:  # given back when the last request is over, however long it hangs
            self._follow()

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
        is_refused = re.search(r"\b(401|403)\b|nauthorized|not authenticated", self._reason or "")
        log_in = f"To log in, {HOW_TO_LOG_IN}. " if is_refused else ""
        return (
            f"MLflow at {self._state.uri} does not take this run ({self._reason}). {log_in}Nothing is lost: "
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
            self._reason = cut_text(" ".join(hide_logins(str(fault)).split()), 300) or type(fault).__name__

    def _refresh(self) -> None:
        """Take over what another process has sent since our last pass."""
        with self._mutex:
            latest, ours = SentState.load(self._file), self._state
            if latest and latest.key == ours.key:
                latest.status, latest.ended_ms = ours.status, ours.ended_ms
                self._state = latest

    def _send(self, *, is_last: bool, reopens: bool) -> None:
        if self._client is None:
            self._client = self._connect()
            if reopens and not is_last:
                self._client.update_run(self._state.mlflow_run_id, status="RUNNING")
        state = self._state
        self._send_rows(state)
        self._send_params(state)
        if is_last:
            self._send_scores(state)
            self._send_artifacts(state)
            if state.status and not state.finished:
                self._client.set_terminated(state.mlflow_run_id, status=state.status, end_time=state.ended_ms)
                state.finished = True
            self._save()

    def _connect(self) -> Any:
        client = open_client(self._state.uri, self._login)
        if self._state.mlflow_run_id and not has_run(client, self._state.mlflow_run_id):
            self._begin_anew()  # somebody made the store anew
        state = self._state
        if not state.mlflow_run_id:
            experiment, query = experiment_id(client, state), f"tags.`finetune.run_key` = '{state.key}'"
            found = client.search_runs([experiment], filter_string=query, max_results=1)
            tags = {**state.tags, "finetune.run_key": state.key}
            run = found[0] if found else client.create_run(experiment, tags=tags, run_name=state.run_name)
            if not run.info.run_id:
                raise ValueError("the server answers, but not as MLflow does: it made a run without an id")
            state.mlflow_run_id = run.info.run_id
            self._save()
        for old in filter(lambda run_id: has_run(client, run_id), state.replaced):
            client.set_tag(old, "finetune.replaced_by", state.mlflow_run_id)
            client.set_terminated(old, status="KILLED")
        state.replaced = []
        return client

    def _send_rows(self, state: SentState) -> None:
        while waiting := [row for row in self._waiting if row.number >= state.sent_rows]:
            chunk = waiting[:CHUNK_ROWS]
            remembered = state.chunk_times_ms[: len(chunk)]
            state.chunk_times_ms = remembered + [row.time_ms for row in chunk[len(remembered) :]]
            state.told_rows, state.told_chain = chunk[-1].number + 1, chunk[-1].chain
            self._save()
            stages = {row.stage: row.step for row in reversed(chunk) if row.stage not in state.sent_stages}
            self._log([(row.name, row.value, row.step) for row in chunk], state.chunk_times_ms, stages)
            state.sent_rows, state.chunk_times_ms = chunk[-1].number + 1, []
            state.sent_stages = [*state.sent_stages, *reversed(stages)]
            self._save()
            self._waiting = waiting[len(chunk) :]
        state.sent_rows = max(state.sent_rows, self._curves.count)

    def _log(
        self, metrics: list[tuple[str, float, int]], times_ms: list[int], stages: Mapping[str, int] | None = None
    ) -> None:
        from mlflow.entities import Metric, RunTag

        batch = [Metric(*metric[:2], time_ms, metric[2]) for metric, time_ms in zip(metrics, times_ms, strict=True)]
        tags = [RunTag(f"stage/{name}", f"from step {step}") for name, step in (stages or {}).items()]
        self._client.log_batch(self._state.mlflow_run_id, metrics=batch, tags=tags)

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
        finals = [(name, value, last_step) for name, value in final_values(RunFolder(self._folder).scores)]
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
        with mlflow_environment(state.uri, tracker._login):
            tracker._attempt(is_last=True, reopens=False)
        if tracker._reason:
            warn(tracker._complaint())
    return tracker._unsent("stopped early")
