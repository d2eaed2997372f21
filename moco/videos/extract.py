"""Many videos into one frame folder: plan, extract_frames, go on after a kill, name what was left out."""

import json
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from moco import cli, files, pool
from moco.data import manifest
from moco.videos import listing


def make_plan(roots, settings, listed, plan_video, workers):
    """The plan for the listed files; UserError that names each of them if none can be read.

    roots: folders of videos. listed: the result of listing.list_videos. plan_video(path): what the plan
    is to say of a video, with its number of slots, or a string that says why it cannot be read. workers:
    a pool.WorkerPool.
    """
    readable, refused = listed
    left_out = [{"folder": number, "name": name, "reason": reason} for number, name, reason in refused]
    paths = [os.path.join(roots[number], name) for number, name, _ in readable]
    results, videos = [], []
    with cli.Progress(len(paths), "plan", "videos") as progress:
        for result in workers.map(plan_video, paths):
            results.append(result)
            progress.update()
    for number, (root, name, size) in enumerate(readable):
        if isinstance(results[number], dict):
            videos.append({"folder": root, "name": name, "bytes": size, **results[number]})
        else:
            left_out.append({"folder": root, "name": name, "reason": results[number]})
    plan = manifest.make(settings, roots, videos, left_out)
    if not plan["slots"] and plan["videos"]:
        raise cli.UserError("--drop-last leaves nothing: the videos are shorter than one episode of --seg-len seconds")
    if not plan["slots"]:
        raise _nothing_read(plan)
    slow = sum(video["rate"] < 0.99 * settings["fps"] for video in plan["videos"])
    if slow:
        print(f"{slow} of {len(videos)} videos have fewer than {settings['fps']:g} frames a second: all are taken")
    return plan


def matching_plan(folder, settings, listed):
    """The plan that a frame folder has already, or None; UserError where it is for other videos or settings.

    A file that has changed in size since is not a matter here: its slots are known, and it will be left out.
    """
    plan = manifest.read(folder)
    if plan is None:
        return None
    differences = [
        f"--{flag} was {plan['settings'].get(flag)}, not {value}"
        for flag, value in settings.items()
        if value != plan["settings"].get(flag)
    ]
    videos, done = plan["videos"], completed_videos(folder)
    planned = {(each["folder"], each["name"]) for each in videos + plan["left_out"]}
    there = {(root, name) for part in listed for root, name, _ in part}
    needed = {(each["folder"], each["name"]) for n, each in enumerate(videos) if n not in done}
    differences += [f"{listing.printable(name)} was not there" for _, name in sorted(there - planned)[:5]]
    if not plan["complete"]:
        differences += [f"{listing.printable(name)} was there" for _, name in sorted(needed - there)[:5]]
    if differences:
        where = Path(folder) / manifest.NAME
        raise cli.UserError(f"{where} is of another run: {'; '.join(differences)}. Give another --save-dir")
    return plan


def begin(folder, plan):
    """Write a new plan into a frame folder and return it; UserError where its classes are there, of unknown origin."""
    there = {path.name for path in Path(folder).iterdir()}
    for name in [*manifest.class_names(plan), *progress_logs(folder)]:
        if name in there and not (Path(folder) / manifest.NAME).exists():  # by now another shard may have begun
            raise cli.UserError(f"{folder} has a {name} already, but no {manifest.NAME}. Give another --save-dir")
    manifest.write(folder, plan)
    return plan


def read_videos(folder, plan, roots, extract_frames, workers, shard):
    """Extract the frames of a part of the plan's videos that are not complete yet, and return the plan.

    extract_frames(folder, head, task, report) writes the images of one video and returns (runs of slots without an
    image, the reason or None); task: (path, its entry in the plan); head: what the plan has for all videos. shard:
    (part, number of parts).
    """
    if plan["complete"]:
        return plan
    videos, done = plan["videos"], completed_videos(folder)
    part, parts = shard
    longest_first = sorted(range(len(videos)), key=lambda number: -videos[number]["frames"])  # so that all end together
    numbers = [number for number in longest_first[part::parts] if number not in done]
    tasks = [(os.path.join(roots[videos[n]["folder"]], videos[n]["name"]), videos[n]) for n in numbers]
    head = {key: plan[key] for key in ("settings", "per_class", "class_digits", "image_digits")}
    hours, past, start = sum(_hours(video, video["frames"]) for _, video in tasks), 0.0, time.monotonic()
    notes, frames = [], sum(video["frames"] for _, video in tasks)
    with cli.Progress(frames, "read", "frames") as progress, ThreadPoolExecutor(1) as disk:  # nobody waits for the disk

        def advance(task, amount):
            nonlocal past
            past += _hours(tasks[task][1], amount)
            left, pace = max(0, hours - past), past / (time.monotonic() - start) * 3600
            progress.update(amount, f"{past:.2f} h of video done, {left:.2f} h left, {pace:.0f} h an hour")

        for task, result in workers.as_completed(partial(extract_frames, folder, head), tasks, advance):
            video = tasks[task][1]
            if isinstance(result, pool.WorkerCrash):
                result = [[video["first_slot"], video["first_slot"] + video["slots"]]], result
                clear(folder, plan, video, result[0])
            notes.append(disk.submit(mark_done, folder, numbers[task], *result))
    for each in notes:
        each.result()  # raises what went wrong with it
    return _finished(folder, plan)


def _hours(video, frames):
    return frames / video["rate"] / 3600


def _finished(folder, plan):
    """The plan with what is noted of its videos, written as complete where every video is."""
    lines = completed_videos(folder)
    if len(lines) < len(plan["videos"]):
        now = manifest.read(folder)  # another process may just have completed it and removed the progress logs
        return now if now["complete"] else with_notes(plan, lines)
    plan = with_notes(plan, lines)
    images = manifest.Manifest(plan, folder)
    for name in set(manifest.class_names(plan)) - set(images.classes):
        if (Path(folder) / name).is_dir():
            (Path(folder) / name).rmdir()  # ImageFolder stops at an empty class
    if not len(images):
        remove(folder)
        raise _nothing_read(plan)
    return complete(folder, plan)


def _nothing_read(plan):
    where = ", ".join(plan["folders"])
    named = "; ".join(f"{listing.printable(name)}: {reason}" for name, reason in manifest.left_out(plan))
    if named:
        return cli.UserError(f"no video could be read in {where} ({named}). Give a folder of videos")
    return cli.UserError(f"there is no video in {where}. Give a folder of videos, or --recursive for its sub-folders")


# Progress logs: while frames are extracted, each process appends a line to a file of its own for every video whose
# images are all on disk. So several machines may share the work on a network disk.


def mark_done(folder, number, missing, reason):
    """Note that all images of a video are written, but those of the missing runs of slots; reason may be None.

    The images are flushed to disk first, so that a power cut cannot leave a note of images that are not there.
    """
    line = json.dumps({"video": number, "missing": missing, "reason": reason})
    path = Path(folder) / f"filled-{platform.node()}-{os.getpid()}.jsonl"
    os.sync()
    files.append(path, f"\n{line}")  # the line break comes first: a killed writer may have left half a line


def completed_videos(folder):
    """{number of a video: its line in the progress logs} for the videos whose images are all on disk."""
    lines = {}
    for name in progress_logs(folder):
        try:
            written = (Path(folder) / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue  # another process has just completed the plan
        for text in written.splitlines():
            with suppress(ValueError):  # a line may be cut off by a kill
                line = json.loads(text)
                lines[line["video"]] = line
    return lines


def progress_logs(folder):
    """The names of the progress logs in a frame folder."""
    return sorted(path.name for path in Path(folder).glob("filled-*.jsonl"))


def with_notes(plan, lines):
    """The plan with the entries of the progress logs added to its videos."""
    for number, line in lines.items():
        plan["videos"][number]["missing"] = line["missing"]
        if line["reason"]:
            plan["videos"][number]["reason"] = line["reason"]
    return plan


def complete(folder, plan):
    """Write the plan as complete, remove the progress logs, and return the plan."""
    plan["complete"] = True
    manifest.write(folder, plan)
    _remove_progress_logs(folder)
    return plan


def remove(folder):
    """Remove plan and progress logs from a frame folder."""
    (Path(folder) / manifest.NAME).unlink()
    _remove_progress_logs(folder)


def _remove_progress_logs(folder):
    for name in progress_logs(folder):
        (Path(folder) / name).unlink(missing_ok=True)


def write_image(path, jpeg):
    """Write the bytes of one image, making its class folder; UserError where the disk is full or may not be written to.

    An existing image is overwritten in place: an earlier run of the same plan wrote the same bytes.
    """
    try:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        except FileNotFoundError:
            path.parent.mkdir(exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            written = os.write(handle, jpeg)
            if written < len(jpeg):  # the disk is full: the next write says so
                os.write(handle, jpeg[written:])
            os.ftruncate(handle, len(jpeg))
        finally:
            os.close(handle)
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise cli.UserError(f"cannot write {path}: {error.strerror}. Mend that and start again to go on") from error


def clear(folder, plan, video, runs):
    """Remove what an earlier run or a crashed process left in runs of a video's slots."""
    for first, end in runs:
        for slot in range(first, end):
            (Path(folder) / manifest.slot_path(plan, video, slot)).unlink(missing_ok=True)


def summary(plan):
    """The size of a plan, in words."""
    videos, slots = plan["videos"], plan["slots"]
    missing = sum(end - first for video in videos for first, end in video["missing"])
    hours, frames = sum(_hours(video, video["frames"]) for video in videos), sum(video["frames"] for video in videos)
    return (
        f"{len(videos)} videos, {hours:.2f} hours, {frames} frames; {slots - missing} images in "
        f"{len(manifest.class_names(plan))} classes" + ("" if plan["complete"] else ", not read to the end yet")
    )
