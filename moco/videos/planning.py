"""The plan of a frame folder: which files to read, and which frames of each of them."""

import os
import re
import stat
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from moco import cli, files
from moco.data import manifest, recordings
from moco.videos import pool
from moco.videos.probe import probe
from moco.videos.video import reason_to_leave_out

OWN = (manifest.NAME, manifest.TIMES, recordings.FRAMES_TABLE, recordings.VIDEOS_TABLE)  # files in a frame folder
# Names of pictures, sound, tables, texts and annotations, which are no videos and are not tried.
NOT_VIDEOS = "thm jpg jpeg png bmp tif tiff heic wav mp3 m4a aac flac srt vtt ass txt md log csv tsv json jsonl xml xmp"
NOT_VIDEOS += " html pdf doc docx xls xlsx rtf gpx ini zip tar gz eaf textgrid cha opf its aae dng gpr db lnk url"
NOT_VIDEOS = f"{NOT_VIDEOS} bdm bup cpi ifo moi mpl tdt tid tmb".split()
# Copies of low resolution, which cameras write beside their recordings; GoPro's GL010001 is that of GX010001.
COPIES = re.compile(r".*\.(lrv|lrf)|.*(?<![a-z0-9])gl\d{6}(?!\d).*")
MOMENTS = "moments"  # the class of moments without one
MAX_DEVIATION = 0.005  # of the rate of images from --fps: a second and a half in an episode of 288


def list_videos(folders, recursive, save_dir):
    """The files in folders that can be read as videos, and those that are left out: entries of a plan.

    The first have folder (its number), name and bytes, the others folder, name and reason. Names are relative to their
    folder, with forward slashes, one folder after another, each in the order of recordings.sort_key. recursive: also
    those in sub-folders. Hidden files, what this program writes to save_dir, and files that only accompany videos are
    ignored. Only regular files are read, also through links: no pipe, no device.
    """
    readable, left_out = [], []
    save_dir = os.path.realpath(save_dir)
    for number, folder in enumerate(folders):
        root = os.path.realpath(folder)
        if os.path.isfile(root):
            raise cli.UserError(f"{folder} is a file; give the folder that it is in, and --select to read it alone")
        if recursive and root == save_dir:
            raise cli.UserError(f"--recursive would read the images in {folder} as videos; give another --save-dir")
        names = without_companions(_names(root, "", recursive, save_dir, {root}))
        for name in sorted(names, key=recordings.sort_key):
            entry = {"folder": number, "name": name, **_check(root, name)}
            (left_out if "reason" in entry else readable).append(entry)
    return readable, left_out


def _names(root, below, recursive, save_dir, parents):
    """The names of the files below a folder; parents: the real paths of the folders on the way, against circles."""
    try:
        entries = os.scandir(os.path.join(root, below))
    except OSError as error:
        raise cli.UserError(f"cannot list the folder {os.path.join(root, below)}: {error.strerror}") from error
    with entries:
        for entry in entries:
            if entry.name.startswith(".") or (root == save_dir and entry.name in OWN):
                continue
            if not os.path.isdir(entry.path):
                yield f"{below}{entry.name}"
            elif recursive and (folder := os.path.realpath(entry.path)) not in {save_dir, *parents}:
                yield from _names(root, f"{below}{entry.name}/", recursive, save_dir, {*parents, folder})


def without_companions(names):
    """The names of files that may be videos, without copies of videos that are there, too."""
    split = {name: name.lower().rpartition(".") for name in names}
    videos = {name for name, (_, _, kind) in split.items() if kind not in NOT_VIDEOS}
    copies = {name for name in videos if COPIES.fullmatch(name.lower())}
    stems = {name: re.sub(r"(?<![a-z0-9])g[hlsx](?=\d{6}(?!\d))", "g", split[name][0]) for name in videos}
    there = {stems[name] for name in videos - copies}
    return [name for name in videos if name not in copies or stems[name] not in there]


def _check(root, name):
    """The size of a file, or the reason why it is not read, for its entry in the plan."""
    path = os.path.join(root, name)
    try:
        os.fsencode(name).decode("utf-8")
        state = files.retry_transient(path, partial(os.stat, path))
    except UnicodeDecodeError:
        return {"reason": "its name is not UTF-8"}
    except OSError as error:
        return {"reason": f"it cannot be accessed: {error.strerror}"}
    if not stat.S_ISREG(state.st_mode):
        return {"reason": "it is not a regular file"}
    return {"bytes": state.st_size} if state.st_size else {"reason": "it is empty"}


def read_moments(path):
    """{file: {class: seconds}} of a CSV file with columns 'file' and 'seconds', and perhaps 'class'.

    file: a video's name, or its path relative to the folder of videos. UserError, which names the line, for a table
    that cannot be read so.
    """
    table = {}
    for number, row in files.read_table(path, "file", "seconds", numbers=["seconds"]):
        second = row["seconds"]
        if second is None or second < 0:
            raise cli.UserError(f"--moments {path}, line {number}: the moment needs a number of seconds from 0 on")
        name = row.get("class") or MOMENTS
        if "/" in name or "\0" in name or name.startswith(".") or name == manifest.NAME:
            raise cli.UserError(f"--moments {path}, line {number}: {name} cannot be the name of a class folder")
        table.setdefault(row["file"], {}).setdefault(name, []).append(second)
    return table


def choose(videos, table, selection, moments):
    """The readable files of list_videos that are selected by name, with what is known of their recordings.

    table: {file: Recording} that recordings.read_table returned. selection: a recordings.Selection, None for all.
    moments: the result of read_moments, None for regular sampling; those of a video are added to its entry. UserError
    if nothing is selected, or if a file of moments is no video.
    """
    known = [recordings.lookup(table, video["name"]) for video in videos]
    videos = [video | recording.known() for video, recording in zip(videos, known, strict=True)]
    if selection:
        names = [(video["name"], recording, 0.0) for video, recording in zip(videos, known, strict=True)]
        chosen = replace(selection, hours=None).choose(names)
        print(f"{len(chosen)} of {len(videos)} files are selected by name, child and age")
        videos = [videos[i] for i in chosen]
    return _with_moments(videos, moments) if moments else videos


def _with_moments(videos, moments):
    """The videos that have moments, with {class: seconds}; UserError for a file of moments that is none of them."""
    by_any_name = {}
    for video in videos:
        for name in recordings.names_of(video["name"]):
            by_any_name.setdefault(name, []).append(video)
    for file, classes in moments.items():
        if file not in by_any_name:
            raise cli.UserError(f"--moments names {file}, which is not there")
        for video in by_any_name[file]:
            for label, seconds in classes.items():
                video.setdefault("moments", {}).setdefault(label, []).extend(seconds)
    return [video for video in videos if "moments" in video]


def make_plan(settings, roots, videos, left_out, workers, selection):
    """The plan for some videos, with times, an array for times.npy, and selections, the FrameSelection of each video.

    settings: flags by name. roots: folders of videos. videos: the result of choose; left_out: entries of list_videos.
    workers: a pool.WorkerPool. selection: a recordings.Selection or None. UserError that names each file if none of
    them can be read.
    """
    left_out, planned, results = list(left_out), [], {}
    tasks = [(os.path.join(roots[video["folder"]], video["name"]), video.pop("moments", None)) for video in videos]
    with cli.Progress(len(tasks), "plan", "videos") as progress:
        for index, result in workers.as_completed(partial(repeated, plan_video, settings), tasks):
            results[index] = ([], [result]) if isinstance(result, pool.WorkerCrash) else result
            progress.update()
    for index, video in enumerate(videos):
        entries, reasons = results[index]
        planned += [video | entry for entry in entries]
        left_out += [{"folder": video["folder"], "name": video["name"], "reason": reason} for reason in reasons]
    if selection:
        _cut(planned, selection)
    plan = manifest.make(settings, roots, planned, left_out)
    times, plan["selections"] = [np.empty((0, 2))], [video.pop("selection") for video in plan["videos"]]
    for video in plan["videos"]:
        if "times" in video:
            video["times_from"] = sum(map(len, times))
            times.append(video.pop("times"))
    plan["times"] = np.concatenate(times)
    if not plan["slots"] and plan["videos"]:
        raise cli.UserError("--drop-last leaves nothing: the videos are shorter than one episode of --seg-len seconds")
    if not plan["slots"]:
        raise nothing_readable(plan)
    _print_rates(plan["videos"], settings)
    return plan


def _print_rates(videos, settings):
    """Print which rates of images differ from --fps; videos: entries of a plan."""
    fps = settings["fps"]
    if slow := sum(video["rate"] < 0.99 * fps for video in videos):
        print(f"{slow} of {len(videos)} videos have fewer than {fps:g} frames per second: all are used")
    rates = [video["rate"] / video["step"] for video in videos if video["step"] and settings["published-step"]]
    if rates and max(abs(rate - fps) for rate in rates) > MAX_DEVIATION * fps:
        shown = " to ".join(dict.fromkeys(f"{rate:.3g}" for rate in (min(rates), max(rates))))
        print(f"--published-step gives {shown} images per second, not {fps:g}")


def repeated(function, *arguments):
    """The result of a function for a video, repeated while its disk fails; the last two arguments: task and report."""
    path = arguments[-2][0]
    return files.retry_transient(path, partial(function, *arguments))


def _cut(videos, selection):
    """Reduce the slots of videos, entries of a plan, to the hours of a recordings.Selection; print what it is."""
    known = [(video["name"], recordings.from_entry(video), video["frames"] / video["rate"]) for video in videos]
    seconds = recordings.Selection(hours=selection.hours, seed=selection.seed).choose(known)
    for i, video in enumerate(videos):
        video["slots"] = round(video["slots"] * seconds.get(i, 0) / known[i][2])
    print(f"selected: {recordings.describe(known, seconds)}")


def nothing_readable(plan):
    """The UserError for a plan without images."""
    folders = ", ".join(plan["folders"])
    reasons = "; ".join(f"{files.printable(name)}: {reason}" for name, reason in manifest.left_out(plan))
    if reasons:
        return cli.UserError(f"no video could be read in {folders} ({reasons}). Give a folder of videos")
    for folder in map(Path, plan["folders"]):
        if (folder / manifest.NAME).exists() or any(folder.glob("*/*.jp*g")):
            return cli.UserError(f"{folder} has images and no videos: it is a folder of frames, for the trainers")
    return cli.UserError(f"there is no video in {folders}. Give a folder of videos, or --recursive for its sub-folders")


# --- one video


def plan_video(settings, task, report=None):
    """What to extract from a video: its entries in the plan, each with its FrameSelection; and what is left out.

    task: (path, None), or with moments, {class: seconds}, each class of which has an entry. What is left out is a list
    of reasons. Raises OSError if the disk fails.
    """
    path, moments = task
    try:
        info = probe(path)
        if moments:
            return _plan_moments(info, moments)
        return [_entry(info, *sampled_frames(info, settings["fps"], settings["published-step"]))], []
    except Exception as error:
        return [], [reason_to_leave_out(path, error)]


def _plan_moments(info, moments):
    entries, left_out = [], []
    length = info.seconds([info.frames - 1])[0] + 1 / info.rate
    for label, seconds in sorted(moments.items()):
        left_out += [f"it ends at {length:.2f} s, before {each:g} s" for each in sorted(seconds) if each > length]
        inside = np.array([each for each in seconds if each <= length])
        if len(inside):
            entries.append(_entry(info, nearest_frames(info, inside)) | {"class": label})
    return entries, left_out


def _entry(info, indices, step=None):
    """The entry of a video in the plan, of which the frames at indices are extracted, step apart or at any.

    times has (frame, second) of each slot, where start, step and rate do not give them within a millisecond or, where
    time stamps are coarse, one and a half ticks.
    """
    entry = {"width": info.width, "height": info.height, "rate": info.rate, "frames": info.frames, "step": step}
    entry |= {"slots": len(indices), "selection": info.select(indices)}
    if info.start:
        entry["start"] = info.start
    seconds = info.seconds(indices)
    if step is None or abs(seconds - info.start - indices / info.rate).max() > max(0.001, 1.5 * info.tick):
        entry["times"] = np.stack([indices, seconds], 1)
    return entry


def frame_step(native, fps, published=False):
    """Number of frames from one sampled frame to the next, for sampling native frames per second at about fps.

    The nearest integer, or as published int(native) // fps + 1.
    """
    return int(int(native) // fps) + 1 if published else max(1, round(native / fps))


def sampled_frames(info, fps, published=False):
    """(indices of the frames to sample from the video of a VideoInfo, (n,) int64 rising; their step or None).

    Every frame_step-th frame of a video of constant rate if this gives fps images per second, or as published; all
    frames of a slower one; of any other, the first frame in each 1/fps seconds.
    """
    if info.is_constant_rate():
        step = frame_step(info.header_rate if published else info.rate, fps, published)
        if published or info.rate <= fps or abs(info.rate / step - fps) <= MAX_DEVIATION * fps:
            return np.arange(0, info.frames, step), step
        ticks = np.arange(info.frames) * (fps / info.rate)
    else:
        ticks = (info.times - info.times[0]) * (info.tick * fps)
    return np.flatnonzero(np.diff(np.floor(ticks + 1e-6), prepend=-1)), None


def nearest_frames(info, seconds):
    """Indices of the frames nearest to seconds of the video of a VideoInfo, (n,) int64 rising, each once."""
    times = info.seconds(np.arange(info.frames))
    after = np.searchsorted(times, seconds).clip(1, max(1, info.frames - 1))
    before = after - 1
    after = after.clip(max=info.frames - 1)
    return np.unique(np.where(seconds - times[before] <= times[after] - seconds, before, after))
