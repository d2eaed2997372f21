"""Files are complete or not there; only temporary ones are removed; folders, lists and records are checked."""

import codecs
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


def test_without_locks_a_run_goes_ahead(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    files.lock(tmp_path).close()


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
    message = "cannot write .*b.tar: away; check the disk, and re-run to resume .a trainer with --resume"
    with pytest.raises(UserError, match=message), files.atomic_write(tmp_path / "b.tar"):
        raise OSError(number, "away")
    assert waited[3:] == [*files.WAITS, *files.WAITS, 0] and not left


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("text", [
    "é.mp4\nb c, d.mp4\n\n", "é.mp4\r\n \r\n b c, d.mp4 ", '"é.mp4"\n"b c, d.mp4"\n', "é.mp4\rb c, d.mp4",
    'room;file\n1;é.mp4\n2;"b c, d.mp4"\n', "file\té\né.mp4\t\nb c, d.mp4\t1",
])  # fmt: skip
def test_lists_are_read_as_editors_and_tables_have_them(tmp_path, encoding, text):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "list.txt").write_bytes(mark + text.encode(encoding))
    assert files.read_list(tmp_path / "list.txt") == ["é.mp4", "b c, d.mp4"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"\xff\xfe\x00", b"a\x81", b"a\n\0", b'a\n"b\n'])
def test_an_empty_or_damaged_list_is_one_line(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match="list.txt(, line 2:| is empty| is not a text file)") as error:
        files.read_list(tmp_path / "list.txt")
    assert "\n" not in str(error.value)


TABLES = {  # text: the rows of columns file, n, words, with the numbers of their lines
    "comma": ("file,n,words\na.mp4,384.0,look\n", [(2, 384, "look")]),
    "tab": ("file\tn\twords\na.mp4\t1e2\ta, b; c\n", [(2, 100, "a, b; c")]),
    "semicolon": ('"file";"n";"words"\n"a.mp4";"12,5";"a, ""b"""', [(2, 12.5, 'a, "b"')]),
    "comma in quotes": ('words,n,file\n"a; b\t","3",a.mp4\n', [(2, 3, "a; b")]),
    "spaces": (" file , n,\xa0words\r\n a.mp4 , 3 , look there \r\n", [(2, 3, "look there")]),
    "index of pandas": (",file,n,words\n0,a.mp4,3,look\n", [(2, 3, "look")]),
    "separators": ("file,n,words\na.mp4,3,a\u2028b\x0b\x1cc\x85\x0cd\n", [(2, 3, "a\u2028b\x0b\x1cc\x85\x0cd")]),
    "breaks": ('\n\nfile,n,words\na.mp4,1,"look\nthere"\n,,\na.mp4,2,"\r"\n\na.mp4,3,x\n',
               [(4, 1, "look\nthere"), (7, 2, "\r"), (9, 3, "x")]),
    **{repr(cell): (f"file,n,words\na.mp4,{cell},{cell}", [(2, None, cell)])
       for cell in ("", "NA", "NaN", "nan", "NaT", "N/A", "null", "NULL", "None", "<NA>", "inf", "-inf", "Infinity")},
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_tables_are_read_as_programs_write_them(tmp_path, kind):
    text, rows = TABLES[kind]
    (tmp_path / "a.csv").write_bytes(text.encode())
    table = files.read_table(tmp_path / "a.csv", "file", "words", numbers=["n", "none"])
    assert [(line, row["n"], row["words"]) for line, row in table] == rows
    assert all(row.keys() == {"file", "n", "words"} and row["file"] == "a.mp4" for _, row in table)
    cells = [[row["n"], row["words"], "a"] for _, row in table]
    files.write_table(tmp_path / "b.csv", [["n", "words", "file"], *cells])
    assert [row["words"] for _, row in files.read_table(tmp_path / "b.csv", "file")] == [row[2] for row in rows]


@pytest.mark.parametrize("content, message", [
    ("", "no column 'file'; its first line must name the columns"), ("name,n\na,1", "no column 'file'"),
    ("file,n\n\n,\n", "has no rows"), ("file,n,n\na,1,2", "line 1: there are two columns 'n'"),
    ("file,n\na\n", "line 2: it does not have 2 columns"), ('file,n\n"a\nb",1\n\nc,1,\n', "line 5: it does not have 2"),
    ("\nfile,n\na,1\nb,six", "line 4: n is six, not a number"), ("file,n\na,1.5.2", "line 2: n is 1.5.2, not a number"),
    ('file,n\na,"1,5"', "line 2: n is 1,5, not a number"), ("file,n\na,1\nb\0,2", "line 3: it has a NUL byte"),
    ('file,n\na,1\n"b,2\nc,3', "line 3: unexpected end of data; check its quotes"),
    (r'file,n\na,"say \"hi\""'.replace(r"\n", "\n"), "line 2: .* check its quotes"),
    (b"PK\3\4\x14\0\6\0\x08", "line 1: it has a NUL byte and is no text; save it as CSV"),
    (b"file\n\x81", "is not a text file in UTF-8, UTF-16 or Windows-1252; convert it"),
])  # fmt: skip
def test_a_table_that_cannot_be_read_is_one_line(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"a.csv.*{message}") as error:
        files.read_table(tmp_path / "a.csv", "file", numbers=["n"])
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize("name", ["file/out", "file", "x" * 300, "/proc/self/out", "read_only/out"])
def test_an_output_folder_that_cannot_be_written_is_one_line(tmp_path, small_disk, name):
    (tmp_path / "file").write_text("")
    folder = small_disk("100k", "ro") / "out" if name.startswith("read_only") else tmp_path / name
    for check in (files.check_output_dir, files.make_output_dir):
        with pytest.raises(UserError, match="cannot write to the folder .*; choose another --save-dir"):
            check(folder)


FAILS = """
import sys; sys.path.insert(0, sys.argv[1])
from moco import files
folder = files.make_output_dir(sys.argv[2])
lock = files.lock(folder)
if len(sys.argv) > 3:
    files.write_text(folder / "result", "")
    sys.exit()
raise files.UserError
"""


def test_a_process_that_writes_nothing_leaves_neither_folder_nor_lock(tmp_path):
    """Neither in a folder of its own nor in one that exists; what another process has locked stays."""
    (tmp_path / "mine").mkdir()
    for folder, more in (("a/b", ()), ("mine", ()), ("c/d", ["writes"])):
        done = subprocess.run([sys.executable, "-c", FAILS, ROOT, tmp_path / folder, *more], capture_output=True)
        assert done.returncode == (not more)
    assert names(tmp_path) == ["c", "mine"] and not names(tmp_path / "mine")
    assert names(tmp_path / "c" / "d") == [".run.lock", "result"]
    with files.lock(tmp_path / "mine"):
        subprocess.run([sys.executable, "-c", FAILS, ROOT, tmp_path / "mine"], capture_output=True)
        assert names(tmp_path / "mine") == [".run.lock"]


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


@pytest.mark.parametrize("soft, hard, expected", [
    (files.OPEN_FILES, 2 * files.OPEN_FILES, []), (100, 500, [500]),
    (100, resource.RLIM_INFINITY, [files.OPEN_FILES]),
])  # fmt: skip
def test_the_limit_is_raised_as_far_as_needed_and_allowed(monkeypatch, soft, hard, expected):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, values: limits.append(values))
    assert files.raise_open_file_limit() == (expected or [soft])[0]
    assert limits == [(each, hard) for each in expected]


def test_control_characters_in_a_name_are_escaped():
    assert files.printable("ü 赤.mp4") == "ü 赤.mp4"
    assert files.printable("a\x1b[2J\n\udcff.mp4") == r"a\x1b[2J\n\udcff.mp4"
