"""Files that take another's place whole or not at all, and what is no file of the user's is left alone."""

import os

import pytest

from gpt.data.files import atomic_write
from gpt.errors import UserError


def write(path):
    with atomic_write(path) as file:
        file.write(b"new")


def test_what_a_link_leads_to_is_written(tmp_path):
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to("there")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe with a name")
def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: it is no ordinary file, and would be replaced by one"):
        write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 1


def test_an_error_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail():
        with atomic_write(tmp_path / "file") as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
