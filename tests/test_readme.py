"""README.md: every command in it runs on small inputs with the paths it names; its links and images exist."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import read_saycam
from moco.networks import architectures
from tests.support import ROOT
from tests.support.inputs import make_frames, save_network
from tests.support.shell import write_program
from tests.support.videos import write_video, write_videos

pytestmark = pytest.mark.usefixtures("empty_figures")

PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
CATEGORIES = ("car", "chair", "door", "foot", "hand", "road", "table", "window")
SMALL = "--image-size 32 --batch-size 4 --workers 0"
TRAINING = f"{SMALL} --epochs 1 --device cpu"
FLAGS = {  # appended to a command, they make its work small
    "read_saycam.py": "--workers 0",
    "temporal_classification.py": f"{TRAINING} --model shufflenet_v2_x0_5",
    "moco_img.py": f"{TRAINING} -a shufflenet_v2_x0_5 --moco-k 16",
    "moco_temp.py": f"{TRAINING} -a shufflenet_v2_x0_5 --moco-k 16",
    "linear_decoding.py": f"{SMALL} --epochs 1 --seeds 1",
    "hog_baseline.py": "--workers 0 --seeds 1",
    "imagenet_finetuning.py": TRAINING,
    "linear_combination_maps.py": SMALL,
    "selectivities.py": SMALL,
    "highly_activating_imgs.py": SMALL,
    "feature_animation.py": f"{SMALL} --frames 5",
    "feature_animation_class.py": f"{SMALL} --frames 5",
    "scripts/embeddings.py": "--image-size 32 --workers 0",
    "scripts/pack_frames.py": "",
    "scripts/report.py": "",
}


def blocks(language):
    """The code blocks of the page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands(pattern=""):
    """The commands of the page that match a pattern, without comments and line breaks."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    lines = [" ".join(shlex.split(line, comments=True)) for line in lines]
    return [line for line in lines if line and re.search(pattern, line)]


PYTHON = commands("^(python|torchrun) ")
SBATCH = commands("sbatch ")
CHAINS = commands(r"(pipeline|reproduce|curriculum)\.sh")
DEMOS = commands(r"^bash scripts/demo\.sh")
TESTS = ["bash scripts/test.sh"]  # which runs this file


def name(line):
    """The name of a command's test: the command without its output folder."""
    return re.sub(r" --save-dir \S+|^python ", "", line)[:90]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with all inputs that the page names, those included that other commands of the page write."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("videos_S", "saycam/S", "saycam/A", "saycam/Y", "my_videos"):
        # Two of them make more than one episode of the demo.
        write_videos(folder / name, {"S_20130417_0600_01.mp4": 120, "S_20131101_1200_01.mp4": 120})
    toys = [f"{category}_{exemplar:02}" for category in ("airplane", "truck") for exemplar in range(1, 5)]
    write_videos(folder / "toybox_videos", {f"{toy}_pivothead_rxplus.mp4": 120 for toy in toys})
    write_video(folder / "room.mp4", 60)
    read_saycam.main([str(folder / "videos_S"), "--save-dir", str(folder / "frames_S"), "--seg-len=1", "--workers=0"])
    for name in ("frames_A", "frames_Y"):
        shutil.copytree(folder / "frames_S", folder / name)
    make_frames(folder / "labeled_S", CATEGORIES, 20, 64)
    (folder / "words.csv").write_text("file,seconds,class\nS_20130417_0600_01.mp4,1.5,ball\n")
    stimuli = sorted(path.relative_to(folder) for path in (folder / "labeled_S").rglob("*.jpeg"))[:40]
    (folder / "stimuli.csv").write_text("\n".join(["file", *map(str, stimuli)]))
    for part in ("train", "val"):
        make_frames(folder / "imagenet" / part)
    for category in ("airplane", "truck"):
        images = make_frames(folder / "toybox" / category, ("images",), 8, 64) / "images"
        for i, image in enumerate(sorted(images.iterdir())):
            image.rename(folder / "toybox" / category / f"{category}_{i // 2 + 1:02}_rzplus_{i:04}.jpeg")
        images.rmdir()
    torch.manual_seed(0)
    head = dict(arch="mobilenet_v2", n_out=3, classes=[f"class_{label:04d}" for label in range(3)])
    network = folder / "TC-S.tar"
    save_network(network, architectures.build("mobilenet_v2", 3), **head)
    head |= dict(n_out=8, classes=list(CATEGORIES))
    save_network(folder / "readout.tar", architectures.build("mobilenet_v2", 8), **head)
    copies = {
        "TC-S.tar": ["TC-S-mobilenet.tar", "TC-SAY.tar", "TC-SAY-resnext-IN-linear.tar", "IN-1pt/ft_IN_TC-SAY.tar"],
        "readout.tar": ["decoding/TC-S_labeledS_5_iid.tar"],
    }
    copies["TC-S.tar"] += ["IN-linear/best_ft_IN_TC-SAY.tar", "TC-S/resnext50_32x4d_epoch_15.tar"]
    copies["TC-S.tar"] += ["moco_img-S/moco_img_checkpoint_0011.pth.tar"]
    for source, names in copies.items():
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            os.link(folder / source, folder / name)
    return folder


@pytest.fixture(scope="module")
def results(inputs):
    """The results.json files of the page, of two small evaluations."""
    for script, name in {"linear_decoding.py": "decoding", "hog_baseline.py": "hog"}.items():
        words = f"{inputs}/labeled_S {FLAGS[script]} --save-dir {inputs}/{name}"
        run_in_process(script, [*words.split(), *(["--model-name", "random"] if name == "decoding" else [])])


def run_in_process(script, arguments):
    assert not importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(arguments)


def link_inputs(words, inputs, folder):
    """Link the inputs that a command names into folder, but what it names as its output folder."""
    named = [word for before, word in zip(["", *words], words, strict=False) if before != "--save-dir"]
    for word in [*named, *(f"{word}.tar" for word in named)]:
        if not word.startswith("-") and (inputs / word).exists() and not (folder / word).exists():
            (folder / word).parent.mkdir(parents=True, exist_ok=True)
            (folder / word).symlink_to(inputs / word)


@pytest.mark.parametrize("line", PYTHON, ids=name)
def test_a_python_command_runs(line, inputs, tmp_path, monkeypatch, handlers, request):
    words = shlex.split(line)
    script = next(word for word in words if word.endswith(".py"))
    if "results.json" in line or "report.py" in line:
        request.getfixturevalue("results")
    link_inputs(words, inputs, tmp_path)
    for word, folder in {"stimuli.csv": "labeled_S", "--locate": "frames_S"}.items():
        if word in words:
            (tmp_path / folder).symlink_to(inputs / folder)
    if "--model-name" in words:  # which names the architecture, too
        (tmp_path / "TC-SAY.tar").unlink()
        save_network(tmp_path / "TC-SAY.tar", architectures.build("resnext50_32x4d", 3))
    monkeypatch.chdir(tmp_path)
    words += FLAGS[script].split()
    if script == "read_saycam.py" and not {"--class-by", "--locate"} & set(words):
        words += ["--seg-len", "1"]
    if words[0] == "torchrun":
        words[words.index(script)] = str(ROOT / script)
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *words[1:]], check=True)
    else:
        run_in_process(script, words[2:])
    if "--save-dir" in words and not {"--dry-run", "--locate"} & set(words):
        assert any(Path(words[words.index("--save-dir") + 1]).iterdir())


def test_every_script_has_a_command():
    scripts = {path.name for path in ROOT.glob("*.py")} - {"moco_utils.py"}
    scripts |= {f"scripts/{name}.py" for name in ("embeddings", "pack_frames", "report")}
    assert {word for line in PYTHON for word in line.split() if word.endswith(".py")} == scripts == set(FLAGS)


def test_the_published_way_to_load_a_checkpoint_works(frames, tmp_path, monkeypatch, handlers):
    monkeypatch.chdir(tmp_path)
    run_in_process("temporal_classification.py", [str(frames), *FLAGS["temporal_classification.py"].split()])
    checkpoint = torch.load("shufflenet_v2_x0_5_epoch_0.tar", weights_only=True)
    model = torchvision.models.shufflenet_v2_x0_5()
    model.fc = torch.nn.Linear(1024, checkpoint["n_out"])
    model = torch.nn.DataParallel(model)
    model.load_state_dict(checkpoint["model_state_dict"])
    assert model.module.fc.out_features == 3


@pytest.fixture
def project(tmp_path, monkeypatch, inputs):
    """A copy of the project as the working folder, with its inputs."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "scripts", project / "scripts")
    shutil.copytree(ROOT / "moco", project / "moco")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, project)
    for path in inputs.iterdir():
        (project / path.name).symlink_to(path)
    (project / "scripts" / "setup.sh").write_text("# everything is installed\n")
    write_program(project / ".venv" / "bin" / "python", f'exec "{sys.executable}" "$@"')
    monkeypatch.chdir(project)
    monkeypatch.setenv("PATH", f"{project}/.venv/bin:{Path(sys.executable).parent}:{os.environ['PATH']}")
    return project


def run_in_shell(line):
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True)


@pytest.mark.parametrize("line", SBATCH, ids=name)
def test_an_sbatch_command_names_a_step_and_flags_that_exist(project, line, capsys):
    """All but one; test_slurm.py runs the steps."""
    write_program(project / ".venv/bin/sbatch", 'while [ "${1#--}" != "$1" ]; do shift; done\nbash "$@"')
    write_program(project / ".venv/bin/python", 'printf "%s\\n" "$@" >call')
    assert not run_in_shell(f"{line} --no-such-flag").returncode
    script, *arguments = Path("call").read_text().splitlines()
    module = os.path.relpath(script, project).removesuffix(".py").replace("/", ".")
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(module).parse_args(arguments)
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: --no-such-flag; see --help\n")


@pytest.mark.parametrize("line", CHAINS, ids=name)
def test_a_chain_of_steps_can_be_planned(project, line):
    done = run_in_shell(f"{line.replace('--local', '')} --dry-run")
    assert done.returncode == 0, done.stderr
    assert "temporal_classification" in done.stdout


THOROUGH = {"bash scripts/demo.sh", "bash scripts/demo.sh --full"}  # minutes each


@pytest.mark.parametrize(
    "line", [pytest.param(line, id=line, marks=pytest.mark.thorough if line in THOROUGH else ()) for line in DEMOS]
)
def test_the_demo_runs_to_its_table(project, line):
    done = run_in_shell(f"IMAGES=1 {line}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^TC +\d", done.stdout, re.MULTILINE)
    assert "films" in Path("demo/report.html").read_text()
    accuracies = json.loads(Path("demo/results.json").read_text())
    assert {"TC", "random", "hog", "majority", "chance"} <= set(accuracies) and accuracies["TC"]["iid"]["mean"] >= 0


def test_every_command_of_the_page_is_tested():
    assert sorted(commands()) == sorted([*PYTHON, *SBATCH, *CHAINS, *DEMOS, *TESTS])


def test_links_within_the_page_and_its_images_exist():
    titles = {re.sub(r"\W+", "-", title.lower()) for title in re.findall(r"^##+ (.+)$", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= titles
    images = [ROOT / name for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE)]
    assert images and all(image.stat().st_size < 300_000 for image in images)
