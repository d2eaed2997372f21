"""One video and its images: which frames to sample, its entry in the plan of a frame folder, its image files."""

import os
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np

from moco import files
from moco.cli import UserError
from moco.data import manifest, tars
from moco.videos.probe import probe
from moco.videos.video import UnreadableVideo, check_disk, frames


def frame_step(native, fps, published=False):
    """Number of frames from one sampled frame to the next, for sampling native frames per second at about fps.

    The nearest integer, or as published int(native) // fps + 1.
    """
    return int(int(native) // fps) + 1 if published else max(1, round(native / fps))


def sampled_frames(info, fps, published=False):
    """Indices of the frames to sample from the video of a VideoInfo, (n,) int64 rising.

    Every frame_step-th frame of a video of constant rate; the first frame in each 1/fps seconds of another one.
    """
    if info.is_constant_rate():
        return np.arange(0, info.frames, frame_step(info.rate, fps, published))
    ticks = np.floor((info.times - info.times[0]) * (info.tick * fps) + 1e-6)
    return np.flatnonzero(np.diff(ticks, prepend=-1))


def frame_seconds(info, indices):
    """When frames of the video of a VideoInfo are displayed, in seconds from its first frame: (n,) float64."""
    if info.times is None or info.is_constant_rate():
        return np.asarray(indices) / info.rate
    return (info.times[indices] - info.times[0]) * info.tick


def nearest_frames(info, seconds):
    """Indices of the frames nearest to seconds of the video of a VideoInfo, (n,) int64 rising, each once."""
    times = frame_seconds(info, np.arange(info.frames))
    after = np.searchsorted(times, seconds).clip(1, max(1, info.frames - 1))
    before = after - 1
    after = after.clip(max=info.frames - 1)
    return np.unique(np.where(seconds - times[before] <= times[after] - seconds, before, after))


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


def plan_video(settings, task, report=None):
    """What to extract from a video: [(an entry in the plan, the FrameSelection of its frames)], and what is left out.

    task: (path, None), or with moments, {class: seconds}, each class of which has an entry. What is left out is a list
    of reasons. Raises OSError if the disk fails.
    """
    path, moments = task
    try:
        info = probe(path)
        if moments:
            return _plan_moments(info, moments)
        selection = info.select(sampled_frames(info, settings["fps"], settings["published-step"]))
        constant = info.is_constant_rate()
        step = frame_step(info.rate, settings["fps"], settings["published-step"]) if constant else None
        return [(_entry(info, selection, step), selection)], []
    except Exception as error:
        return [], [reason(path, error)]


def _plan_moments(info, moments):
    planned, left_out = [], []
    length = frame_seconds(info, [info.frames - 1])[0] + 1 / info.rate
    for label, seconds in sorted(moments.items()):
        left_out += [f"it ends at {length:.2f} s, before {each:g} s" for each in sorted(seconds) if each > length]
        inside = np.array([each for each in seconds if each <= length])
        if len(inside):
            selection = info.select(nearest_frames(info, inside))
            entry = {**_entry(info, selection), "class": label, "moment_frames": selection.indices.tolist()}
            planned.append((entry, selection))
    return planned, left_out


def _entry(info, selection, step=None):
    """The entry of a video in the plan: its frames are step apart, or else times has (frame, second) of each slot."""
    entry = {"width": info.width, "height": info.height, "rate": info.rate, "frames": info.frames, "step": step}
    entry["slots"] = len(selection)
    if step is None:
        entry["times"] = np.stack([selection.indices, frame_seconds(info, selection.indices)], 1)
    return entry


def extract_images(folder, plan, task, report):
    """Write the images of one video to a frame folder, as files or into a tar.

    plan: the settings of a plan and what manifest.slot_path needs. task: (path, entry of the video in the plan, its
    FrameSelection or None if the plan is an earlier one); the entry has the name of a tar, if one is to be written.
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
        selection = _checked_selection(path, entry, selection, settings)
        for position, picture in frames(path, selection):
            if position < entry["slots"]:
                yield position, int(selection.indices[position]), encode(picture, settings, entry)
    except Exception as error:
        problems.append(reason(path, error))


def _checked_selection(path, entry, selection, settings):
    """The FrameSelection of a planned video; raises UnreadableVideo if the file is not the one that was planned."""
    frames_planned = entry["frames"]
    if selection is None:
        info = probe(path)
        indices = entry.get("moment_frames")
        if indices is None:
            indices = sampled_frames(info, settings["fps"], settings["published-step"])
        selection, frames_planned = info.select(indices), info.frames
    # With --drop-last or --hours there are fewer slots than sampled frames.
    if os.path.getsize(path) != entry["bytes"] or frames_planned != entry["frames"] or len(selection) < entry["slots"]:
        raise UnreadableVideo("it has changed since the plan was made, or an earlier version of the program planned it")
    return selection


def reason(path, error):
    """The reason why a video is left out after an exception, whatever a library raises.

    Raises instead what is no fault of the file: MemoryError, and OSError for a failing disk.
    """
    if isinstance(error, MemoryError) or files.is_transient(error):
        raise error
    check_disk(path, error.__cause__)
    return str(error) if isinstance(error, UnreadableVideo) else f"reading it fails with {error!r}"


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
        raise UserError(message) from error


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


def mean_size(plan, samples=8):
    """The mean size of an image of a plan in bytes, estimated from the first frames of a few videos."""
    sizes = []
    for entry in plan["videos"][:: len(plan["videos"]) // samples + 1]:
        path = os.path.join(plan["folders"][entry["folder"]], entry["name"])
        with suppress(Exception):  # it is only an estimate; reading the video for its images names the reason
            _, picture = next(frames(path, probe(path).select([0])))
            sizes.append(len(encode(picture, plan["settings"], entry)))
    return sum(sizes) / max(1, len(sizes))
