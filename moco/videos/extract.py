"""Many videos into one frame folder: make the plan, extract the images, resume, report what was left out."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from moco import cli, files, pool
from moco.data import manifest, packed, recordings
from moco.videos import images, listing, moments, progress_log

LAYOUT = ("settings", "per_class", "class_digits", "image_digits")  # what the images of a video depend on in a plan


@dataclass(frozen=True)
class Scope:
    """Which of the listed videos to read, and what of them.

    table: {file: Recording} that recordings.read_table returned. selection: a recordings.Selection, None for all.
    moments: {file: {class: seconds}} that moments.read_table returned, None for regular sampling.
    """

    table: dict
    selection: recordings.Selection | None = None
    moments: dict | None = None

    def choose(self, listed):
        """The part of the result of listing.list_videos that is selected by name; UserError if nothing is."""
        readable, left_out = listed
        if self.selection:
            known = [(name, recordings.lookup(self.table, name), 0.0) for _, name, _ in readable]
            chosen = replace(self.selection, hours=None).choose(known)
            print(f"{len(chosen)} of {len(readable)} files are selected by name, child and age")
            readable = [readable[i] for i in chosen]
        if self.moments:
            named = moments.by_video(self.moments, [name for _, name, _ in readable])
            readable = [each for each in readable if each[1] in named]
        return readable, left_out

    def cut(self, videos):
        """Reduce the slots of videos, entries of a plan, to the hours of the selection; print what it is."""
        if not self.selection:
            return
        known = [(video["name"], recordings.from_entry(video), video["frames"] / video["rate"]) for video in videos]
        seconds = recordings.Selection(hours=self.selection.hours, seed=self.selection.seed).choose(known)
        for i, video in enumerate(videos):
            video["slots"] = round(video["slots"] * seconds.get(i, 0) / known[i][2])
        print(f"selected: {recordings.describe(known, seconds)}")


def make_plan(roots, settings, listed, workers, scope):
    """(the plan for the listed files, {(folder number, name, class): FrameSelection} of its entries).

    roots: folders of videos. settings: flags by name. listed: the result of scope.choose. workers: a pool.WorkerPool.
    UserError that names each file if none of them can be read.
    """
    readable, refused = listed
    left_out = [{"folder": number, "name": name, "reason": reason} for number, name, reason in refused]
    videos, selections = [], {}
    with cli.Progress(len(readable), "plan", "videos") as progress:
        for (root, name, size), planned, reasons in _plan_videos(roots, settings, readable, workers, scope.moments):
            known = recordings.lookup(scope.table, name).known()
            left_out += [{"folder": root, "name": name, "reason": reason} for reason in reasons]
            for entry, selection in planned:
                videos.append({"folder": root, "name": name, "bytes": size, **entry, **known})
                selections[root, name, entry.get("class")] = selection
            progress.update()
    scope.cut(videos)
    plan = manifest.make(settings, roots, videos, left_out)
    plan["times"] = _take_times(plan["videos"])
    if not plan["slots"] and plan["videos"]:
        raise cli.UserError("--drop-last leaves nothing: the videos are shorter than one episode of --seg-len seconds")
    if not plan["slots"]:
        raise _nothing_readable(plan)
    slow = sum(video["rate"] < 0.99 * settings["fps"] for video in plan["videos"])
    if slow:
        print(f"{slow} of {len(videos)} videos have fewer than {settings['fps']:g} frames per second: all are used")
    return plan, selections


def _plan_videos(roots, settings, readable, workers, moments_by_file):
    """Yield (file, [(entry, FrameSelection)], reasons why something is left out) for each of the readable files."""
    paths = [os.path.join(roots[number], name) for number, name, _ in readable]
    if moments_by_file:
        named = moments.by_video(moments_by_file, [name for _, name, _ in readable])
        tasks = [(path, named[name]) for path, (_, name, _) in zip(paths, readable, strict=True)]
        results = workers.map(images.plan_moments, tasks)
    else:
        results = workers.map(partial(images.plan_video, settings), paths)
    for file, result in zip(readable, results, strict=True):
        if isinstance(result, pool.WorkerCrash):
            yield file, [], [str(result)]
        elif moments_by_file:
            yield file, *result
        else:
            entry, selection = result
            yield (file, [], [entry]) if selection is None else (file, [(entry, selection)], [])


def _take_times(videos):
    """Move the times of videos out of their entries into one array (n, 2), and leave their offsets in it."""
    arrays, offset = [np.empty((0, 2))], 0
    for video in videos:
        if "times" in video:
            arrays.append(video.pop("times"))
            video["times_from"] = offset
            offset += len(arrays[-1])
    return np.concatenate(arrays)


def matching_plan(folder, settings, listed):
    """The plan of a frame folder, or None; UserError if it is for other videos or settings.

    A file whose size has changed since is no error here: its slots are known, and it will be left out.
    """
    plan = manifest.read(folder)
    if plan is None:
        return None
    earlier = plan["settings"]
    differences = [
        f"--{flag} was {earlier.get(flag)}, not {settings.get(flag)}"
        for flag in {**settings, **earlier}
        if settings.get(flag) != earlier.get(flag)
    ]
    videos, done = plan["videos"], progress_log.completed_videos(folder)
    planned = {(each["folder"], each["name"]) for each in videos + plan["left_out"]}
    present = {(root, name) for part in listed for root, name, _ in part}
    needed = {(each["folder"], each["name"]) for n, each in enumerate(videos) if n not in done}
    differences += [f"{listing.printable(name)} was not there" for _, name in sorted(present - planned)[:5]]
    if not plan["complete"]:
        differences += [f"{listing.printable(name)} was there" for _, name in sorted(needed - present)[:5]]
    if differences:
        path = Path(folder) / manifest.NAME
        raise cli.UserError(f"{path} is of another run: {'; '.join(differences)}. Give another --save-dir")
    return plan


def write_plan(folder, plan):
    """Write a new plan to a frame folder and return it; UserError if classes of unknown origin exist there."""
    present = {path.name for path in Path(folder).iterdir()}
    outputs = manifest.video_tars(plan["videos"]) if plan["settings"].get("pack") else manifest.class_names(plan)
    for name in [*outputs, *progress_log.names(folder)]:
        if name in present and not (Path(folder) / manifest.NAME).exists():  # another shard may have written it by now
            raise cli.UserError(f"{folder} has a {name} already, but no {manifest.NAME}. Give another --save-dir")
    times = plan.pop("times")
    if len(times):
        with files.atomic_write(Path(folder) / manifest.TIMES) as part, open(part, "wb") as file:
            np.save(file, times)
    manifest.write(folder, plan)
    return plan


def read_videos(folder, plan, roots, selections, workers, shard):
    """Extract the images of a part of the plan's videos that are not done yet, and return the plan.

    selections: {(folder number, name, class): FrameSelection} of the entries whose selection is known. workers: a
    pool.WorkerPool. shard: (part, number of parts). UserError if the disk is full or memory is too small.
    """
    if plan["complete"]:
        progress_log.remove(folder)  # another process may have written to one after the plan was complete
        return plan
    videos, done = plan["videos"], progress_log.completed_videos(folder)
    part, parts = shard
    longest_first = sorted(range(len(videos)), key=lambda number: -videos[number]["frames"])  # so that all end together
    numbers = [number for number in longest_first[part::parts] if number not in done]
    if plan["settings"].get("pack"):
        videos = [{**video, "tar": tar} for video, tar in zip(videos, manifest.video_tars(videos), strict=True)]
    tasks = [
        (
            os.path.join(roots[video["folder"]], video["name"]),
            video,
            selections.get((video["folder"], video["name"], video.get("class") if "moment_frames" in video else None)),
        )
        for video in (videos[number] for number in numbers)
    ]
    files.remove_temporary_files(folder, idle=600)  # those of other shards are younger
    try:
        out_of_memory = _extract(folder, plan, numbers, tasks, workers)
    finally:
        files.remove_temporary_files(folder, idle=600)
    if out_of_memory:
        names = ", ".join(listing.printable(videos[number]["name"]) for number in out_of_memory)
        raise cli.UserError(f"out of memory while reading {names}; retry with fewer --workers to resume")
    return _finish(folder, plan)


def _extract(folder, plan, numbers, tasks, workers):
    """Extract the images of videos and record them as done; returns the numbers of those that need more memory."""
    layout = {key: plan[key] for key in LAYOUT}
    hours, hours_done, start = sum(_hours(video, video["frames"]) for _, video, _ in tasks), 0.0, time.monotonic()
    frames, records, out_of_memory = sum(video["frames"] for _, video, _ in tasks), [], []
    # Flushing images to disk takes time: a thread does it while the next videos are read.
    with cli.Progress(frames, "read", "frames") as progress, ThreadPoolExecutor(1) as disk:

        def advance(task, amount):
            nonlocal hours_done
            hours_done += _hours(tasks[task][1], amount)
            left, pace = max(0, hours - hours_done), hours_done / (time.monotonic() - start) * 3600
            postfix = f"{hours_done:.2f} h of video done, {left:.2f} h left, {pace:.0f} h per hour"
            progress.set_postfix_str(postfix, refresh=False)
            progress.update(amount)

        for task, result in workers.as_completed(partial(images.extract_images, folder, layout), tasks, advance):
            video = tasks[task][1]
            if isinstance(result, pool.WorkerCrash):
                result = [[video["first_slot"], video["first_slot"] + video["slots"]]], str(result)
                images.remove_images(folder, plan, video, result[0])
            if result[0] is None:
                out_of_memory.append(numbers[task])
            else:
                records.append(disk.submit(progress_log.mark_done, folder, plan, numbers[task], *result))
    for record in records:
        record.result()  # raises what went wrong with it
    return out_of_memory


def _hours(video, frames):
    return frames / video["rate"] / 3600


def _finish(folder, plan):
    """The plan with the results in the progress logs; where every video is done, it is written as complete."""
    lines = progress_log.completed_videos(folder)
    if len(lines) < len(plan["videos"]):
        current = manifest.read(folder)
        if current["complete"]:  # another process has just completed it and removed the progress logs
            progress_log.remove(folder)
            return current
        return _with_results(plan, lines)
    plan = _with_results(plan, lines)
    complete = manifest.Manifest(plan, folder)
    for name in set(manifest.class_names(plan)) - set(complete.classes):
        if (Path(folder) / name).is_dir():
            (Path(folder) / name).rmdir()  # ImageFolder raises for an empty class
    if not len(complete):
        (Path(folder) / manifest.NAME).unlink()
        progress_log.remove(folder)
        raise _nothing_readable(plan)
    if plan["settings"].get("pack"):
        packed.load(Path(folder), complete)  # makes the index
    plan["complete"] = True
    recordings.write_videos_table(complete)
    manifest.write(folder, plan)
    progress_log.remove(folder)
    return plan


def _with_results(plan, lines):
    """The plan with the lines of the progress logs, {number of a video: its line}, in the entries of its videos."""
    for number, line in lines.items():
        plan["videos"][number]["missing"] = line["missing"]
        if line["reason"]:
            plan["videos"][number]["reason"] = line["reason"]
    return plan


def _nothing_readable(plan):
    folders = ", ".join(plan["folders"])
    reasons = "; ".join(f"{listing.printable(name)}: {reason}" for name, reason in manifest.left_out(plan))
    if reasons:
        return cli.UserError(f"no video could be read in {folders} ({reasons}). Give a folder of videos")
    return cli.UserError(f"there is no video in {folders}. Give a folder of videos, or --recursive for its sub-folders")


def print_summary(plan, with_size=False):
    """Print the numbers of videos, images and classes of a plan, the expected size if asked, and what was left out."""
    videos, in_folder = plan["videos"], manifest.Manifest(plan)
    videos = [video for video in videos if video["slots"]]
    hours = sum(manifest.seconds(plan, video) for video in videos) / 3600
    frames = sum(video["frames"] for video in videos)
    n_classes = len(in_folder.classes)
    print(
        f"{len(videos)} videos, {hours:.2f} hours, {frames} frames; {len(in_folder)} images in {n_classes} "
        + ("class" if n_classes == 1 else "classes")
        + ("" if plan["complete"] else ", not complete yet")
    )
    if with_size:
        print(f"expected size: {plan['slots'] * images.mean_size(plan) / 1e9:.3g} GB")
    for name, reason in manifest.left_out(plan):
        print(f"left out: {listing.printable(name)}: {reason}")
