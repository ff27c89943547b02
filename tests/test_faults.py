"""What the operating system refuses: full disks, closed folders, files removed in mid-run; and calls that it lacks."""

import errno
import os
import resource
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import command
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import finetune as ft
from finetune import compute, demo, pipeline
from finetune.config.backbone_names import cache_folder, read_zoo
from finetune.data.decoding import ImageFacts
from finetune.errors import DataError, RecipeError, RunError, explain_os_error, os_error_behind
from finetune.features.cache import FeatureCache
from finetune.preparing import extract
from finetune.runs import folder as runs_module
from finetune.runs.folder import RunFolder, append, write_whole
from finetune.training.checkpoints import PlainFile

SMALL = [
    "data.image_size=32",
    "train.batch_size=16",
    "train.epochs=1",
    "tracking.enabled=false",
    "data.split.refit=false",
]


def quiet(text):
    """Nobody listens."""


def wish(shapes, *more):
    return ft.load_recipe(str(shapes), [*SMALL, *more])


# what is whose fault


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EACCES", "ENAMETOOLONG", "EIO", "EFBIG", "EDQUOT", "EMFILE"])
def test_a_fault_of_the_machine_is_told_with_path_cause_and_what_to_do(name):
    number = getattr(errno, name)
    told = explain_os_error(OSError(number, os.strerror(number), "/there/file"))
    assert told.startswith("/there/file: ") and f" ({os.strerror(number)}). " in told


def test_a_missing_file_is_the_users_only_where_the_user_named_it(tmp_path):
    fault = FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path / "a" / "b"))
    assert explain_os_error(fault) is None
    assert explain_os_error(fault, [tmp_path / "c"]) is None
    for named in (tmp_path, tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"):
        assert "it is not there" in explain_os_error(fault, [named])
    assert explain_os_error(OSError("of our own making"), [tmp_path]) is None


def test_a_full_disk_is_found_behind_what_a_library_calls_it(tmp_path):
    assert os_error_behind(SafetensorError("I/O error: No space left (os error 28)")).errno == errno.ENOSPC
    try:
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 - as torch does
    except RuntimeError as fault:
        assert os_error_behind(fault).errno == errno.ENOSPC
    assert os_error_behind(RuntimeError("a bug")) is None


def _has_a_bug(path):
    raise RuntimeError("a bug")


def test_a_whole_file_or_none_and_its_name_on_the_fault(tmp_path):
    def full(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    for write in (full, lambda path: append(Path("/dev/full"), "x")):
        with pytest.raises(OSError, match="No space left on device") as raised:
            write_whole(tmp_path / "file", write)
        assert raised.value.filename in (str(tmp_path / "file"), "/dev/full")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="a bug"):
        write_whole(tmp_path / "file", _has_a_bug)


@pytest.mark.parametrize("kind", ["checkpoint", "safetensors"])
def test_a_file_that_may_not_grow_says_so_whoever_writes_it(tmp_path, kind):
    state, limits = {"weight": torch.zeros(100_000)}, resource.getrlimit(resource.RLIMIT_FSIZE)
    write = partial(PlainFile().save_checkpoint, state) if kind == "checkpoint" else partial(save_file, state)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write_whole(tmp_path / "file", write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(tmp_path / "file")


def test_files_get_the_mode_that_the_user_has_asked_for(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", lambda path: path.chmod(0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


# disks that are full


class Disk:
    """Takes a number of writes, of whole files and of lines, and no more."""

    def __init__(self, patch, room):
        self.room, self.taken = room, 0
        for name in ("write_whole", "append"):
            real = getattr(runs_module, name)
            limited = self._limit(real)
            for module in [module for key, module in sys.modules.items() if key.startswith("finetune")]:
                if vars(module).get(name) is real:
                    patch.setattr(module, name, limited)

    def _limit(self, real):
        def limited(path, what):
            if "cache" not in str(path):
                self.taken += 1
                if self.taken > self.room:
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return real(path, what)

        return limited


@pytest.mark.parametrize(
    "shares", [[0.5], pytest.param([0, 0.2, 0.3, 0.1, 0.2, 0.1, 0.3], marks=pytest.mark.slow)], ids=["once", "often"]
)
def test_a_disk_that_fills_up_at_any_write_is_told_and_the_run_goes_on_to_the_same_end(shapes, tmp_path, shares):
    recipe = wish(shapes, "train.strategy=full")
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, 1000)
        whole = ft.train(recipe, runs=tmp_path / "whole", say=quiet)
    assert disk.taken > 20
    (tmp_path / "runs").mkdir()
    run = None
    for share in shares:  # of all writes, what each start or resume finds room for
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, int(share * disk.taken))
            with pytest.raises(RunError, match=r"the disk is full \(No space left on device\)\. Free") as raised:
                if run is None:
                    ft.train(recipe, runs=tmp_path / "runs", say=quiet)
                else:
                    ft.resume(run, say=quiet)
        folders = list((tmp_path / "runs").iterdir())
        assert all((folder / "plan.yaml").exists() for folder in folders)  # what could not start left nothing
        assert ("finetune resume" in str(raised.value)) == bool(folders)
        run = folders[0] if folders else None
    done = ft.resume(run, say=quiet)
    ours, theirs = load_file(done.final_weights()), load_file(whole.final_weights())
    assert all(ours[name].equal(value) for name, value in theirs.items())
    assert done.read_json("scores.json") == whole.read_json("scores.json")


def test_what_the_machine_refuses_is_one_paragraph_and_code_2_and_a_bug_is_code_3(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert command(monkeypatch, capsys, "recipes", "copy", "quick", tmp_path / "new" / "quick.yaml")[0] == 0
    for target in (tmp_path / "file" / "x.yaml", "/proc/nowhere/x.yaml"):
        code, said = command(monkeypatch, capsys, "recipes", "copy", "quick", target)
        assert code == 2, said
        assert said.startswith(f"finetune: {Path(target).parent}: ") and len(said.strip().splitlines()) == 1
    monkeypatch.setattr("finetune.config.backbone_names.list_recipes", lambda: Path("/ours/alone").read_text())
    code, said = command(monkeypatch, capsys, "recipes", "list")
    assert code == 3 and "this is our bug" in said


def test_a_full_disk_behind_standard_output_is_told():
    import subprocess

    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "finetune", "recipes", "list"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2
    assert b"standard output: the disk is full" in done.stderr and b"Traceback" not in done.stderr


def test_an_image_that_is_removed_or_spoilt_in_mid_run_is_named(tmp_path, monkeypatch):
    from conftest import draw_shapes

    root = draw_shapes(tmp_path / "images", per_class=12)
    real = pipeline.evaluate_run

    def judge(run, dataset, *rest, spoil):
        spoil(root / dataset.items[dataset.indices("test")[0]].name)
        return real(run, dataset, *rest)

    for reason, spoil in {"it is not there": Path.unlink, "cannot be read": lambda path: path.write_text("")}.items():
        monkeypatch.setattr(pipeline, "evaluate_run", partial(judge, spoil=spoil))
        with pytest.raises((RunError, DataError), match=rf"png.*{reason}"):
            ft.train(wish(root, "train.strategy=full", "hardware.image_cache_gb=0"), runs=tmp_path, say=quiet)


# starts that fail


@pytest.mark.parametrize(
    "more", [["data.split.val=0"], ["train.layers=[layer9]", "train.strategy=partial"], ["data.on_bad_image=fail"]]
)
def test_a_failed_start_leaves_no_run_folder(tmp_path, more):
    from conftest import draw_shapes

    root = draw_shapes(tmp_path / "images", per_class=8)
    (root / "disc" / "words.png").write_text("no image")
    with pytest.raises((DataError, RecipeError)):
        ft.train(wish(root, *more), runs=tmp_path / "runs", say=quiet)
    assert not list((tmp_path / "runs").iterdir())


def test_our_own_faults_and_interrupts_before_the_plan_leave_the_folder(shapes, tmp_path, monkeypatch):
    for number, fault in enumerate((KeyboardInterrupt, ZeroDivisionError)):
        monkeypatch.setattr(pipeline, "look", lambda *args, fault=fault, **named: _throw(fault))
        with pytest.raises(fault):
            ft.train(wish(shapes, "backbone=tiny_resnet18.cifar10"), runs=tmp_path / str(number), say=quiet)
        assert len(list((tmp_path / str(number)).glob("*/recipe.yaml"))) == 1


def _throw(fault):
    raise fault


# the cache


FACTS = ImageFacts(width=3, height=2, kind="16-bit", is_rotated=False)
DENIED = "/proc/finetune"
"""Where not even an administrator can make a folder."""


def test_features_are_held_in_memory_where_the_disk_takes_none(monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", DENIED)
    cache = FeatureCache("w" * 64, "v", "32")
    for number in range(3):
        cache.put(f"{number:032x}", [torch.full((4,), float(number)), torch.ones(2)], FACTS)
        cache.flush()
    assert cache.features([f"{number:032x}" for number in (2, 0)], 0)[:, 0].tolist() == [2, 0]
    assert DENIED in cache.warnings[0] and "FINETUNE_CACHE" in cache.warnings[0]


def test_a_cache_that_may_only_be_read_is_read(monkeypatch):
    cache = FeatureCache("w" * 64, "v", "32")
    cache.put("0" * 32, [torch.ones(4), torch.ones(2)], FACTS)
    cache.flush()

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    again = FeatureCache("w" * 64, "v", "32")
    assert again.features(["0" * 32], 0)[0, 0] == 1 and not again.warnings


@pytest.mark.parametrize("header", [b"[]", b"{}", b"null", b'{"digests": 3}', b'{"digests": {}}', b"\xff"])
def test_any_nonsense_in_a_shard_is_as_if_it_had_never_been(header):
    folder = FeatureCache("w" * 64, "v", "32").folder
    folder.mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert FeatureCache("w" * 64, "v", "32").known(["0" * 32]) == [False]


@pytest.mark.parametrize("home", ["denied", "none"])
def test_a_survey_says_once_that_nothing_is_kept_and_is_the_same(shapes, monkeypatch, home):
    recipe = wish(shapes, "train.strategy=probe", "backbone=tiny_resnet18.cifar10")
    before = ft.survey(recipe)
    monkeypatch.delenv("FINETUNE_CACHE")
    if home == "denied":
        monkeypatch.setenv("HOME", DENIED)
    else:  # as in a container whose user is not in its list of users
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "FINETUNE_ZOO"):
        monkeypatch.delenv(name, raising=False)
    after = ft.survey(recipe)
    (told,) = set(after.warnings) - set(before.warnings)
    assert "features are not kept" in told
    assert after.probe == before.probe
    with pytest.raises(DataError, match="looked at for later: features are not kept"):
        extract(recipe, "1/2", say=quiet)


@pytest.mark.slow
def test_damaged_findings_are_measured_again(shapes):
    recipe = wish(shapes, "train.strategy=probe")
    before = ft.survey(recipe)
    (path,) = (cache_folder() / "findings").iterdir()
    for text in (b"", b"\xff" * 100):
        path.write_bytes(text)
        assert ft.survey(recipe).probe == before.probe
    save_file({"solution": torch.zeros(1)}, path, metadata={"findings": "{}"})
    assert ft.survey(recipe).probe == before.probe


def test_the_digits_are_drawn_beside_the_runs_where_the_cache_takes_none(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FINETUNE_CACHE", DENIED)
    monkeypatch.setattr(demo, "draw_digits", lambda folder: folder if DENIED not in str(folder) else folder.mkdir())
    assert demo._find_digits(tmp_path) == tmp_path / "demo-digits"
    assert "drawn in" in capsys.readouterr().err


# systems that lack calls


def test_cores_are_counted_where_the_system_does_not_say_whose(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert compute.num_cores() == os.cpu_count()


def test_no_fork_needs_no_renewal(monkeypatch):
    monkeypatch.delattr(os, "register_at_fork")
    compute.after_fork(lambda: None)


def test_a_run_is_locked_by_the_way_of_windows(monkeypatch, tmp_path):
    held = set()

    def locking(handle, mode, length):
        place = (os.fstat(handle).st_ino, os.lseek(handle, 0, os.SEEK_CUR))
        if place in held:
            raise OSError(errno.EACCES, "Permission denied")
        held.add(place)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    run = RunFolder(tmp_path)
    with run.lock(), pytest.raises(RunError, match="another process is working on"), run.lock():
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, None])
def test_a_drive_or_a_system_without_locks_stops_no_run(monkeypatch, tmp_path, number):
    def flock(handle, how):
        raise OSError(number, "none here")

    fcntl = None if number is None else SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4)
    monkeypatch.setitem(sys.modules, "fcntl", fcntl)
    with RunFolder(tmp_path).lock():
        assert (tmp_path / "log.txt").exists()


def test_a_zoo_that_cannot_be_looked_into_is_no_zoo(monkeypatch):
    real = os.stat

    def refuse(path, *args, **kwargs):
        if str(path).startswith("/closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setenv("XDG_DATA_HOME", "/closed")
    monkeypatch.setattr(os, "stat", refuse)
    assert "tiny_resnet18.cifar10" in read_zoo()
