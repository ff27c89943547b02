"""MLflow's door: its import, its embedded store, and what is found in it. Nothing is imported before it is needed."""

import logging
import os
import sqlite3
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import yaml

from finetune.compute import open_to_lock, try_lock
from finetune.config.addresses import Login, is_web, join_login
from finetune.process import QUIET, lend_environment, lend_levels
from finetune.runs.folder import write_whole
from finetune.tracking.state import SentState

PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the follower tries again itself, between passes
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
}
"""How long the follower waits and how much MLflow may say of it, where the user has not set them."""
_NO_POOL = {"MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool"}  # MLflow keeps what it has opened; this keeps no connection


@contextmanager
def mlflow_environment(uri: str, login: Login | None) -> Iterator[None]:
    """What MLflow must find in the environment while we use it; the caller's own use has its own back afterwards.

    Args:
        uri: of the tracking server.
        login: user and password for it; None leaves them to the environment and to `~/.mlflow/credentials`.
    """
    wanted = {name: os.environ.get(name, value) for name, value in PATIENCE.items()}
    if login is not None and is_web(uri):
        wanted |= {"MLFLOW_TRACKING_USERNAME": login.user, "MLFLOW_TRACKING_PASSWORD": login.password}
    own = logging.getLogger("mlflow").level if "mlflow" in sys.modules else logging.INFO  # as its import sets it
    levels = {"mlflow": own, "alembic": logging.getLogger("alembic").level}
    with lend_environment({**QUIET, **wanted}), lend_levels(levels):
        told = logging.getLevelName(wanted["MLFLOW_LOGGING_LEVEL"].upper())
        if isinstance(told, int):  # MLflow reads the variable at its import, which may have been long ago
            logging.getLogger("mlflow").setLevel(told)
        yield


def hush_mlflow() -> None:
    """Let no warning of MLflow's own be shown; who calls it holds the filters (`lend_filters`), or owns the process.

    Not `catch_warnings`: the sender's thread would put back the filters of whatever the main thread does meanwhile.
    """
    warnings.filterwarnings("ignore", module=r"mlflow(\.|$)")


def prepare_mlflow() -> tuple[type[Exception], ...]:
    """Import MLflow; what its stores and clients raise when the other side is to blame."""
    hush_mlflow()
    import requests
    import sqlalchemy.exc
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException

    logging.getLogger("alembic").setLevel(logging.WARNING)
    damaged = (yaml.YAMLError, ValueError)  # a file of the folder, an answer, an MLFLOW_ variable
    database = (sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, CommandError)
    return MlflowException, requests.RequestException, OSError, *database, *damaged


def open_client(uri: str, login: Login | None = None) -> Any:
    """A client of the store; the embedded one is made if need be. A database takes its login in its address."""
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        create_store(database_path(uri))
    return MlflowClient(tracking_uri=uri if login is None or is_web(uri) else join_login(uri, login))


def database_path(uri: str) -> Path:
    """The file of an embedded store."""
    return Path(uri.removeprefix("sqlite:///"))


def artifact_root(database: Path) -> str:
    """Where an embedded store keeps files."""
    return (database.resolve().parent / "mlartifacts").as_uri()


def create_store(database: Path) -> None:
    """Make the embedded store if it is not there: all of it or nothing, and once, whoever else asks.

    MLflow's fifty migrations take 6 s on a disk and 1 s in memory. Written out in one piece and renamed, the
    store is also never left half-migrated by a process that is killed.
    """
    if database.exists():
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with lock_store(database.with_name(f"{database.name}.lock"), seconds=60.0):
        if database.exists():
            return
        from mlflow import MlflowClient

        name = f"file:{uuid.uuid4().hex}?mode=memory&cache=shared"  # of this process; gone with its last connection
        with closing(sqlite3.connect(name, uri=True)) as memory, lend_environment(_NO_POOL):
            MlflowClient(tracking_uri=f"sqlite:///{name}&uri=true").get_experiment_by_name("Default")
            write_whole(database, lambda temporary: memory.execute("VACUUM INTO ?", (str(temporary),)))


def experiment_id(client: Any, state: SentState) -> str:
    """The experiment of that name, made if need be."""
    from mlflow.exceptions import MlflowException

    root = artifact_root(database_path(state.uri)) if state.uri.startswith("sqlite:///") else None
    try:
        known = client.get_experiment_by_name(state.experiment)
        return str(known.experiment_id if known else client.create_experiment(state.experiment, root))
    except MlflowException as fault:
        if fault.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return str(client.get_experiment_by_name(state.experiment).experiment_id)  # another process was faster


def has_run(client: Any, run_id: str) -> bool:
    """Whether the store knows the run."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id))
    except MlflowException as fault:
        if fault.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


@contextmanager
def lock_store(path: Path, *, seconds: float) -> Iterator[None]:
    """Hold the lock of a file or folder, which the kernel releases if we are killed.

    Raises:
        TimeoutError: if somebody else holds it for longer than `seconds`.
    """
    if (handle := open_to_lock(path)) is None:  # MLflow does not lock either
        yield
        return
    try:
        deadline = time.monotonic() + seconds
        while not try_lock(handle):
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process has held {path} for {seconds:g} s")
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)
