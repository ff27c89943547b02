"""Addresses of tracking servers, and the user and password in them, which no file, page or message may hold.

A login is split off where an address comes in, and lives in memory alone. A later process has it from where MLflow
itself looks: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or `~/.mlflow/credentials`.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

HOW_TO_LOG_IN = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or write them into ~/.mlflow/credentials "
    "(a line [mlflow], then mlflow_tracking_username = ..., mlflow_tracking_password = ...)"
)


class Login(NamedTuple):
    """Who one is to a tracking server."""

    user: str
    password: str

    def __repr__(self) -> str:
        return "Login(***)"


def split_login(uri: str) -> tuple[str, Login | None]:
    """The address without its login, and the login if there is one.

    A slash in a password should be written as %2F; where it is not, what stands before it is no host with a port.
    """
    scheme, found, rest = uri.partition("://")
    if not found or "@" not in rest:
        return uri, None
    authority, slash, path = rest.partition("/")
    if "@" not in authority:
        if re.fullmatch(r"[^:]*(:\d*)?", authority):  # a host, and the @ is part of the path
            return uri, None
        authority, slash, path = rest, "", ""
    login, _, host = authority.rpartition("@")
    user, _, password = login.partition(":")
    return f"{scheme}://{host}{slash}{path}", Login(unquote(user), unquote(password))


def join_login(uri: str, login: Login) -> str:
    """The reverse of `split_login`."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{quote(login.user, safe='')}:{quote(login.password, safe='')}@{rest}"


def without_login(uri: str) -> str:
    """The address as it may be written down."""
    return split_login(uri)[0]


def hide_logins(text: str) -> str:
    """A text with the login of every address in it hidden."""
    return re.sub(r"(?<=://)[^\s\"'<>]*@", "***@", text)


def is_web(uri: str) -> bool:
    """Whether it is an MLflow server; else it is a database or a folder."""
    return uri.startswith(("http://", "https://"))


def uri_from_environment() -> str | None:
    """What MLFLOW_TRACKING_URI says, as an address that holds from every folder and names no login."""
    uri = without_login(os.environ.get("MLFLOW_TRACKING_URI", "").strip())
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    if uri and ":" not in uri:  # a folder; `databricks` is none
        return uri if uri.startswith(("databricks", "uc")) else Path(uri).absolute().as_uri()
    return uri or None


def login_from_environment(uri: str) -> Login | None:
    """The login for `uri` where MLFLOW_TRACKING_URI, or MLflow's variables for it, hold one."""
    named, login = split_login(os.environ.get("MLFLOW_TRACKING_URI", "").strip())
    if login is not None and named.rstrip("/") == uri.rstrip("/"):
        return login
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    return Login(user, password) if user and password else None
