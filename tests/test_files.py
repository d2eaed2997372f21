"""Files are complete or not there; only temporary ones are removed; folders, lists and records are checked."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest

from moco import files
from moco.cli import UserError
from tests.support import ROOT


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), files.atomic_write(tmp_path / "a.txt") as part:
        part.write_text("half")
        assert part.suffix == ".txt"
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("name", ["x" * 240 + ".tar", "中" * 80 + ".json", "a." + "y" * 240, "glob[*]?{}.tar"])
def test_any_name_that_fits_a_folder_can_be_written(tmp_path, name):
    files.write_text(tmp_path / name, "text")
    assert names(tmp_path) == [name]


def test_a_name_that_is_too_long_is_one_line(tmp_path):
    with pytest.raises(UserError, match="File name too long; choose a shorter name"):
        files.write_text(tmp_path / ("x" * 300), "text")
    assert not names(tmp_path)


def test_two_files_with_the_same_beginning_are_written_at_once(tmp_path):
    one, two = (tmp_path / f"{'x' * 100}{i}.txt" for i in range(2))
    with files.atomic_write(one) as first, files.atomic_write(two) as second:
        first.write_text("1")
        second.write_text("2")
    assert (one.read_text(), two.read_text()) == ("1", "2")


def test_only_temporary_files_are_removed_and_without_a_lock_only_old_ones(tmp_path):
    kept = [".thesis.part1.tex", ".videos.part01.rar", ".a.123.part.tar", "last.tar", ".moco-tmp"]
    temporary = [files.temporary_path(tmp_path / f"{name}.tar").name for name in "abc"]
    for name in [*kept, *temporary]:
        (tmp_path / name).write_text("")
    (tmp_path / ".folder.moco-tmp").mkdir()
    kept = sorted([*kept, ".folder.moco-tmp"])
    os.utime(tmp_path / temporary[0], (0, 0))
    files.remove_temporary_files(tmp_path, idle=600)
    assert names(tmp_path) == sorted([*kept, *temporary[1:]])
    files.remove_temporary_files(tmp_path)
    assert names(tmp_path) == kept


def test_a_folder_has_one_run_and_a_killed_one_leaves_nothing_that_the_next_keeps(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from moco import files
lock = files.lock(".")
with files.atomic_write("a.tar") as part:
    part.write_text("half")
    print(flush=True)
    input()
"""
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path)
    with subprocess.Popen([sys.executable, "-c", code], **options) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match="another run is writing to"):
            files.lock(tmp_path)
        process.kill()
        process.wait()
    assert len(names(tmp_path)) == 2
    with files.lock(tmp_path):
        files.remove_temporary_files(tmp_path)
    assert names(tmp_path) == [".run.lock"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET])
def test_a_disk_that_recovers_is_read_again(tmp_path, monkeypatch, number):
    """An error of the file is raised at once, and one of the disk that stays is one line."""
    waited, left = [], [number] * 3
    monkeypatch.setattr(files.time, "sleep", waited.append)

    def read():
        if left:
            raise OSError(left.pop(), "away")
        return (tmp_path / "a").read_bytes()

    with pytest.raises(FileNotFoundError):
        files.retry_transient("a", read)
    assert waited == [0.1, 0.5, 1]
    (tmp_path / "a").write_bytes(b"content")
    left += [number] * len(files.WAITS)
    assert files.retry_transient("a", read) == b"content"
    left += [number] * (len(files.WAITS) + 1)
    with pytest.raises(UserError, match=f"cannot read a: {os.strerror(number)}; check the disk, and re-run to resume"):
        files.retry_transient("a", read)
    assert waited[3:] == [*files.WAITS, *files.WAITS, 0] and not left


@pytest.mark.parametrize(
    "content",
    [b"a\nb c\n\n", b"\xef\xbb\xbfa\nb c", "a\r\nb c\r\n".encode("utf-16"), b"\xfe\xff" + "a\nb c".encode("utf-16-be")],
    ids=["plain", "BOM", "UTF-16", "big-endian UTF-16"],
)
def test_lists_are_read_in_the_encodings_of_editors(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    assert files.read_list(tmp_path / "list.txt") == ["a", "b c"]


def test_names_that_are_not_utf_8_keep_their_bytes(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpeg")
    files.write_text(tmp_path / "list.txt", name + "\n")
    assert (tmp_path / "list.txt").read_bytes() == b"caf\xe9.jpeg\n"
    assert files.read_list(tmp_path / "list.txt") == [name]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"\xff\xfe\x00"])
def test_an_empty_or_damaged_list_is_one_line(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match="list.txt is (empty|not a text file)"):
        files.read_list(tmp_path / "list.txt")


@pytest.mark.parametrize("content", ["", "{", "[1,", "\0"])
def test_damaged_json_is_one_line(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match="a.json is damaged"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot read .*: No such file"):
        files.read_json(tmp_path / "b.json")


def test_an_output_folder_inside_the_data_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    for inside in ("data", "data/out", "link/deep/out"):
        with pytest.raises(UserError, match="is inside the data folder"):
            files.make_output_dir(tmp_path / inside, [tmp_path / "data"])
    assert not names(tmp_path / "data")
    assert files.make_output_dir(tmp_path / "data2", [tmp_path / "data"]).is_dir()


def test_an_output_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the folder .*choose another --save-dir"):
        files.make_output_dir(tmp_path / "file" / "out")


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that writes the record of a script, and returns the seed in each record in the folder."""

    def write(script, seed):
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{script}.py"])
        files.write_args(tmp_path, {"seed": seed}, {"net.tar": "00ff"})
        return {path.name: json.loads(path.read_text())["seed"] for path in tmp_path.iterdir()}

    return write


def test_the_record_of_another_script_is_kept(written):
    assert written("temporal_classification", 1) == {"args.json": 1}
    assert written("selectivities", 2) == {"args.json": 1, "args_selectivities.json": 2}
    assert written("selectivities", 3) == {"args.json": 1, "args_selectivities.json": 3}
    assert written("temporal_classification", 4) == {"args.json": 4, "args_selectivities.json": 3}


@pytest.mark.parametrize("text", ['{"seed": 0}', '{"seed": 0'])
def test_a_record_of_unknown_origin_is_replaced(written, tmp_path, text):
    """One of an older version, or cut off."""
    (tmp_path / "args.json").write_text(text)
    assert written("selectivities", 5) == {"args.json": 5}


def test_a_limit_that_is_high_enough_is_not_changed(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (files.OPEN_FILES, 2 * files.OPEN_FILES))
    monkeypatch.setattr(resource, "setrlimit", None)
    files.raise_open_file_limit()


@pytest.mark.parametrize("hard, expected", [(500, 500), (resource.RLIM_INFINITY, files.OPEN_FILES)])
def test_the_limit_is_raised_as_far_as_allowed(monkeypatch, hard, expected):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, values: limits.append(values))
    files.raise_open_file_limit()
    assert limits == [(expected, hard)]


def test_control_characters_in_a_name_are_escaped():
    assert files.printable("ü 赤.mp4") == "ü 赤.mp4"
    assert files.printable("a\x1b[2J\n\udcff.mp4") == r"a\x1b[2J\n\udcff.mp4"
