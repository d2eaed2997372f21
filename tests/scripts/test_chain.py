"""The chain of steps without SLURM, with a fake Python that records its calls and writes empty results."""

import re

import pytest

from tests.support import ROOT
from tests.support.shell import run_bash, write_program

STEPS = ["frames", "TC", "hog", "decoding", "maps", "selectivities", "top_images", "film", "class_film", "report"]
RESULTS = {
    "read_saycam.py": "manifest.json",
    "temporal_classification.py": "tiny_epoch_1.tar",
    "hog_baseline.py": "results.json",
    "linear_decoding.py": "results.json",
    "linear_combination_maps.py": "linear_combination_maps_class_0.pdf",
    "selectivities.py": "variance_explained_1_2_3.pdf",
    "highly_activating_imgs.py": "highly_activating_imgs_most_selective_6.pdf",
    "feature_animation.py": "intphys_feature_animation_1.mp4",
    "feature_animation_class.py": "computers_feature_animation_0.mp4",
}
PYTHON = """
script=$(basename "$1")
(IFS='|' && echo "$script|${*:2}" >> "$CALLS")
[ "$script" != "${FAILS:-}" ] || exit "${STATUS:-2}"
while [ "$1" != --save-dir ] && [ "$1" != --out ]; do shift; done
[ "$1" = --save-dir ] || { touch "$2" && exit; }
mkdir -p "$2"
echo '"complete": true' > "$2/$(sed -n "s/^$script //p" "$RESULTS")"
"""


@pytest.fixture
def pipeline(tmp_path):
    """A function that runs pipeline.sh on videos and labeled images; returns its result and the calls of Python."""
    for name in ("my videos", "labeled"):
        (tmp_path / name).mkdir()
    python = write_program(tmp_path / "python", PYTHON)
    (tmp_path / "results").write_text("".join(f"{script} {name}\n" for script, name in RESULTS.items()))

    def run(*arguments, **variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        own = {"PYTHON": python, "CALLS": calls, "RESULTS": tmp_path / "results", "MODEL": "tiny", "EPOCHS": 2}
        done = run_bash("pipeline.sh", *arguments, cwd=tmp_path, **own | variables)
        return done, calls.read_text().splitlines()

    return run


def test_local_steps_run_in_order_and_only_once(pipeline, tmp_path):
    done, calls = pipeline("my videos", "labeled", "--local")
    assert done.returncode == 0, done.stderr
    assert [call.split("|")[0] for call in calls] == [*RESULTS, "report.py"]
    folders = [f"pipeline/{name}" for name in ("TC", "hog", "decoding", "maps", "selectivities", "top_images", "films")]
    assert calls[-1] == "|".join(["report.py", *folders, "--out", "pipeline/report.html"])
    assert calls[0] == f"read_saycam.py|{tmp_path}/my videos|--save-dir|pipeline/frames"
    assert calls[1].endswith("--model|tiny|--save-dir|pipeline/TC|--epochs|2|--resume")
    (tmp_path / "pipeline" / "maps" / RESULTS["linear_combination_maps.py"]).unlink()
    done, calls = pipeline("my videos", "labeled", "--local")
    assert [call.split("|")[0] for call in calls] == ["linear_combination_maps.py", "report.py"]
    assert done.stdout.count("already done") == 8 and done.stdout.endswith("open pipeline/report.html\n")


AFTER_TC = ["linear_decoding.py", *list(RESULTS)[4:], "report.py"]
AFTER_DECODING = ["linear_combination_maps.py", "feature_animation_class.py", "report.py"]


@pytest.mark.parametrize("variables, again", [
    ({"DECODE_FLAGS": "--epochs 3"}, ["linear_decoding.py", *AFTER_DECODING]),
    ({"TC_FLAGS": "--lr 1"}, ["temporal_classification.py", *AFTER_TC]),
    ({"ANALYSIS_FLAGS": "--image-size 64"}, AFTER_TC[1:]),
])  # fmt: skip
def test_a_step_with_other_flags_runs_again_and_those_after_it(pipeline, variables, again):
    pipeline("my videos", "labeled", "--local")
    done, calls = pipeline("my videos", "labeled", "--dry-run", **variables)
    planned = re.findall(r"^    result: |bash scripts/(\w+)\.sh", done.stdout, re.MULTILINE)
    assert [f"{name}.py" for name in planned if name] == again and not calls
    done, calls = pipeline("my videos", "labeled", "--local", **variables)
    assert [call.split("|")[0] for call in calls] == again
    assert any(next(iter(variables.values())).replace(" ", "|") in call for call in calls)
    assert len(pipeline("my videos", "labeled", "--local", **variables)[1]) == 1


def test_a_failed_step_with_other_flags_keeps_its_old_result_from_counting(pipeline):
    pipeline("my videos", "labeled", "--local")
    flags = {"HOG_FLAGS": "--seeds 1"}
    assert pipeline("my videos", "labeled", "--local", FAILS="hog_baseline.py", **flags)[0].returncode == 1
    _, calls = pipeline("my videos", "labeled", "--local", **flags)
    assert [call.split("|")[0] for call in calls] == ["hog_baseline.py", "linear_decoding.py", *AFTER_DECODING]
    assert calls[0].endswith("--seeds|5|--seeds|1")


def test_a_folder_of_frames_is_done_only_when_it_is_complete(pipeline, tmp_path):
    pipeline("my videos", "labeled", "--local")
    (tmp_path / "pipeline" / "frames" / "manifest.json").write_text('"complete": false')
    _, calls = pipeline("my videos", "labeled", "--local")
    assert [call.split("|")[0] for call in calls] == ["read_saycam.py", "temporal_classification.py", *AFTER_TC]


@pytest.mark.parametrize("chain", ["pipeline", "reproduce", "curriculum", "demo"])
def test_help_is_the_comment_at_the_head_of_a_chain(chain, tmp_path):
    done = run_bash(f"{chain}.sh", *(["--local"] if chain != "demo" else []), "--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr and not list(tmp_path.iterdir())
    head = (ROOT / "scripts" / f"{chain}.sh").read_text().split("\nset -euo")[0].splitlines()[1:]
    assert done.stdout.splitlines() == [line[2:] for line in head]


@pytest.mark.parametrize("status, end, word", [("2", 1, "step TC failed with status 2"), ("75", 75, "has saved")])
def test_a_failed_or_stopped_step_ends_the_chain(pipeline, status, end, word):
    done, calls = pipeline("my videos", "labeled", "--local", FAILS="temporal_classification.py", STATUS=status)
    assert done.returncode == end and word in done.stderr
    assert len(calls) == 2


def test_a_dry_run_prints_the_steps_and_runs_none(pipeline, tmp_path):
    done, calls = pipeline("my videos", "labeled", "--dry-run", MOCO="yes")
    assert done.returncode == 0 and not calls and not (tmp_path / "pipeline").exists()
    names = [line.split(":")[0].split(",")[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert names == [*STEPS[:2], "moco_img", "moco_temp", *STEPS[2:]]
    assert "decoding, after TC moco_img moco_temp hog:" in done.stdout
    assert "moco_temp_checkpoint_0011.pth.tar" in done.stdout


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["my videos"], "give a folder of videos, and one with a folder of labeled images per class"),
        (["my videos", "nowhere"], "there is no folder nowhere"),
        (["my videos", "labeled", "--here"], "unknown argument --here"),
        (["my videos", "labeled"], "there is no sbatch; give --local"),
    ],
)
def test_wrong_arguments_are_one_line(pipeline, tmp_path, arguments, word):
    tools = tmp_path / "tools"  # no sbatch among them
    tools.mkdir()
    for name in ("bash", "dirname", "basename", "env", "sed"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    done, calls = pipeline(*arguments, PATH=str(tools))
    assert done.returncode == 2 and not calls
    assert done.stderr.startswith("pipeline.sh: error: ") and word in done.stderr and done.stderr.count("\n") == 1


def test_a_missing_python_is_named(pipeline):
    done, _ = pipeline("my videos", "labeled", "--local", PYTHON="no-such-python")
    assert done.returncode == 1 and "there is no no-such-python; run 'bash scripts/setup.sh'" in done.stderr


@pytest.mark.parametrize("flags", ["--epochs 3", "--epochs=3", "--epochs 9 --lr 1 --epochs=3"])
def test_results_follow_the_epochs_that_the_flags_ask_for(pipeline, flags):
    done, _ = pipeline("my videos", "labeled", "--dry-run", TC_FLAGS=flags, MOCO_FLAGS=flags, MOCO="yes")
    results = re.findall(r"result: (\S+)", done.stdout)
    assert results[1:4] == [
        "pipeline/TC/tiny_epoch_2.tar",
        "pipeline/moco_img/moco_img_checkpoint_0002.pth.tar",
        "pipeline/moco_temp/moco_temp_checkpoint_0002.pth.tar",
    ]
    assert "MODELS=random:pipeline/TC/tiny_epoch_2.tar:" in done.stdout


@pytest.mark.parametrize(
    "variable, flags, word",
    [
        ("TC_FLAGS", "--epochs many", "--epochs many is not a positive integer"),
        ("TC_FLAGS", "--lr 1 --save-dir=elsewhere", "TC_FLAGS: --save-dir is set by this script"),
        ("MOCO_FLAGS", "-a resnet18", "MOCO_FLAGS: -a is set by this script"),
        ("DECODE_FLAGS", "--names x", "DECODE_FLAGS: --names is set by this script"),
        ("READ_FLAGS", "--save-dir x", "READ_FLAGS: --save-dir is set by this script"),
    ],
)
def test_flags_that_would_move_a_result_are_refused(pipeline, variable, flags, word):
    done, calls = pipeline("my videos", "labeled", "--local", **{variable: flags})
    assert done.returncode == 2 and not calls
    assert word in done.stderr and done.stderr.count("\n") == 1


def test_a_step_that_succeeds_without_its_result_ends_the_chain(pipeline, tmp_path):
    (tmp_path / "results").write_text("temporal_classification.py another_name.tar\nread_saycam.py manifest.json\n")
    done, calls = pipeline("my videos", "labeled", "--local")
    assert done.returncode == 1 and len(calls) == 2
    assert "step TC succeeded without writing pipeline/TC/tiny_epoch_1.tar" in done.stderr
