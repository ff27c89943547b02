"""What we set in the process of a Python program is put back: after every call, after an error, with threads."""

import ctypes
import gc
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import finetune as ft
from finetune import errors as ft_errors
from finetune import process
from finetune.process import as_guest, flushes_denormals, put_back_later, quieten

TRACKED = ["backbone=test_resnet.r160_in1k", "pretrained=false", "data.image_size=64", "train.strategy=full",
         "train.epochs=1", "augment.preset=light", "seed=3"]  # fmt: skip
SMALL = [*TRACKED, "tracking.enabled=false"]


def quiet(text):
    pass


def is_given_back():
    """Whether glibc gives a freed block of 64 MB back to the kernel; None where there is no glibc to ask."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None

    class Info(ctypes.Structure):
        _fields_ = [(f"field_{number}", ctypes.c_size_t) for number in range(10)]

    libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    before = libc.mallinfo2().field_3  # blocks that are mapped each for itself
    block = libc.malloc(64 << 20)
    after = libc.mallinfo2().field_3
    libc.free(block)
    return after > before


def speakers(logger):
    """Its handlers but for those that say nothing, which libraries add when they are imported."""
    return [one for one in logger.handlers if not isinstance(one, logging.NullHandler)]


def process_state():
    mask = os.umask(0o077)
    os.umask(mask)
    words, keys, *rest = np.random.get_state()
    known = logging.root.manager.loggerDict.items()
    return {
        "umask": mask,
        "environment": dict(os.environ),
        "socket timeout": socket.getdefaulttimeout(),
        "torch draws": torch.get_rng_state().tolist(),
        "numpy draws": (words, keys.tolist(), rest),
        "python draws": random.getstate(),
        "root logger": (logging.root.level, list(logging.root.handlers)),
        "loggers": {name: (one.level, one.propagate, speakers(one), list(one.filters), one.disabled)
                    for name, one in known if isinstance(one, logging.Logger) and name.split(".")[0] in LOGGERS},
        "denormals": flushes_denormals(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled),
        "tf32": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "cv2": cv2.getNumThreads(),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "garbage": (gc.get_threshold(), gc.isenabled()),
        "hooks": (sys.excepthook, threading.excepthook, sys.stdout, sys.stderr),
        "pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "numpy errors": np.geterr(),
        "path": list(sys.path),
    }  # fmt: skip


LOGGERS = {
    "pytorch_lightning",
    "lightning",
    "mlflow",
    "alembic",
    "sqlalchemy",
    "PIL",
    "timm",
    "torch",
    "albumentations",
}


def differences(before, after):
    met = {**after, "loggers": {name: after["loggers"][name] for name in before["loggers"]}}  # libraries add their own
    return sorted(name for name in before if before[name] != met[name])


@pytest.fixture
def owner():
    """A process whose owner has set everything to his own taste."""
    import mlflow  # noqa: F401 - so that their loggers are there to be compared
    import pytorch_lightning  # noqa: F401

    kept = process_state()
    os.umask(0o027)
    socket.setdefaulttimeout(17.0)
    torch.manual_seed(5), np.random.seed(6), random.seed(7)
    logging.getLogger("pytorch_lightning").setLevel(logging.DEBUG)
    logging.getLogger("alembic").setLevel(logging.DEBUG)
    torch.backends.cudnn.benchmark = True
    torch.set_flush_denormal(False)
    cv2.setNumThreads(2)
    warnings.filterwarnings("ignore", message="the owner's own")
    yield
    os.umask(kept["umask"])
    socket.setdefaulttimeout(kept["socket timeout"])
    for name in ("pytorch_lightning", "alembic"):
        logging.getLogger(name).setLevel(kept["loggers"][name][0] if name in kept["loggers"] else logging.NOTSET)
    torch.backends.cudnn.benchmark = kept["cudnn"][0]
    torch.set_flush_denormal(kept["denormals"])
    cv2.setNumThreads(kept["cv2"])


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    return ft.train(str(shapes), SMALL, runs=tmp_path_factory.mktemp("runs"), say=quiet)


def test_a_training_is_tuned_and_leaves_the_process_as_it_was(shapes, owner, tmp_path):
    meanwhile = []

    def vary(image, draw):
        if not meanwhile:
            meanwhile.append(process_state())
        return image

    before = process_state()
    ft.train(str(shapes), TRACKED, runs=tmp_path, vary=vary, say=quiet)
    for sender in [one for one in threading.enumerate() if one.name == "finetune-tracking"]:
        sender.join()  # it may wait for a slow server, and until then its environment is held for it
    assert differences(before, process_state()) == []
    told = differences(before, meanwhile[0])
    for name in ("denormals", "cudnn", "cv2", "torch draws", "loggers", "warnings"):
        assert name in told


@pytest.mark.skipif(is_given_back() is None, reason="settings of glibc")
def test_memory_is_kept_for_a_guest_alone():
    """In a process of its own, whose heap has no holes and whose thresholds nobody has set."""
    code = """
from test_process import is_given_back
from finetune.process import as_guest
print(is_given_back())
with as_guest():
    print(is_given_back())
print(is_given_back())
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True"]


@pytest.mark.parametrize("flushed", [False, True])
def test_other_public_functions_leave_the_process_as_it_was(finished, shapes, owner, flushed):
    torch.set_flush_denormal(flushed)
    before = process_state()
    for work in (
        lambda: ft.evaluate(finished, say=quiet),
        lambda: ft.predict(finished, shapes / "disc" / "00.png"),
        lambda: ft.plan(str(shapes), SMALL, say=quiet),
        lambda: ft.survey(str(shapes), SMALL, say=quiet),
        lambda: ft.open_dataset(str(shapes)),
        lambda: ft.report(finished, say=quiet),
        lambda: ft.resume(finished, say=quiet),
        lambda: finished.model,
    ):
        work()
        assert differences(before, process_state()) == [], work


def test_an_error_leaves_the_process_as_it_was(shapes, owner, tmp_path):
    def vary(image, draw):
        raise ZeroDivisionError

    before = process_state()
    with pytest.raises(ZeroDivisionError):
        ft.train(str(shapes), SMALL, runs=tmp_path, vary=vary, say=quiet)
    with pytest.raises(ft_errors.FinetuneError):
        ft.train(str(shapes), [*SMALL, "head.kind=cosine", "head.init=zero"], runs=tmp_path, say=quiet)
    assert differences(before, process_state()) == []


@pytest.mark.slow
def test_two_threads_and_a_second_call_work_and_put_back_what_was_before_both(finished, shapes, owner, tmp_path):
    expected = ft.predict(finished, shapes)
    before = process_state()
    with ThreadPoolExecutor(2) as pool:
        training = pool.submit(ft.train, str(shapes), SMALL, runs=tmp_path, say=quiet)
        answers = [pool.submit(ft.predict, finished, shapes).result() for _ in range(3)]
        run = training.result()
    assert all(answer == expected for answer in answers)
    assert run.scores.test.n == finished.scores.test.n
    assert differences(before, process_state()) == []
    assert ft.predict(finished, shapes) == expected
    assert differences(before, process_state()) == []


def test_the_last_guest_puts_back_what_the_first_one_found():
    values = ["the owner's"]
    inner = as_guest()
    with as_guest():
        put_back_later("value", lambda: values.append("the owner's"))
        values.append("ours")
        inner.__enter__()
        put_back_later("value", lambda: values.append("ours"))
        values.append("ours again")
    assert values[-1] == "ours again"  # somebody is still in
    inner.__exit__(None, None, None)
    assert values == ["the owner's", "ours", "ours again", "the owner's"]
    put_back_later("value", lambda: values.append("wrong"))  # nobody is in: the process is ours
    assert not process._PROMISED


def test_a_quietened_logger_speaks_again():
    logger = logging.getLogger("a logger of the owner")
    logger.setLevel(logging.INFO)
    with as_guest():
        quieten(logger.name, logging.ERROR)
        quieten(logger.name, logging.CRITICAL)
        assert logger.level == logging.CRITICAL
    assert logger.level == logging.INFO


def test_every_public_function_that_computes_is_a_guest():
    for name in ft.__all__:
        found = getattr(ft, name)
        if callable(found) and not isinstance(found, type) and name not in ("load_recipe", "load_run", "make_plan"):
            assert found.__wrapped__.__globals__["as_guest"] is as_guest, name
