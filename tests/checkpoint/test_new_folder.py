"""A new folder is there whole or not at all."""
import os

import pytest

from tpllm.checkpoint.new_folder import new_folder
from tpllm.errors import ConfigError


def test_the_folder_appears_whole_and_what_a_killed_writer_left_is_replaced(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/half").write_bytes(b"half")
    with new_folder(tmp_path / "out", num_bytes=1) as folder:
        (folder / "whole").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]
    with pytest.raises(ConfigError, match="exists"), new_folder(tmp_path / "out", num_bytes=1):
        pass


def test_all_of_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd)))
    wanted = []
    monkeypatch.setattr(os, "rename", lambda part, out: (wanted.append(set(synced)), os.replace(part, out)))
    with new_folder(tmp_path / "out", num_bytes=1) as folder:
        (folder / "inner").mkdir()
        (folder / "inner/file").write_text("whole")
    inodes = {path.stat().st_ino for path in (tmp_path / "out", tmp_path / "out/inner", tmp_path / "out/inner/file")}
    assert inodes <= wanted[0]
    assert synced[-1] == tmp_path.stat().st_ino


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", num_bytes=1):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_two_writers_and_a_full_disk_are_refused(tmp_path):
    with new_folder(tmp_path / "out", num_bytes=1):
        with pytest.raises(ConfigError, match="another process"), new_folder(tmp_path / "out", num_bytes=1):
            pass
        assert os.path.isdir(tmp_path / ".out.partial")
    with pytest.raises(ConfigError, match="are free there"), new_folder(tmp_path / "big", num_bytes=2**62):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
