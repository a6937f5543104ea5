"""Files are written whole or not at all, and tried first."""

import os
import stat
from pathlib import Path

import pytest

from s2o_compile.kernels.support.files import try_writing, writing

NEVER_WRITABLE = Path("/proc")
"""A directory that not even root may write to."""


def test_a_file_is_replaced_once_it_is_whole(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("before")
    path.chmod(0o640)
    with writing(path) as part:
        assert (part.parent, part.suffix) == (tmp_path, ".json")
        part.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["result.json"]


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("before")

    def write():
        with writing(path) as part:
            part.write_text("half")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    link, target = tmp_path / "link.json", tmp_path / "far" / "target.json"
    link.symlink_to(target)
    with writing(link) as part:
        part.write_text("text")
    assert link.is_symlink()
    assert target.read_text() == "text"


def test_a_device_is_written_to_as_it_is():
    try_writing(Path(os.devnull))
    with writing(Path(os.devnull)) as part:
        assert part == Path(os.devnull)
        part.write_text("text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_trying_changes_nothing(tmp_path):
    path = tmp_path / "result.json"
    try_writing(path)
    assert not os.listdir(tmp_path)
    path.write_text("before")
    try_writing(path)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize(
    "path",
    [
        lambda folder: folder,
        lambda folder: folder / "missing" / "result.json",
        lambda folder: folder / ("x" * 300),
        pytest.param(
            lambda _: NEVER_WRITABLE / "result.json",
            marks=pytest.mark.skipif(not NEVER_WRITABLE.is_dir(), reason="needs Linux"),
        ),
    ],
    ids=["directory", "no-directory", "long-name", "read-only"],
)
def test_what_cannot_be_written_is_an_error_when_it_is_tried(path, tmp_path):
    with pytest.raises(OSError):  # noqa: PT011 (of any kind)
        try_writing(path(tmp_path))
