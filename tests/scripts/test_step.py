"""What the steps share (scripts/step.sh), without SLURM: a fake Python records its calls."""

import os
import subprocess

import pytest

from tests.support import ROOT
from tests.support.shell import run_bash, write_program

PYTHON = """(IFS='|' && echo "$(basename "$1")|${*:2}" >> calls)"""


@pytest.fixture
def step(tmp_path):
    """A function that runs a step with some variables in tmp_path; returns its result, and the calls of Python."""

    def run(name, *arguments, python=PYTHON, **variables):
        program = write_program(tmp_path / "python", python)
        done = run_bash(f"{name}.sh", *arguments, cwd=tmp_path, PYTHON=program, **variables)
        calls = tmp_path / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def array(first, last, task, count=None):
    """The variables of a task of a job array."""
    variables = {"MIN": first, "MAX": last, "ID": task, "COUNT": count or last - first + 1}
    return {f"SLURM_ARRAY_TASK_{name}": value for name, value in variables.items()}


@pytest.mark.parametrize("variables, flags", [
    ({}, ""),
    (array(0, 7, 3), "|--shard|3/8"),
    (array(1, 4, 4), "|--shard|3/4"),
    (array(0, 0, 0), "|--shard|0/1"),
])  # fmt: skip
def test_the_tasks_of_an_array_share_the_videos(step, variables, flags):
    done, calls = step("read_saycam", "--fps", "1", **variables)
    assert not done.returncode and calls == [f"read_saycam.py|videos_S|--save-dir|frames_S{flags}|--fps|1"]


@pytest.mark.parametrize("variables", [array(3, 3, 3), array(4, 7, 4), array(0, 6, 2, 4), array(1, 5, 5, 2)])
@pytest.mark.parametrize("name", ["read_saycam", "embeddings"])
def test_a_part_of_an_array_is_refused(step, name, variables):
    """--array=3, 4-7, 0-6:2 and 1,5."""
    done, calls = step(name, **variables)
    assert (done.returncode, calls) == (2, []) and done.stderr.count("\n") == 1
    assert "--array=0-N or 1-N" in done.stderr


def test_an_array_task_decodes_the_model_with_its_index(step):
    variables = {"MODELS": "random:my nets/a.tar", "NAMES": "random:a"}
    done, calls = step("linear_decoding", "--seeds", "2", **variables, **array(1, 1, 1))
    flags = "--model-path|my nets/a.tar|--names|a|--save-dir|decoding/a|--seeds|2"
    assert not done.returncode and calls == [f"linear_decoding.py|labeled_S|{flags}"]
    for few in ({}, {"NAMES": "random"}):
        done, calls = step("linear_decoding", **variables | few, **array(1, 2, 1 if few else 2))
        assert done.returncode == 2 and len(calls) == 1 and done.stderr.count("\n") == 1
        assert "there is no model or name number" in done.stderr


def test_a_step_finds_the_project(step, tmp_path):
    """Under SLURM a step is a copy elsewhere, submitted from the project's folder or from another."""
    copy = tmp_path / "spool" / "slurm_script"
    write_program(copy.with_suffix(".sh"), (ROOT / "scripts" / "hog_baseline.sh").read_text())
    for variables in ({"SLURM_SUBMIT_DIR": ROOT}, {"SLURM_SUBMIT_DIR": tmp_path, "PROJECT_DIR": ROOT}):
        assert not step(copy, **variables)[0].returncode
    assert len(step("hog_baseline", SLURM_SUBMIT_DIR=tmp_path)[1]) == 3  # by bash in a job
    done, calls = step(copy, SLURM_SUBMIT_DIR=tmp_path)
    assert done.returncode and len(calls) == 3 and done.stderr.count("\n") == 1
    assert "set PROJECT_DIR to the folder of this project" in done.stderr


MEET = "MASTER_ADDR=10.0.0.1 MASTER_PORT=20007"


@pytest.mark.parametrize("tasks, nodes, gpus, rank, expected", [
    (1, 1, 4, 0, ""),
    (4, 1, 4, 3, f"LOCAL_RANK=3 LOCAL_WORLD_SIZE=4 {MEET} RANK=3 WORLD_SIZE=4"),
    (5, 2, 0, 3, f"LOCAL_RANK=0 LOCAL_WORLD_SIZE=3 {MEET} RANK=3 WORLD_SIZE=5"),
    (2, 2, 1, 1, f"LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 {MEET} RANK=1 WORLD_SIZE=2"),
    (2, 2, 4, 1, "--world-size 2 --rank 1 --dist-url tcp://10.0.0.1:20007"),
])  # fmt: skip
def test_a_task_has_a_rank_or_starts_a_process_per_gpu(tasks, nodes, gpus, rank, expected):
    """Five tasks on two nodes are three and two."""
    show = """env | grep -E "^(RANK|WORLD_SIZE|LOCAL_|MASTER_)" | sort; echo "$@" """
    script = f"project=; PYTHON=true; source {ROOT}/scripts/step.sh; task 10.0.0.1 20007 bash -c '{show}' bash"
    slurm = {
        "NTASKS": tasks,
        "NNODES": nodes,
        "GPUS_ON_NODE": gpus,
        "PROCID": rank,
        "LOCALID": rank % -(-tasks // nodes),
    }
    environment = {"PATH": os.environ["PATH"], **{f"SLURM_{name}": str(value) for name, value in slurm.items()}}
    output = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True).stdout
    assert " ".join(output.split()) == expected


SRUN = """
trap 'exit 75' USR2
kill -%s $PPID
while :; do sleep 0.1; done
"""
SCONTROL = """
case $* in
"show hostnames n1") echo n1 ;;
"show node n1") echo "NodeName=n1 NodeAddr=127.0.0.1 Port=1" ;;
"requeue 7") echo "error: Requeue of job 7 is disabled" >&2 && exit 1 ;;
*) exit 3 ;;
esac
"""


@pytest.mark.parametrize("stop", ["USR2", "TERM"])
def test_a_job_says_that_it_is_requeued_only_if_it_is(step, tmp_path, stop):
    """After the warning of the time limit, where SLURM refuses; and it does not ask after a cancellation."""
    for name, text in {"srun": SRUN % stop, "scontrol": SCONTROL}.items():
        write_program(tmp_path / name, text)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done, _ = step("temporal_classification", PATH=path, SLURM_JOB_ID=7, SLURM_JOB_NODELIST="n1")
    assert done.returncode == 75
    asks = "job 7 has saved, and asks SLURM to requeue it; it resumes when it starts again\n"
    refused = ["error: Requeue of job 7 is disabled", "job 7 could not be requeued; submit it again to resume"]
    assert (done.stdout, done.stderr.splitlines()) == ((asks, refused) if stop == "USR2" else ("", []))


TRAINER = """
folder=.
for word; do
    case $word in --save-dir=*) folder=${word#*=} ;; *) [ "${previous:-}" != --save-dir ] || folder=$word ;; esac
    previous=$word
done
[ -n "${TRAINS_NOT:-}" ] || { mkdir -p "$folder" && touch "$folder/last.tar"; }
exit "${STATUS:-0}"
"""


@pytest.mark.parametrize(
    "arguments, variables, finished",
    [
        ([], {}, "out"),
        (["--save-dir", "my folder"], {}, "my folder"),
        (["--save-dir=other", "--lr", "1"], {}, "other"),
        (["--evaluate"], {"TRAINS_NOT": "yes"}, None),
        (["--help"], {"TRAINS_NOT": "yes"}, None),
        ([], {"TRAINS_NOT": "yes"}, None),
        ([], {"STATUS": "75"}, None),
    ],
)
def test_only_a_training_that_ended_is_marked_as_finished(step, tmp_path, arguments, variables, finished):
    done, _ = step("imagenet_finetuning", *arguments, python=TRAINER, SAVE="out", **variables)
    assert done.returncode == int(variables.get("STATUS", 0)) and not done.stderr
    folders = [path.parent.name for path in tmp_path.rglob("finished")]
    assert folders == ([finished] if finished else [])


def test_an_evaluation_does_not_mark_an_interrupted_training_as_finished(step, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last.tar").write_text("")
    assert not step("imagenet_finetuning", "--evaluate", SAVE="out")[0].returncode
    assert not (tmp_path / "out" / "finished").exists()
