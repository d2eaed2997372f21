"""Command-line flags, their help, and errors as one line."""

import errno
import importlib
import io
import os
import re
import subprocess
import sys

import pytest
import torch

from moco import cli
from tests.support import ROOT

SCRIPTS = [
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")])
    if "def parse_args(argv=None)" in path.read_text(encoding="utf-8")
]


def read_help(script, monkeypatch, capsys):
    """The parser of a script, and what --help prints on a terminal of 80 columns."""
    parsers = []

    class Parser(cli._Parser):
        def __init__(self, **options):
            super().__init__(**options)
            parsers.append(self)

    monkeypatch.setattr(cli, "_Parser", Parser)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).parse_args(["--help"])
    assert end.value.code == 0
    return parsers[0], capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_default_none_for_a_switch_and_fits_80_columns(script, monkeypatch, capsys):
    parser, text = read_help(script, monkeypatch, capsys)
    entries = {re.match(r"\{.*?\}|[^\s,]+", entry)[0]: entry for entry in re.split(r"\n  (?=[-\w{])", text)[1:]}
    for action in parser._actions:
        if action.help == cli.HIDDEN:
            assert not any(flag in text for flag in set(action.option_strings) - {"--augmentation"})
            continue
        assert action.help, f"{action.dest} has no help"
        argument = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest)
        entry = " ".join(entries[(*action.option_strings, argument)[0]].split())
        if action.nargs == 0 or action.default in (None, "", []):
            assert "(default:" not in entry, f"{entry} shows a default that is none"
        else:
            shown = re.search(r"\(default: (.*?)\)", entry)
            assert shown, f"{entry} lacks its default"
            values = action.default if isinstance(action.default, list | tuple) else [action.default]
            read = [type(value)(word) for value, word in zip(values, shown[1].split(), strict=True)]
            assert read == list(values)
            assert entry.count("default") == 1, f"{entry} names two defaults"
    for line in text.splitlines():
        is_command = line.startswith("    ") and re.match(r" +(python|torchrun) ", line)
        assert len(line) <= 80 or is_command, line
    assert not re.search(r"\w-\n +\w", text), "a flag is broken at a hyphen"


@pytest.mark.parametrize("kind, right, wrong", [
    (cli.number(float, 0, 1), 0.5, "nan inf -inf -0.5 2"),
    (cli.number(float, 0), 2, "nan inf -inf -0.5"),
    (cli.SHARED_FLAGS["--seed"]["type"], 2**32 - 1, "-1 4294967296 1.5"),
])  # fmt: skip
def test_numbers_are_finite_and_within_their_bounds(kind, right, wrong, capsys):
    parser = cli.parser("")
    parser.add_argument("--n", type=kind)
    assert parser.parse_args(["--n", str(right)]).n == right
    for text in wrong.split():
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(["--n", text])
        assert re.search(r"error: argument --n: .*see --help\n$", capsys.readouterr().err)


@pytest.mark.parametrize("given, hint", [
    (["--no-such-flag"], ""),
    (["--save_dir", "x"], "did you mean --save-dir? "),
    (["x", "--sed", "1", "--learning_rate", "2"], "did you mean --seed? "),
    (["--Overwrite"], "did you mean --overwrite? "),
    (["--augmentations"], ""),  # near a flag for old command lines
])  # fmt: skip
def test_a_wrong_flag_is_one_line_with_the_nearest_one(given, hint, capsys):
    parser = cli.parser("")
    cli.shared_flags(parser, "--seed", "--save-dir", "--overwrite", "--lr")
    parser.add_argument("--augmentation", help=cli.HIDDEN)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(given)
    printed = capsys.readouterr()
    assert end.value.code == 2 and not printed.out and printed.err.count("\n") == 1
    assert printed.err.endswith(f"unrecognized arguments: {' '.join(given)}; {hint}see --help\n")


PUBLISHED = {  # the flags of the published scripts, as in their calls, with the folder at the end
    "read_saycam": "--save-dir out --fps 5 --seg-len 288",
    "temporal_classification": "-j 16 --model resnext50_32x4d --epochs 16 --start-epoch 0 -b 256 --lr 0.0005 --wd 0 "
    "-p 10000 --n_out 2765 --augmentation --world-size 1 --rank 0 --dist-url tcp://localhost:1 --dist-backend nccl "
    "--multiprocessing-distributed",
    "moco_img": "-a resnext50_32x4d --lr 0.015 --batch-size 256 --epochs 12 --schedule 11 20 --moco-t 0.2 --mlp "
    "--aug-plus --cos --multiprocessing-distributed",
    "moco_temp": "-a resnext50_32x4d --lr 0.015 --wd 0 --momentum 0.9 --moco-dim 128 --moco-k 65536 --schedule 11 20",
    "linear_decoding": "--num-outs 16127 --num-classes 26 --subsample --epochs 100 --lr 0.0005 --model-name random",
    "hog_baseline": "--subsample",
    "imagenet_finetuning": "--model-path x.tar --n_out 20 --freeze-trunk --frac-retained 0.01 --schedule 23 24",
    "linear_combination_maps": "--model-path x.tar --n_out 12 --class-idx 6 --batch-size 36 --workers 4",
    "highly_activating_imgs": "--model-path  --n_out 1000 --batch-size 1024 --neuron_idx 276",
    "selectivities": "--n_out 1000 --model-path  --batch-size 580 --layer 18",
    "feature_animation": "--model-path x.tar --n_out 2765 --batch-size 900 --feature-idx 1",
    "feature_animation_class": "--model-path x.tar --n_out 26 --batch-size 500 --class-idx 1",
}


def parse(script, words):
    return importlib.import_module(script).parse_args(words.split(" "))


@pytest.mark.parametrize("script", PUBLISHED)
def test_published_command_lines_are_understood(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    for words in (f"{PUBLISHED[script]} FOLDER", f"FOLDER {PUBLISHED[script]}"):
        assert parse(script, words).data in ("FOLDER", ["FOLDER"])


@pytest.mark.parametrize("script, words, expected", [
    ("selectivities", "--layer 1 18 a --seed 3", {"layer": [1, 18], "data": "a"}),
    ("selectivities", "--layer 1 no/folder --seed 3", {"layer": [1], "data": "no/folder"}),
    ("selectivities", "--pca a b", {"pca": ["a"], "data": "b"}),
    ("selectivities", "--layer 1 a --pca b", {"layer": [1, "a"], "pca": [], "data": "b"}),
    ("selectivities", "b --pca a", {"pca": ["a"], "data": "b"}),
    ("temporal_classification", "--children S A a b", {"children": ["S", "A"], "data": ["a", "b"]}),
    ("temporal_classification", "--resume a", {"resume": "last", "data": ["a"]}),
    ("read_saycam", "--locate a/x.jpeg y.mp4@3", {"locate": ["a/x.jpeg", "y.mp4@3"], "data": []}),
    ("linear_decoding", "--model-path a b --split iid exemplar", {"model_path": ["a"], "data": "b"}),
    ("linear_decoding", "--compare x.json y.json", {"compare": ["x.json", "y.json"], "data": None}),
    ("scripts.embeddings", "--list x.csv --model-path a b", {"model_path": ["a", "b"], "data": None}),
    ("scripts.embeddings", "--layer 1 2 --model-path a b", {"model_path": ["a"], "data": "b", "layer": [1, 2]}),
])  # fmt: skip
def test_a_folder_after_the_values_of_a_flag_is_the_positional(script, words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
    args = vars(parse(script, words))
    assert {key: args[key] for key in expected} == expected


@pytest.mark.parametrize("words", ["--layer 18", "--layer 1 2", "--layer a", "--pca 3 --seed 1"])
def test_a_folder_that_is_not_given_is_missing(words, capsys):
    with pytest.raises(SystemExit):
        parse("selectivities", words)
    assert "required: data" in capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, what, advice",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
            "CUDA out of memory. Tried to allocate 2.00 GiB; ",
            "lower --batch-size",
        ),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "CUDA", "an older CUDA"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "MPS backend", "lower --batch-size"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                         "workers are out of shared memory. Please try to raise your shared memory limit."),
            "DataLoader worker",
            "--shm-size",
        ),
        (RuntimeError("unable to allocate shared memory(shm) for file </x>: full (28)"), "unable", "--shm-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "DataLoader", "fewer --workers"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "DataLoader", "its reason is above, or it"),
        (ValueError("Expected more than 1 value per channel when training, got"), "Expected", "at least two images"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "DefaultCPU", "lower --batch-size"),
        (MemoryError(), "out of memory; ", "lower --batch-size"),
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28]", "/dev/shm"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "[Errno 13] Permission denied: 'x'; ", "choose"),
    ],
)  # fmt: skip
def test_too_little_memory_is_one_line_with_what_to_lower(error, what, advice, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(raising(error))
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1
    assert f"error: {what}" in printed and advice in printed


def test_an_array_that_does_not_fit_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: torch.empty(2**58, dtype=torch.uint8))
    assert end.value.code == 2 and "lower --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.ENOENT, "gone"), ValueError("x")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        cli.run(raising(error))


def test_ctrl_c_and_user_errors_have_their_status(capsys):
    for error, status, text in (
        (KeyboardInterrupt(), 130, "re-run to go on (a trainer with --resume)\n"),
        (cli.UserError("no x"), 2, "error: no x\n"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.run(raising(error))
        assert end.value.code == status and capsys.readouterr().err.endswith(text)


def test_names_that_the_terminal_cannot_show_do_not_end_a_run(tmp_path):
    code = "from moco import cli; cli.run(lambda: print('caf\\u00e9 \\u4e2d \\udcff'))"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"caf\xe9 \\u4e2d \\udcff\n"


LOSES_ITS_READER = """
import os, signal, sys; sys.path.insert(0, sys.argv[1])
from moco import cli

def main():
    if sys.argv[3] == "trainer":
        signal.signal(signal.SIGTERM, lambda *_: os.write(3, b"saves"))
    stream = getattr(sys, sys.argv[2])
    sys.stdin.read()  # until the reader of stdout and stderr has gone
    print("a line", file=stream, flush=True)
    print("more", file=stream)
    os.write(3, b" goes on")

cli.run(main)
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("kind, status, written", [("trainer", 0, "saves goes on"), ("other", 141, "")])
def test_a_reader_that_goes_away_ends_a_process_quietly_but_a_trainer_goes_on(tmp_path, stream, kind, status, written):
    command = [sys.executable, "-c", LOSES_ITS_READER, str(ROOT), stream, kind]
    command = ["bash", "-c", 'exec 3>"$0"; exec "$@"', str(tmp_path / "written"), *command]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        (process.stdout if stream == "stdout" else process.stderr).close()
        other = process.communicate(b"")[stream == "stdout"]
    assert process.returncode == status and not other
    assert (tmp_path / "written").read_text() == written


def test_closed_streams_do_not_end_a_run():
    code = "from moco import cli; cli.run(lambda: print(1) or cli.Progress(2, '', '').close())"
    done = subprocess.run(["bash", "-c", 'exec "$@" >&- 2>&-', "", sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_narrow_terminal_shows_its_numbers(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = cli.Progress(1234, "epoch 9", "steps", None)
    bar.update(123)
    for width, has_bar in ((80, False), (170, True)):
        bar.dynamic_ncols = lambda _, width=width: (width, 24)
        for numbers in ("loss 2.345, top-1 12.3 %, top-5 40.1 %, 1234 images/s", ""):
            bar.set_postfix_str(numbers, refresh=False)
            assert numbers in str(bar) and len(str(bar)) <= width
            assert ("|" in str(bar)) == (has_bar or not numbers)


def test_progress_in_a_log_prints_lines_at_its_interval_and_at_the_end(capsys):
    with cli.Progress(4, "read", "images", seconds=0) as progress:
        progress.set_postfix_str("fast", refresh=False)
        progress.update()
        progress.write("a remark")
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"read: 1/4 images in 00:00, .* images/s, fast", lines[0])
    assert lines[1] == "a remark" and len(lines) == 3


def test_progress_in_a_log_that_has_no_interval_prints_lines_on_demand_and_at_the_end(capsys):
    with cli.Progress(9, "epoch 0", "steps", None, 5) as progress:
        progress.refresh()
        for step in (6, 7, 8):
            progress.update()
            if step == 7:
                progress.set_postfix_str("loss 2")
    with cli.Progress(2, "none", "steps", show=False) as hidden:
        hidden.update()
    lines = [re.sub(" in .*/s", "", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == ["epoch 0: 7/9 steps, loss 2", "epoch 0: 8/9 steps, loss 2"]


def test_the_commit_of_a_clone_of_another_user(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    (tmp_path / "moco").mkdir()
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git itself refuses it then
    assert subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True).returncode
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "moco" / "cli.py"))
    assert cli.commit() == head
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert cli.commit() is None


@pytest.mark.parametrize("content, cores", [
    ({}, 8),
    ({"cpu.max": "max 100000"}, 8),
    ({"cpu.max": "250000 100000"}, 3),
    ({"cpu.max": "1600000 100000"}, 8),
    ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
])  # fmt: skip
def test_cores_are_those_of_the_job_or_within_the_quota_of_the_container(tmp_path, monkeypatch, content, cores):
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(cli, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert cli.cores() == cores
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    assert cli.cores() == 5
