"""Runs altered after they were made."""

import shutil

from finetune.runs.folder import RunFolder


def altered(run, tmp_path, **changes):
    """A copy of a run with another plan."""
    copy = RunFolder(tmp_path / "altered")
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("last.ckpt", "report.html"))
    copy.write_text("plan.yaml", run.plan.model_copy(update=changes).to_yaml())
    return copy
