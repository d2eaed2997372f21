"""Many videos into one frame folder: list them, make the plan, extract the images, resume, report what was left out."""

import json
import os
import re
import stat
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from moco import cli, files
from moco.data import manifest, recordings, tars
from moco.videos import images, pool

OWN = (manifest.NAME, manifest.TIMES, recordings.FRAMES_TABLE, recordings.VIDEOS_TABLE)  # files in a frame folder
# Names of pictures, sound, tables, texts and annotations, which are no videos and are not tried.
NOT_VIDEOS = "thm jpg jpeg png bmp tif tiff heic wav mp3 m4a aac flac srt vtt ass txt md log csv tsv json jsonl xml xmp"
NOT_VIDEOS = f"{NOT_VIDEOS} html pdf doc docx xls xlsx rtf gpx ini zip tar gz eaf textgrid cha opf its".split()
COPIES = ("lrv", "lrf")  # of low resolution, which cameras write beside their recordings
MOMENTS = "moments"  # the class of moments without one
LAYOUT = ("settings", "per_class", "class_digits", "image_digits")  # what the images of a video depend on in a plan


def list_videos(folders, recursive, save_dir):
    """The files in folders that can be read as videos, and those that are left out.

    Returns [(folder number, name, size in bytes)] and [(folder number, name, reason)]. Names are relative to their
    folder, with forward slashes, one folder after another, each in the order of recordings.sort_key. recursive: also
    those in sub-folders. Hidden files, what this program writes to save_dir, and files that only accompany videos are
    ignored. Only regular files are read, also through links: no pipe, no device.
    """
    readable, left_out = [], []
    save_dir = os.path.realpath(save_dir)
    for number, folder in enumerate(folders):
        root = os.path.realpath(folder)
        if recursive and root == save_dir:
            raise cli.UserError(f"--recursive would read the images in {folder} as videos; give another --save-dir")
        names = _without_companions(_names(root, "", recursive, save_dir, {root}))
        for name in sorted(names, key=recordings.sort_key):
            reason, size = _check(root, name)
            if reason:
                left_out.append((number, name, reason))
            else:
                readable.append((number, name, size))
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


def _without_companions(names):
    """The names of files that may be videos, without copies of videos that are there, too."""
    split = {name: name.lower().rpartition(".") for name in names}
    videos = {name for name, (_, _, kind) in split.items() if kind not in NOT_VIDEOS}
    copies = {name for name in videos if split[name][2] in COPIES}
    # GoPro's GL010001.LRV is the copy of GX010001.MP4, or of GH010001.MP4.
    stems = {name: re.sub(r"(?<![a-z0-9])g[hlx](?=\d{6}(?!\d))", "g", split[name][0]) for name in videos}
    there = {stems[name] for name in videos - copies}
    return [name for name in videos if name not in copies or stems[name] not in there]


def _check(root, name):
    """(the reason why a file is not read or None, its size)."""
    path = os.path.join(root, name)
    try:
        os.fsencode(name).decode("utf-8")
        state = files.retry_transient(path, partial(os.stat, path))
    except UnicodeDecodeError:
        return "its name is not UTF-8", 0
    except OSError as error:
        return f"it cannot be accessed: {error.strerror}", 0
    if not stat.S_ISREG(state.st_mode):
        return "it is not a regular file", 0
    if not state.st_size:
        return "it is empty", 0
    return None, state.st_size


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


def choose(listed, table, selection, moments):
    """The part of the result of list_videos that is selected by name, and its moments as {name: {class: seconds}}.

    table: {file: Recording} that recordings.read_table returned. selection: a recordings.Selection, None for all.
    moments: the result of read_moments, None for regular sampling. UserError if nothing is selected.
    """
    readable, left_out = listed
    if selection:
        known = [(name, recordings.lookup(table, name), 0.0) for _, name, _ in readable]
        chosen = replace(selection, hours=None).choose(known)
        print(f"{len(chosen)} of {len(readable)} files are selected by name, child and age")
        readable = [readable[i] for i in chosen]
    if moments:
        moments = _by_video(moments, [name for _, name, _ in readable])
        readable = [each for each in readable if each[1] in moments]
    return (readable, left_out), moments


def _by_video(moments, names):
    """{name of a video: {class: seconds}} of the videos called names; UserError for a file that is none of them."""
    by_any_name, found = {}, {}
    for name in names:
        for given in recordings.names_of(name):
            by_any_name.setdefault(given, []).append(name)
    for given, classes in moments.items():
        if given not in by_any_name:
            raise cli.UserError(f"--moments names {given}, which is not there")
        for name in by_any_name[given]:
            for label, seconds in classes.items():
                found.setdefault(name, {}).setdefault(label, []).extend(seconds)
    return found


def make_plan(settings, roots, listed, workers, table, selection, moments):
    """(the plan for the listed files, {key of an entry of its videos: FrameSelection}); see _key.

    settings: flags by name. roots: folders of videos. listed, moments: what choose returned; table, selection: what it
    was given. workers: a pool.WorkerPool. UserError that names each file if none of them can be read.
    """
    readable, refused = listed
    left_out = [{"folder": number, "name": name, "reason": reason} for number, name, reason in refused]
    tasks = [(os.path.join(roots[number], name), moments and moments[name]) for number, name, _ in readable]
    results, videos, selections = {}, [], {}
    with cli.Progress(len(tasks), "plan", "videos") as progress:
        for index, result in workers.as_completed(partial(_repeated, images.plan_video, settings), tasks):
            results[index] = ([], [result]) if isinstance(result, pool.WorkerCrash) else result
            progress.update()
    for index, (number, name, size) in enumerate(readable):
        planned, reasons = results[index]
        left_out += [{"folder": number, "name": name, "reason": reason} for reason in reasons]
        for entry, frames in planned:
            known = recordings.lookup(table, name).known()
            videos.append({"folder": number, "name": name, "bytes": size, **entry, **known})
            selections[_key(videos[-1])] = frames
    if selection:
        _cut(videos, selection)
    plan = manifest.make(settings, roots, videos, left_out)
    times = [np.empty((0, 2))]
    for video in plan["videos"]:
        if "times" in video:
            video["times_from"] = sum(map(len, times))
            times.append(video.pop("times"))
    plan["times"] = np.concatenate(times)
    if not plan["slots"] and plan["videos"]:
        raise cli.UserError("--drop-last leaves nothing: the videos are shorter than one episode of --seg-len seconds")
    if not plan["slots"]:
        raise _nothing_readable(plan)
    slow = sum(video["rate"] < 0.99 * settings["fps"] for video in plan["videos"])
    if slow:
        print(f"{slow} of {len(videos)} videos have fewer than {settings['fps']:g} frames per second: all are used")
    return plan, selections


def _key(video):
    """What tells the entries of a plan apart; with moments, a video has one for each class."""
    return video["folder"], video["name"], video["class"] if "moment_frames" in video else None


def _cut(videos, selection):
    """Reduce the slots of videos, entries of a plan, to the hours of a recordings.Selection; print what it is."""
    known = [(video["name"], recordings.from_entry(video), video["frames"] / video["rate"]) for video in videos]
    seconds = recordings.Selection(hours=selection.hours, seed=selection.seed).choose(known)
    for i, video in enumerate(videos):
        video["slots"] = round(video["slots"] * seconds.get(i, 0) / known[i][2])
    print(f"selected: {recordings.describe(known, seconds)}")


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
    planned = {(each["folder"], each["name"]) for each in plan["videos"] + plan["left_out"]}
    present = {(number, name) for part in listed for number, name, _ in part}
    differences += [f"{files.printable(name)} was not there" for _, name in sorted(present - planned)[:5]]
    if not plan["complete"]:
        done = completed_videos(folder)
        needed = {(each["folder"], each["name"]) for n, each in enumerate(plan["videos"]) if n not in done}
        listed_now = _without_companions({name for _, name in planned})  # an earlier version planned copies, too
        gone = [name for _, name in sorted(needed - present) if name in listed_now]
        differences += [f"{files.printable(name)} was there" for name in gone[:5]]
    if differences:
        path = Path(folder) / manifest.NAME
        raise cli.UserError(f"{path} is of another run: {'; '.join(differences)}. Give another --save-dir")
    return plan


def write_plan(folder, plan):
    """Write a new plan to a frame folder and return it; UserError if classes of unknown origin exist there."""
    present = {path.name for path in Path(folder).iterdir()}
    outputs = manifest.video_tars(plan["videos"]) if plan["settings"].get("pack") else manifest.class_names(plan)
    for name in [*outputs, *(path.name for path in _done_files(folder))]:
        if name in present and not (Path(folder) / manifest.NAME).exists():  # another shard may have written it by now
            raise cli.UserError(f"{folder} has a {name} already, but no {manifest.NAME}. Give another --save-dir")
    times = plan.pop("times")
    if len(times):
        with files.atomic_write(Path(folder) / manifest.TIMES) as part, open(part, "wb") as file:
            np.save(file, times)
    manifest.write(folder, plan)
    return plan


def read_videos(folder, plan, roots, selections, workers, shard=(0, 1)):
    """Extract the images of a part of the plan's videos that are not done yet, and return the plan.

    selections: of make_plan; may lack any. workers: a pool.WorkerPool. shard: (part, number of parts). UserError if the
    disk is full.
    """
    if plan["complete"]:
        _remove_done_files(folder)  # another process may have written one after the plan was complete
        return plan
    videos, done = plan["videos"], completed_videos(folder)
    longest_first = sorted(range(len(videos)), key=lambda number: -videos[number]["frames"])  # so that all end together
    numbers = [number for number in longest_first[shard[0] :: shard[1]] if number not in done]
    tars = manifest.video_tars(videos) if plan["settings"].get("pack") else []
    tasks = []
    for number in numbers:
        video = videos[number] | ({"tar": tars[number]} if tars else {})
        tasks.append((os.path.join(roots[video["folder"]], video["name"]), video, selections.get(_key(video))))
    files.remove_temporary_files(folder, idle=600)  # those of other shards are younger
    _extract(folder, plan, numbers, tasks, workers)
    return _finish(folder, plan)


def _extract(folder, plan, numbers, tasks, workers):
    """Extract the images of videos and mark them as done."""
    frames, rates = (np.array([video[key] for _, video, _ in tasks]) for key in ("frames", "rate"))
    frames_done, start = np.zeros(len(tasks), int), time.monotonic()
    with cli.Progress(int(frames.sum()), "read", "frames") as progress:

        def advance(task, count):
            amount = count - int(frames_done[task])
            frames_done[task] = count
            hours, left = ((each / rates).sum() / 3600 for each in (frames_done, frames - frames_done))
            pace = hours / (time.monotonic() - start) * 3600
            postfix = f"{hours:.2f} h of video done, {left:.2f} h left, {pace:.0f} h per hour"
            progress.set_postfix_str(postfix, refresh=False)
            progress.update(amount)

        extract = partial(_repeated, images.extract_images, folder, {key: plan[key] for key in LAYOUT})
        for task, result in workers.as_completed(extract, tasks, advance):
            _, video, _ = tasks[task]
            if isinstance(result, pool.WorkerCrash):
                result = [[video["first_slot"], video["first_slot"] + video["slots"]]], str(result)
                images.remove_images(folder, plan, video, result[0])
            mark_done(folder, numbers[task], *result)
            advance(task, video["frames"])


def _repeated(function, *arguments):
    """The result of a function of images.py for a video, repeated while its disk fails."""
    path = arguments[-2][0]  # the task comes before the report
    return files.retry_transient(path, partial(function, *arguments))


def mark_done(folder, number, missing, reason):
    """Record in a file of its own that a video of the plan is done, except for the missing runs of slots.

    So several machines can share the work on a network disk. reason: why slots are missing, or None.
    """
    record = json.dumps({"video": number, "missing": missing, "reason": reason})
    # The line break comes first, because a killed process may have written half a line.
    files.append(Path(folder) / f".done-{number}.json", f"\n{record}")


def completed_videos(folder):
    """{number of a video: what mark_done recorded} for the videos of the plan that are done."""
    done = {}
    for path in _done_files(folder):
        with suppress(FileNotFoundError):  # another process has just completed the plan
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # half a line
                    record = json.loads(line)
                    done[record["video"]] = record
    return done


def _done_files(folder):
    earlier = (path for path in Path(folder).glob("filled-*.jsonl") if path.is_file())  # with several videos each
    return [*Path(folder).glob(".done-*.json"), *earlier]


def _remove_done_files(folder):
    for path in _done_files(folder):
        path.unlink(missing_ok=True)


def _finish(folder, plan):
    """The plan with the results of its videos; where every video is done, it is written as complete."""
    done = completed_videos(folder)
    if len(done) < len(plan["videos"]):
        current = manifest.read(folder)
        if current["complete"]:  # another process has just completed it
            _remove_done_files(folder)
            return current
        return _with_results(plan, done)
    plan = _with_results(plan, done)
    complete = manifest.Manifest(plan, folder)
    for name in set(manifest.class_names(plan)) - set(complete.classes):
        if (Path(folder) / name).is_dir():
            (Path(folder) / name).rmdir()  # ImageFolder raises for an empty class
    if not len(complete):
        (Path(folder) / manifest.NAME).unlink()
        _remove_done_files(folder)
        raise _nothing_readable(plan)
    if plan["settings"].get("pack"):
        tars.Tars(Path(folder), complete)  # makes the index
    plan["complete"] = True
    recordings.write_videos_table(complete)
    manifest.write(folder, plan)
    _remove_done_files(folder)
    for path in [*Path(folder).glob(".image.*.moco-tmp"), *Path(folder).glob(".*.moco-tmp.tar")]:
        path.unlink(missing_ok=True)  # of a killed process; another shard may be writing the manifest
    return plan


def _with_results(plan, done):
    """The plan with the result of completed_videos in the entries of its videos."""
    for number, record in done.items():
        plan["videos"][number]["missing"] = record["missing"]
        if record["reason"]:
            plan["videos"][number]["reason"] = record["reason"]
    return plan


def _nothing_readable(plan):
    folders = ", ".join(plan["folders"])
    reasons = "; ".join(f"{files.printable(name)}: {reason}" for name, reason in manifest.left_out(plan))
    if reasons:
        return cli.UserError(f"no video could be read in {folders} ({reasons}). Give a folder of videos")
    return cli.UserError(f"there is no video in {folders}. Give a folder of videos, or --recursive for its sub-folders")


def print_summary(plan, with_size=False):
    """Print the numbers of videos, images and classes of a plan, the expected size if asked, and what was left out."""
    in_folder = manifest.Manifest(plan)
    videos = [video for video in plan["videos"] if video["slots"]]
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
        print(f"left out: {files.printable(name)}: {reason}")
