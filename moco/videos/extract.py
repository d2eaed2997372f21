"""A plan becomes a frame folder: resume, extract the images of each video, report what was left out."""

import json
import os
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from moco import cli, files
from moco.data import manifest, recordings, tars
from moco.videos import pool
from moco.videos.planning import nothing_readable, repeated, without_companions
from moco.videos.probe import probe
from moco.videos.video import FrameSelection, UnreadableVideo, check_disk, frames, reason_to_leave_out

LAYOUT = ("settings", "per_class", "class_digits", "image_digits")  # what the images of a video depend on in a plan
SINGULAR = {"videos": "video", "frames": "frame", "images": "image", "classes": "class"}


def matching_plan(folder, settings, listed):
    """The plan of a frame folder, or None; UserError if it is for other videos or settings.

    listed: entries of planning.list_videos. A file whose size has changed since is no error here: its slots are known,
    and it will be left out.
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
    planned, present = (
        {(each["folder"], each["name"]) for each in entries} for entries in (plan["videos"] + plan["left_out"], listed)
    )
    differences += [f"{files.printable(name)} was not there" for _, name in sorted(present - planned)[:5]]
    if not plan["complete"]:
        done = completed_videos(folder)
        needed = {(each["folder"], each["name"]) for n, each in enumerate(plan["videos"]) if n not in done}
        listed_now = without_companions({name for _, name in planned})  # an earlier version planned copies, too
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
    times, selections = plan.pop("times"), plan.pop("selections")
    if len(times):
        with files.atomic_write(Path(folder) / manifest.TIMES) as part, open(part, "wb") as file:
            np.save(file, times)
    manifest.write(folder, plan)
    return plan | {"selections": selections}


def read_videos(folder, plan, roots, workers, shard=(0, 1)):
    """Extract the images of a part of the plan's videos that are not done yet, and return the plan.

    workers: a pool.WorkerPool. shard: (part, number of parts). UserError if the disk is full.
    """
    selections = plan.pop("selections", [None] * len(plan["videos"]))
    if plan["complete"]:
        _remove_done_files(folder)  # another process may have written one after the plan was complete
        print(f"nothing to do: {folder} is complete")
        return plan
    videos, done = plan["videos"], completed_videos(folder)
    longest_first = sorted(range(len(videos)), key=lambda number: -videos[number]["frames"])  # so that all end together
    numbers = [number for number in longest_first[shard[0] :: shard[1]] if number not in done]
    if not numbers:
        print("nothing to do: all videos of this part are done")
    tars = manifest.video_tars(videos) if plan["settings"].get("pack") else []
    tasks, planned = [], manifest.Manifest(plan, folder)
    for number in numbers:
        video = videos[number] | ({"tar": tars[number]} if tars else {})
        selection = selections[number] or planned.frames(number)
        tasks.append((os.path.join(roots[video["folder"]], video["name"]), video, selection))
    files.remove_temporary_files(folder, idle=600)  # those of other shards are younger
    try:
        _extract(folder, plan, numbers, tasks, workers)
    except KeyboardInterrupt as error:
        done = f"{len(completed_videos(folder))} of {len(videos)} videos are done and kept"
        raise KeyboardInterrupt(f"{done}; re-run the command to resume") from error
    return _finish(folder, plan)


def _extract(folder, plan, numbers, tasks, workers):
    """Extract the images of videos and mark them as done."""
    frames, rates = (np.array([video[key] for _, video, _ in tasks]) for key in ("frames", "rate"))
    frames_done, start = np.zeros(len(tasks), int), time.monotonic()
    with cli.Progress(int(frames.sum()), "read", "frames") as progress:

        def advance(task, count):
            amount = count - int(frames_done[task])
            frames_done[task] = count
            seconds, total = (float((each / rates).sum()) for each in (frames_done, frames))
            progress.set_postfix_str(pace(seconds, total, time.monotonic() - start), refresh=False)
            progress.update(amount)

        extract = partial(repeated, extract_images, folder, {key: plan[key] for key in LAYOUT})
        for task, result in workers.as_completed(extract, tasks, advance):
            _, video, _ = tasks[task]
            if isinstance(result, pool.WorkerCrash):
                result = [[video["first_slot"], video["first_slot"] + video["slots"]]], str(result)
                remove_images(folder, plan, video, result[0])
            mark_done(folder, numbers[task], *result)
            advance(task, video["frames"])


def pace(seconds, total, elapsed):
    """How much of the video is done, and how many times as fast as it plays, short enough for 80 columns."""
    unit, length = ("h", 3600) if total >= 3600 else ("min", 60)
    return f"{seconds / length:.1f} of {total / length:.1f} {unit}, {seconds / elapsed:.0f}x"


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
        raise nothing_readable(plan)
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


def print_summary(plan, state="", with_size=False):
    """Print the numbers of videos, images and classes of a plan, the expected size if asked, and what was left out."""
    in_folder = manifest.Manifest(plan)
    videos = [video for video in plan["videos"] if video["slots"]]
    length = recordings.duration(sum(manifest.seconds(plan, video) for video in videos))
    n_frames, n_classes = sum(video["frames"] for video in videos), len(in_folder.classes)
    contents = [(len(videos), "videos"), (n_frames, "frames"), (len(in_folder), "images"), (n_classes, "classes")]
    videos, n_frames, images, classes = (f"{n} {SINGULAR[unit] if n == 1 else unit}" for n, unit in contents)
    print(f"{videos}, {length}, {n_frames}; {images} in {classes}{state}")
    if n_classes == 1 and not plan["settings"].get("moments"):
        print("one class cannot be learned: give a smaller --seg-len, or --class-by video, and another --save-dir")
    if with_size:
        print(f"expected size: {plan['slots'] * mean_size(plan) / 1e9:.3g} GB")
    for name, reason in manifest.left_out(plan):
        print(f"left out: {files.printable(name)}: {reason}")


# --- one video


def extract_images(folder, plan, task, report):
    """Write the images of one video to a frame folder, as files or into a tar.

    plan: the settings of a plan and what manifest.slot_path needs. task: (path, entry of the video in the plan, the
    FrameSelection or, if it is not known, numbers of its frames); the entry has the name of a tar, if one is to be
    written.
    report(n): called when n frames of the video are done.
    Returns (runs of slots without an image, the reason for them or None). Raises OSError if the disk fails.
    """
    cv2.setNumThreads(0)  # videos are read in parallel: threads within one would compete with them
    path, entry, selection = task
    if not entry["slots"]:  # --drop-last or --hours leaves nothing of it
        return [], None
    written, problems = np.zeros(entry["slots"], bool), []

    def members():
        """Yield (name, time of modification, bytes) of each image."""
        modified = os.path.getmtime(path) if os.path.exists(path) else 0
        for position, index, jpeg in _encode_frames(path, entry, selection, plan["settings"], problems):
            yield manifest.slot_path(plan, entry, entry["first_slot"] + position), modified, jpeg
            written[position] = True
            report(index)

    if "tar" in entry:
        tars.write(Path(folder) / entry["tar"], members())
    else:
        for name, _, jpeg in members():
            write_image(folder, name, jpeg)
    if not written.all() and not problems:
        check_disk(path)
        problems.append(f"{np.count_nonzero(~written)} of {len(written)} frames are damaged")
    missing = np.flatnonzero(np.diff(written, prepend=True, append=True)) + entry["first_slot"]
    missing = missing.reshape(-1, 2).tolist()
    remove_images(folder, plan, entry, missing)
    return missing, problems[0] if problems else None


def _encode_frames(path, entry, selection, settings, problems):
    """Yield (position in the slots of the video, index in the video, bytes of the JPEG) of each readable frame.

    The reason why reading ends early is appended to problems.
    """
    try:
        selection = _checked_selection(path, entry, selection)
        for position, picture in frames(path, selection):
            if position < entry["slots"]:
                yield position, int(selection.indices[position]), encode(picture, settings, entry)
    except Exception as error:
        problems.append(reason_to_leave_out(path, error))


def _checked_selection(path, entry, selection):
    """The FrameSelection of a planned video; raises UnreadableVideo if the file is not the one that was planned."""
    info = None if isinstance(selection, FrameSelection) else probe(path)
    is_other = os.path.getsize(path) != entry["bytes"] or (info and info.frames != entry["frames"])
    if is_other or selection is None:
        raise UnreadableVideo("it has changed since the plan was made, or an earlier version of the program planned it")
    return info.select(selection) if info else selection


def write_image(folder, name, jpeg):
    """Write the bytes of an image to the relative path name in a frame folder, creating its class folder.

    The image appears complete or not at all: it is renamed from a temporary file in the frame folder, where no program
    takes it for an image of a class. UserError if the disk is full or not writable.
    """
    part, path = files.temporary_path(Path(folder) / "image"), Path(folder) / name
    try:
        part.write_bytes(jpeg)
        try:
            part.replace(path)
        except FileNotFoundError:
            path.parent.mkdir(exist_ok=True)
            part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        message = f"cannot write {path}: {error.strerror}; correct this and re-run the command to resume"
        raise cli.UserError(message) from error


def remove_images(folder, plan, entry, runs):
    """Remove the images in runs of slots of a video, which an earlier run or a crashed process wrote.

    A tar is removed if all of its images are to be; the others have just been written without those in runs.
    """
    if "tar" in entry:
        if [entry["first_slot"], entry["first_slot"] + entry["slots"]] in runs:
            (Path(folder) / entry["tar"]).unlink(missing_ok=True)
        return
    for first, end in runs:
        for slot in range(first, end):
            (Path(folder) / manifest.slot_path(plan, entry, slot)).unlink(missing_ok=True)


def crop(picture, size=224, shift=16, rotate=180, whole=False):
    """A video frame, (height, width, 3) uint8, as an image of (size, size, 3).

    The minor edge is scaled to size * 256 / 224 pixels (bicubic), the center cropped, moved up by shift pixels of a
    224-pixel image as far as the frame extends (the camera prints the time at the bottom), and rotated clockwise by
    rotate degrees (the head camera hangs upside down). whole: keep the whole frame, with a minor edge of size pixels.
    """
    height, width = picture.shape[:2]
    edge, minor = size if whole else round(size * 256 / 224), min(height, width)
    width, height = width * edge // minor, height * edge // minor
    picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC)
    if not whole:
        left = (width - size) // 2
        top = min(max((height - size) // 2 - round(shift * size / 224), 0), height - size)
        picture = picture[top : top + size, left : left + size]
    return np.ascontiguousarray(np.rot90(picture, -rotate // 90))


def encode(picture, settings, entry):
    """A frame of a video as the bytes of a JPEG image, by the settings of a plan and the video's entry in it."""
    rotate = entry.get("rotate", settings.get("rotate", 0 if settings["no-rotate"] else 180))
    image = crop(picture, settings["size"], settings["shift"], rotate, settings.get("whole", False))
    return cv2.imencode(".jpeg", image, [cv2.IMWRITE_JPEG_QUALITY, settings["quality"]])[1].tobytes()


def mean_size(plan, samples=8):
    """The mean size of an image of a plan in bytes, estimated from the first frames of a few videos."""
    sizes = []
    for entry in plan["videos"][:: len(plan["videos"]) // samples + 1]:
        path = os.path.join(plan["folders"][entry["folder"]], entry["name"])
        with suppress(Exception):  # it is only an estimate; reading the video for its images names the reason
            _, picture = next(frames(path, probe(path).select([0])))
            sizes.append(len(encode(picture, plan["settings"], entry)))
    return sum(sizes) / max(1, len(sizes))
