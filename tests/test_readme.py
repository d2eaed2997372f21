"""The front page: every command on it runs, on tiny inputs in its paths; its links and pictures are there."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moco import models
from tests.conftest import make_frames, save_network
from tests.support import ROOT
from tests.support.videos import write_video

PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
SET_UP = ("bash scripts/test.sh",)  # it is what runs this
CATEGORIES = ("car", "chair", "door", "foot", "hand", "road", "table", "window")
LITTLE = "--image-size 32 --batch-size 4 --workers 0"
TINY = {  # what makes a script's work small
    "read_saycam.py": "--workers 0",
    "temporal_classification.py": f"{LITTLE} --epochs 1 --device cpu",
    "moco_img.py": f"{LITTLE} --epochs 1 -a resnet18 --moco-k 16",
    "moco_temp.py": f"{LITTLE} --epochs 1 -a resnet18 --moco-k 16",
    "linear_decoding.py": f"{LITTLE} --epochs 1",
    "hog_baseline.py": "--workers 0",
    "imagenet_finetuning.py": f"{LITTLE} --epochs 1",
    "linear_combination_maps.py": LITTLE,
    "selectivities.py": LITTLE,
    "highly_activating_imgs.py": LITTLE,
    "feature_animation.py": f"{LITTLE} --frames 5",
    "feature_animation_class.py": f"{LITTLE} --frames 5",
}
RENAMED = {  # what the last of many epochs would have written, from the only one
    "TC-S/resnext50_32x4d_epoch_15.tar": "TC-S/resnext50_32x4d_epoch_0.tar",
    "moco_img-S/moco_img_checkpoint_0011.pth.tar": "moco_img-S/moco_img_checkpoint_0000.pth.tar",
}


def blocks(language):
    """The page's blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def lines(start=""):
    """The page's command lines, those split over several joined, without comments."""
    joined = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [" ".join(shlex.split(line, comments=True)) for line in joined]
    return [line for line in commands if line.startswith(start) and line]


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A copy of this project's programs, which the page's commands are given in, as working folder."""
    house = tmp_path / "house"
    shutil.copytree(ROOT / "scripts", house / "scripts")
    shutil.copytree(ROOT / "moco", house / "moco")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, house)
    (house / "scripts" / "setup.sh").write_text("# all is set up\n")
    (house / ".venv" / "bin").mkdir(parents=True)
    python = house / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(house)
    monkeypatch.setenv("PATH", f"{python.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return house


def make_inputs(house):
    """All videos, images and networks that the page speaks of, by the names it has for them."""
    for folder in ("videos_S", "videos_A", "videos_Y", "saycam/S", "saycam/A", "saycam/Y", "my_videos"):
        (house / folder).mkdir(parents=True)
        for name in ("1.mp4", "2.mp4"):
            write_video(house / folder / name, 60)
    (house / "toybox_videos").mkdir()
    for category in ("airplane", "truck"):
        for exemplar in range(1, 5):
            write_video(house / "toybox_videos" / f"{category}_{exemplar:02}_pivothead_rxplus.mp4", 60)
    write_video(house / "room.mp4", 60)
    for part in ("train", "val"):
        make_frames(house / "imagenet" / part)
    make_frames(house / "labeled_S", CATEGORIES, 20, 64)
    for name, arch in {"TC-S": "resnet18", "TC-S-mobilenet": "mobilenet_v2", "TC-SAY": "resnext50_32x4d"}.items():
        save_network(house / f"{name}.tar", models.build(arch, 3))
    shutil.copy(house / "TC-SAY.tar", house / "TC-SAY-resnext-IN-linear.tar")


def run(line):
    """Run a line that begins with python, in this process, or with torchrun, in as many as it says."""
    words = shlex.split(line)
    script = next(word for word in words if word.endswith(".py"))
    words += shlex.split(TINY[script])
    if script == "read_saycam.py" and "--class-by" not in words:
        words += ["--seg-len", "1"]
    if words[0] == "torchrun":
        subprocess.run(words, check=True)
    else:
        assert not importlib.import_module(script.removesuffix(".py")).main(words[2:])


def test_every_python_line_runs(house, handlers, one_thread):
    make_inputs(house)
    commands = [line for line in lines() if line.startswith(("python ", "torchrun "))]
    assert {word for line in commands for word in line.split() if word.endswith(".py")} == set(TINY)
    for line in commands:
        run(line)
        for later, only in RENAMED.items():
            if Path(only).exists() and not Path(later).exists():
                os.link(only, later)
    (snippet,) = blocks("python")
    exec(snippet, {})


@pytest.mark.parametrize("line", [line for line in lines() if "sbatch " in line])
def test_every_sbatch_line_is_one_of_a_step_and_its_flags(house, line):
    """What SLURM makes of the steps, test_slurm.py shows; here python only says whether it knows the words."""
    (house / ".venv" / "bin" / "sbatch").write_text(
        '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nbash "$@"\n'
    )
    (house / ".venv" / "bin" / "python").write_text(
        f'#!/bin/sh\nscript=$(basename "$1" .py)\nshift\nexec "{sys.executable}" -c '
        '"import sys; from importlib import import_module; import_module(sys.argv[1]).parse_args(sys.argv[2:])" '
        '"$script" "$@"\n'
    )
    (house / ".venv" / "bin" / "sbatch").chmod(0o755)
    (house / "TC-S").mkdir()  # which the trainer would have made
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wrong = subprocess.run(["bash", "-c", f"{line} --no-such-flag"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--no-such-flag" in wrong.stderr


@pytest.mark.parametrize("line", [line for line in lines() if re.search(r"(pipeline|reproduce)\.sh", line)])
def test_every_chain_of_steps_can_be_planned(house, line):
    make_inputs(house)
    (house / "toybox").mkdir()
    line = f"{line.replace('--local', '')} --dry-run"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "temporal_classification" in done.stdout


THOROUGH = {"bash scripts/demo.sh", "bash scripts/demo.sh --full"}  # minutes each


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=pytest.mark.thorough if line in THOROUGH else ())
        for line in lines("bash scripts/demo.sh")
    ],
)
def test_the_demo_runs_to_its_table(house, line):
    make_inputs(house)
    done = subprocess.run(["bash", "-c", f"PICTURES=1 {line}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^TC +\d", done.stdout, re.MULTILINE)


def test_no_line_is_left_out():
    known = ("python ", "torchrun ", "bash scripts/demo.sh", *SET_UP)
    rest = [line for line in lines() if not line.startswith(known)]
    assert all(re.search(r"sbatch |(pipeline|reproduce)\.sh", line) for line in rest) and len(rest) >= 7


def test_links_within_the_page_and_pictures_are_there():
    titles = {re.sub(r"\W+", "-", title.lower()) for title in re.findall(r"^##+ (.+)$", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= titles
    pictures = [ROOT / name for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE)]
    assert pictures and all(picture.stat().st_size < 300_000 for picture in pictures)
