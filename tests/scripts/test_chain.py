"""The chain of steps without SLURM, on a Python that only notes what it is told and leaves the results behind."""

import os
import subprocess

import pytest

from tests.support import ROOT

STEPS = ["frames", "TC", "hog", "decoding", "maps", "selectivities", "top_images", "film", "class_film"]
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
PYTHON = """#!/usr/bin/env bash
script=$(basename "$1")
(IFS='|' && echo "$script|${*:2}" >> "$CALLS")
[ "$script" != "${FAILS:-}" ] || exit "${STATUS:-2}"
while [ "$1" != --save-dir ]; do shift; done
mkdir -p "$2"
echo '"complete": true' > "$2/$(sed -n "s/^$script //p" "$RESULTS")"
"""


@pytest.fixture
def pipeline(tmp_path):
    """Runs pipeline.sh in a folder with videos and labelled images; gives its end and the calls of Python."""
    for name in ("my videos", "labelled"):
        (tmp_path / name).mkdir()
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "results").write_text("".join(f"{script} {name}\n" for script, name in RESULTS.items()))

    def run(*arguments, **variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        names = {"PYTHON": tmp_path / "python", "CALLS": calls, "RESULTS": tmp_path / "results"}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        environment |= {name: str(value) for name, value in names.items()} | {"MODEL": "tiny", "EPOCHS": "2"}
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / "pipeline.sh"), *arguments],
            env=environment | variables, cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done, calls.read_text().splitlines()

    return run


def test_the_chain_runs_here_and_only_once(pipeline, tmp_path):
    done, calls = pipeline("my videos", "labelled", "--local")
    assert done.returncode == 0, done.stderr
    assert [call.split("|")[0] for call in calls] == list(RESULTS)
    assert calls[0] == f"read_saycam.py|{tmp_path}/my videos|--save-dir|pipeline/frames"
    assert calls[1].endswith("--model|tiny|--save-dir|pipeline/TC|--epochs|2|--resume")
    (tmp_path / "pipeline" / "maps" / RESULTS["linear_combination_maps.py"]).unlink()
    done, calls = pipeline("my videos", "labelled", "--local")
    assert [call.split("|")[0] for call in calls] == ["linear_combination_maps.py"]
    assert done.stdout.count("done already") == 8


def test_a_folder_of_frames_counts_when_it_is_complete(pipeline, tmp_path):
    pipeline("my videos", "labelled", "--local")
    (tmp_path / "pipeline" / "frames" / "manifest.json").write_text('"complete": false')
    assert [call.split("|")[0] for call in pipeline("my videos", "labelled", "--local")[1]] == ["read_saycam.py"]


@pytest.mark.parametrize("status, end, word", [("2", 1, "the step TC failed with status 2"), ("75", 75, "has saved")])
def test_a_step_that_ends_early_ends_the_chain(pipeline, status, end, word):
    done, calls = pipeline("my videos", "labelled", "--local", FAILS="temporal_classification.py", STATUS=status)
    assert done.returncode == end and word in done.stderr
    assert len(calls) == 2


def test_a_dry_run_says_what_would_be_done_and_does_nothing(pipeline, tmp_path):
    done, calls = pipeline("my videos", "labelled", "--dry-run", MOCO="yes")
    assert done.returncode == 0 and not calls and not (tmp_path / "pipeline").exists()
    names = [line.split(":")[0].split(",")[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert names == [*STEPS[:2], "moco_img", "moco_temp", *STEPS[2:]]
    assert "decoding, after TC moco_img moco_temp hog:" in done.stdout
    assert "moco_temp_checkpoint_0011.pth.tar" in done.stdout


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["my videos"], "give a folder of videos and one of labelled images"),
        (["my videos", "nowhere"], "there is no folder nowhere"),
        (["my videos", "labelled", "--here"], "unknown argument --here"),
        (["my videos", "labelled"], "there is no sbatch here"),
    ],
)
def test_mistakes_are_one_line(pipeline, tmp_path, arguments, word):
    tools = tmp_path / "tools"  # no sbatch among them
    tools.mkdir()
    for name in ("bash", "dirname", "basename", "env", "sed"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    done, calls = pipeline(*arguments, PATH=str(tools))
    assert done.returncode == 2 and not calls
    assert done.stderr.startswith("pipeline.sh: error: ") and word in done.stderr and done.stderr.count("\n") == 1


def test_a_step_without_a_python_says_so(pipeline):
    done, _ = pipeline("my videos", "labelled", "--local", PYTHON="no-such-python")
    assert done.returncode == 1 and "there is no no-such-python; run 'bash scripts/setup.sh'" in done.stderr


def test_a_task_of_an_array_decodes_the_model_of_its_number(pipeline, tmp_path):
    pipeline("my videos", "labelled", "--dry-run")  # leaves the calls' file
    variables = {"SLURM_ARRAY_TASK_ID": "1", "MODELS": "random:my nets/a.tar", "NAMES": "random:a", "HOUSE": str(ROOT)}
    variables |= {name: str(tmp_path / name.lower()) for name in ("PYTHON", "CALLS", "RESULTS")}
    step = ["bash", str(ROOT / "scripts" / "linear_decoding.sh"), "--seeds", "2"]
    subprocess.run(step, env=os.environ | variables, cwd=tmp_path, check=True)
    flags = "--model-path|my nets/a.tar|--names|a|--save-dir|decoding/a|--seeds|2"
    assert (tmp_path / "calls").read_text() == f"linear_decoding.py|labeled_S|{flags}\n"
