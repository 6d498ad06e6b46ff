"""A prepared thing is whole or absent, whoever dies and whenever."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llm.errors import UsageError
from llm.files import is_disk_full, write_atomic
from llm.text.cache import built_once, cache_root

ROOT = Path(__file__).parents[1]


def test_a_thing_is_built_once(tmp_path):
    final = tmp_path / "things" / "one"
    for expected in (True, False):
        with built_once(final) as partial:
            assert (partial is not None) == expected
            if partial is not None:
                (partial / "file").write_text("whole")
    assert (final / "file").read_text() == "whole"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_build_leaves_nothing(tmp_path, error):
    final = tmp_path / "one"
    with pytest.raises(error), built_once(final) as partial:
        (partial / "file").write_text("half")
        raise error
    assert not final.exists()
    assert list(tmp_path.glob("*.partial")) == []


def test_the_thing_is_not_there_before_it_is_whole(tmp_path):
    final = tmp_path / "one"
    with built_once(final) as partial:
        (partial / "file").write_text("half")
        assert not final.exists()
    assert final.exists()


def test_files_are_on_disk_before_the_thing_is_there(tmp_path, monkeypatch):
    """Else a power cut could leave a folder of empty files that looks whole."""
    done = []
    real_fsync, real_rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd))
    )
    monkeypatch.setattr(
        Path, "rename", lambda self, to: (done.append("rename"), real_rename(self, to))
    )
    with built_once(tmp_path / "one") as partial:
        (partial / "file").write_text("x")
    assert done == [
        str(tmp_path / "one.partial" / "file"),
        str(tmp_path / "one.partial"),
        "rename",
        str(tmp_path),
    ]


def test_two_builders_build_once(tmp_path):
    built, seen = [], []
    inside = threading.Event()

    def build():
        with built_once(tmp_path / "one", lambda what, *_: seen.append(what)) as partial:
            if partial is not None:
                inside.set()
                built.append(partial)
                while not seen:
                    pass
                (partial / "file").write_text("whole")

    first = threading.Thread(target=build)
    first.start()
    inside.wait(10)
    build()
    first.join(10)
    assert len(built) == 1
    assert set(seen) == {"waiting for another process"}


def test_what_a_killed_builder_left_is_removed(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom llm.text.cache import built_once\n"
        "with built_once(Path(sys.argv[1]) / 'dead') as partial:\n"
        "    (partial / 'file').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "dead.partial" / "file").exists()
    assert not (tmp_path / "dead").exists()
    with built_once(tmp_path / "other") as partial:
        assert not (tmp_path / "dead.partial").exists()
        (partial / "file").write_text("x")


def test_what_a_living_builder_has_is_left_alone(tmp_path):
    with built_once(tmp_path / "slow") as partial:
        (partial / "file").write_text("half")
        with built_once(tmp_path / "other"):
            assert (partial / "file").exists()


def test_an_atomic_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"before")

    def full(_fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"after")
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_full_disks_are_told_from_other_errors():
    assert is_disk_full(OSError(errno.ENOSPC, ""))
    assert is_disk_full(OSError(errno.EDQUOT, ""))
    assert not is_disk_full(OSError(errno.EACCES, ""))
    assert not is_disk_full(ValueError())


def test_the_cache_is_the_setting_or_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path / "environment"))
    assert cache_root(str(tmp_path / "setting")) == tmp_path / "setting"
    assert cache_root("") == tmp_path / "environment"
    monkeypatch.delenv("LLM_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root("") == tmp_path / "home" / ".cache" / "llm"
    assert (tmp_path / "home" / ".cache" / "llm").is_dir()


def test_a_cache_that_cannot_be_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"set data.cache_dir to a folder that can be written"):
        cache_root(str(tmp_path / "file" / "cache"))
