"""The command line, run as a user runs it."""

import sys

import pytest

from finetune import cli


def command(monkeypatch, capsys, *words):
    """Exit code, and what was said, of the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["finetune", *map(str, words)])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    return leave.value.code, capsys.readouterr().err
