"""The steps and their chain on a real SLURM cluster of three nodes on this host: arrays, ranks, requeues, failures."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import read_saycam
from moco.networks import checkpoint
from scripts import make_demo_videos
from tests.support import ROOT
from tests.support.shell import write_program
from tests.support.training import SMALL, everything, same
from tests.support.videos import write_video
from tests.test_read_saycam import tree

STEPS = [path.stem for path in sorted((ROOT / "scripts").glob("*.sh")) if "#SBATCH" in path.read_text()]
RESOURCES = ["--mem=2G", "--ntasks-per-node=1", "--cpus-per-task=1"]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    """A SLURM cluster to submit to. Without its packages the tests are skipped, except in continuous integration."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if (missing or os.geteuid()) and not os.environ.get("CI"):
        pytest.skip("SLURM tests need root and Debian's slurmctld, slurmd, slurm-client and munge")
    folder = tmp_path_factory.mktemp("slurm")
    script = ["bash", str(ROOT / "tests" / "scripts" / "slurm.sh")]
    subprocess.run([*script, "start", folder, "3"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PYTHON", sys.executable)
        yield
        subprocess.run(["scancel", "--user=root"], check=True)
        subprocess.run([*script, "stop", folder], check=True)


def output_of(*command, **variables):
    """The output of a command, run with further environment variables."""
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    done = subprocess.run(list(map(str, command)), env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def submit(step, log, flags=(), arguments=(), **variables):
    """Submit a step from the project's folder; returns the number of its job."""
    command = ["sbatch", "--parsable", f"--output={log}", *RESOURCES, *flags, f"scripts/{step}.sh", *arguments]
    return output_of(*command, **variables).strip()


def state(job):
    """SLURM's record of a job as {name: value}, one per task of an array."""
    return [
        dict(re.findall(r"(\w+)=(\S*)", text))
        for text in output_of("scontrol", "--oneliner", "show", "job", job).splitlines()
    ]


def wait_for(condition, seconds=300):
    """Wait until condition() is true; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, output_of("squeue", "--long")
        time.sleep(0.1)


def final_states(*jobs):
    """The states of jobs after all have ended."""
    unfinished = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
    wait_for(lambda: not any(each["JobState"] in unfinished for job in jobs for each in state(job)))
    return [each["JobState"] for job in jobs for each in state(job)]


def steps_done(folder):
    log = folder / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


@pytest.mark.parametrize("step", STEPS)
def test_slurm_accepts_the_resources_of_a_step(step):
    assert len(STEPS) == 15  # the published steps, embeddings, pack_frames and report
    output_of("sbatch", "--test-only", f"scripts/{step}.sh")


def test_an_array_writes_the_frames_of_a_single_run(tmp_path):
    (tmp_path / "videos").mkdir()
    for name, count in {"a": 40, "b": 7, "c": 60, "d": 25}.items():
        write_video(tmp_path / "videos" / f"{name}.mp4", count)
    flags = ["--size", "64", "--seg-len", "1"]
    read_saycam.main([str(tmp_path / "videos"), "--save-dir", str(tmp_path / "single"), "--workers", "0", *flags])
    job = submit(
        "read_saycam", tmp_path / "%a.out", ["--array=1-3"], flags, DATA=tmp_path / "videos", SAVE=tmp_path / "array"
    )
    assert final_states(job) == ["COMPLETED"] * 3, (tmp_path / "1.out").read_text()
    assert tree(tmp_path / "array") == tree(tmp_path / "single")


def train(frames, save_dir, *more, gpus=4):
    """Submit a training of 48 steps on two nodes with a task each, which starts a process per GPU if it has several."""
    flags = [*SMALL, "--image-size", "64", "--batch-size", "2", "--epochs", "4", "--print-freq", "1", *more]
    variables = {"DATA": frames, "SAVE": save_dir, "MODEL": flags[1]}
    resources = ["--nodes=2", f"--gres=gpu:{gpus}"]
    return submit("temporal_classification", save_dir.with_suffix(".out"), resources, flags[2:], **variables)


def is_restarted(job):
    """Start a requeued job, which SLURM delays for two minutes, and return whether it runs."""
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)
    return state(job)[0]["JobState"] == "RUNNING"


def test_two_preemptions_on_two_nodes_do_not_change_the_result(frames, tmp_path):
    full = train(frames, tmp_path / "full")
    cut = train(frames, tmp_path / "cut", gpus=1)
    log = tmp_path / "cut.out"
    done = 0
    for time_up in (1, 2):
        wait_for(lambda done=done: steps_done(tmp_path / "cut") > done + 3)
        output_of("scancel", "--batch", "--signal=USR2", cut)  # as --signal=B:USR2@120 does before the time limit
        wait_for(lambda n=time_up: state(cut)[0]["Restarts"] == str(n))
        done = steps_done(tmp_path / "cut")
        time.sleep(3)  # SLURM confuses a job that restarts within a second of its requeue with the one that just ended
        wait_for(lambda: is_restarted(cut))
    assert final_states(full, cut) == ["COMPLETED"] * 2, log.read_text()
    assert "on 2 x cpu" in log.read_text() and log.read_text().count("asks SLURM to requeue it") == 2
    assert len(re.findall("stopped by SIGUSR2 after step", log.read_text())) == 2
    assert same(everything(tmp_path / "full"), everything(tmp_path / "cut"))
    losses = [re.findall(r'"loss": ([\d.]+)', (tmp_path / run / "log.jsonl").read_text()) for run in ("full", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 48 + 4


def test_a_canceled_training_saves_and_is_not_requeued(frames, tmp_path):
    job = train(frames, tmp_path / "run", "--epochs", "1000")
    wait_for(lambda: steps_done(tmp_path / "run") > 3)
    output_of("scancel", job)
    assert final_states(job) == ["CANCELLED"]
    wait_for(lambda: "saved; continue with --resume" in (tmp_path / "run.out").read_text())
    content = checkpoint.read(tmp_path / "run" / "last.tar")
    assert 12 * content["epoch"] + content["step"] >= steps_done(tmp_path / "run") - content["epoch"] - 1
    assert state(job)[0]["Restarts"] == "0"


def test_an_error_in_one_task_ends_the_others(tmp_path):
    (tmp_path / "task.py").write_text("""
import os, sys, time
if os.environ["SLURM_PROCID"] == "1":
    sys.exit("error: rank 1 cannot go on")
time.sleep(1000)
""")
    (tmp_path / "job.sh").write_text(f"""#!/usr/bin/env bash
project={tmp_path}
source {ROOT}/scripts/step.sh
train task.py
""")
    flags = [*RESOURCES, "--nodes=2", f"--output={tmp_path / 'job.out'}"]
    job = output_of("sbatch", "--parsable", *flags, tmp_path / "job.sh").strip()
    assert final_states(job) == ["FAILED"]
    assert "error: rank 1 cannot go on" in (tmp_path / "job.out").read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A very small data set of the demo."""
    folder = tmp_path_factory.mktemp("world")
    small = {"videos": 2, "episodes": 2, "seconds": 2, "toys": 1, "exemplars": 2, "views": 4}
    flags = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    make_demo_videos.main(["--save-dir", str(folder), "--workers", "0", *flags])
    return folder


def pipeline(world, out, **more):
    """Submit the chain for a data set; returns the jobs by step, and the output."""
    variables = {"OUT": out, "MODEL": "resnet18", "EPOCHS": 1, "SBATCH_FLAGS": " ".join(RESOURCES)}
    variables |= {"READ_FLAGS": "--seg-len 2", "SBATCH_FLAGS_frames": "--array=0-1", "HOG_FLAGS": "--seeds 1"}
    variables["TC_FLAGS"] = "--device cpu --image-size 64 --batch-size 8 --workers 0 --no-augmentation"
    variables["DECODE_FLAGS"] = "--device cpu --image-size 64 --seeds 1 --epochs 2 --workers 0"
    variables["ANALYSIS_FLAGS"] = "--device cpu --image-size 64 --workers 0"
    output = output_of("bash", "scripts/pipeline.sh", world / "videos", world / "labeled", **variables | more)
    return dict(re.findall(r"^(\w+): job (\d+)", output, re.MULTILINE)), output


def test_the_pipeline_runs_each_step_once(world, tmp_path):
    jobs, output = pipeline(world, tmp_path / "out")
    assert len(jobs) == 10
    again, repeated = pipeline(world, tmp_path / "out")
    assert not again and repeated.count("already queued") + repeated.count("already done") == 10
    states = final_states(*jobs.values())
    logs = {path.name: path.read_text() for path in (tmp_path / "out" / "logs").iterdir()}
    assert set(states) == {"COMPLETED"}, logs
    results = re.findall(r"result: (\S+)", output)
    assert len(results) == 10 and all(Path(result).exists() for result in results)
    assert pipeline(world, tmp_path / "out")[1].count("already done") == 9


def test_a_failed_step_cancels_its_dependents_with_a_message(world, tmp_path):
    # which reads no videos, and does the rest at once
    python = write_program(tmp_path / "python", "case $1 in *read_saycam.py) exit 2 ;; esac")
    jobs, _ = pipeline(world, tmp_path / "out", PYTHON=python)
    states = dict(zip(jobs, [final_states(job)[-1] for job in jobs.values()], strict=True))
    assert states.pop("hog") == states.pop("report") == "COMPLETED" and states.pop("frames") == "FAILED"
    assert set(states.values()) == {"CANCELLED"}
    log = next((tmp_path / "out" / "logs").glob("frames_*.out")).read_text()
    assert "failed with status 2. Dependent jobs are canceled" in log


def test_a_step_that_waits_with_other_flags_is_named(world, tmp_path):
    jobs, _ = pipeline(world, tmp_path / "out", PYTHON=write_program(tmp_path / "python", "sleep 600"))
    done = subprocess.run(
        ["bash", "scripts/pipeline.sh", world / "videos", world / "labeled"],
        env={**os.environ, "OUT": str(tmp_path / "out"), "MODEL": "resnet18"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.endswith(
        f"frames is queued with other flags; wait for it, or cancel it with: scancel {jobs['frames']}\n"
    )
    output_of("scancel", *jobs.values())
