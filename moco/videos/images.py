"""One video and its images: which frames to sample, its entry in the plan of a frame folder, its image files."""

import os
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from moco import files
from moco.cli import UserError
from moco.data import archive, manifest
from moco.videos.probe import probe
from moco.videos.video import UnreadableVideo, frames

REPORT_EVERY = 32  # images


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


def select_frames(path, settings, indices=None):
    """(VideoInfo, FrameSelection of frames, by default those to sample) of a video file; raises UnreadableVideo."""
    info = probe(path)
    if indices is None:
        indices = sampled_frames(info, settings["fps"], settings["published-step"])
    return info, info.select(indices)


def plan_video(settings, path):
    """(its entry in the plan, the FrameSelection of its sampled frames) of a video; (reason, None) if it is unreadable.

    UserError if there is not enough memory.
    """
    reasons = []
    with _reasons_of(path, reasons):
        info, selection = select_frames(path, settings)
    if reasons:
        return reasons[0], None
    if not info.is_constant_rate():
        return _entry(info, selection), selection
    step = frame_step(info.rate, settings["fps"], settings["published-step"])
    return _entry(info, selection, step), selection


def plan_moments(task):
    """[(an entry in the plan, the FrameSelection of its frames)] of a video, and the reasons why others are left out.

    task: (path, {class: seconds}); there is an entry for each class. UserError if there is not enough memory.
    """
    path, moments = task
    planned, reasons, problems = [], [], []
    with _reasons_of(path, problems):
        info = probe(path)
        length = frame_seconds(info, [info.frames - 1])[0] + 1 / info.rate
        for label, seconds in sorted(moments.items()):
            reasons += [f"it ends at {length:.2f} s, before {each:g} s" for each in sorted(seconds) if each > length]
            inside = np.array([each for each in seconds if each <= length])
            if len(inside):
                selection = info.select(nearest_frames(info, inside))
                entry = {**_entry(info, selection), "class": label, "moment_frames": selection.indices.tolist()}
                planned.append((entry, selection))
    return ([], problems) if problems else (planned, reasons)


@contextmanager
def _reasons_of(path, reasons):
    """Append to reasons why the video at path cannot be read; a lack of memory is a UserError."""
    try:
        yield
    except MemoryError as error:
        raise UserError(f"out of memory while reading {path}; retry with fewer --workers") from error
    except Exception as error:  # whatever a library raises for one file, the others are read
        reasons.append(reason(error))


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
    report(n): called when n more frames of the video are done.
    Returns (runs of slots without an image, the reason for them or None); (None, None) if there is not enough memory.
    """
    cv2.setNumThreads(0)  # videos are read in parallel: threads within one would compete with them
    path, entry, selection = task
    if not entry["slots"]:
        report(entry["frames"])
        return [], None
    written, done, problems = np.zeros(entry["slots"], bool), 0, []

    def members():
        """Yield (name, time of modification, bytes) of each image, and report those that are written."""
        nonlocal done
        modified = os.path.getmtime(path) if os.path.exists(path) else 0
        for position, index, jpeg in _encode_frames(path, entry, selection, plan["settings"], problems):
            yield manifest.slot_path(plan, entry, entry["first_slot"] + position), modified, jpeg
            written[position] = True
            if position % REPORT_EVERY == REPORT_EVERY - 1:
                report(index - done)
                done = index

    try:
        if "tar" in entry:
            archive.write(Path(folder) / entry["tar"], members())
        else:
            for name, _, jpeg in members():
                write_image(folder, name, jpeg)
    except MemoryError:
        return None, None
    if not written.all() and not problems:
        problems.append(f"{np.count_nonzero(~written)} of {len(written)} frames are damaged")
    missing = (
        (np.flatnonzero(np.diff(written, prepend=True, append=True)) + entry["first_slot"]).reshape(-1, 2).tolist()
    )
    remove_images(folder, plan, entry, missing)
    report(entry["frames"] - done)
    return missing, problems[0] if problems else None


def _encode_frames(path, entry, selection, settings, problems):
    """Yield (position in the slots of the video, index in the video, bytes of the JPEG) of each frame that is readable.

    The reason why reading ends early is appended to problems; MemoryError and UserError are raised.
    """
    try:
        selection = _checked_selection(path, entry, selection, settings)
        for position, picture in frames(path, selection):
            if position < entry["slots"]:  # --drop-last leaves out the others
                yield position, int(selection.indices[position]), encode(picture, settings, entry)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # whatever a library raises for one file, the others are read
        problems.append(reason(error))


def _checked_selection(path, entry, selection, settings):
    """The FrameSelection of a planned video; raises UnreadableVideo if the file is not the one that was planned."""
    frames_planned = entry["frames"]
    if selection is None:
        info, selection = select_frames(path, settings, entry.get("moment_frames"))
        frames_planned = info.frames
    # --drop-last plans fewer slots than there are sampled frames.
    if os.path.getsize(path) != entry["bytes"] or frames_planned != entry["frames"] or len(selection) < entry["slots"]:
        raise UnreadableVideo("it has changed since the plan was made, or an earlier version of the program planned it")
    return selection


def reason(error):
    """The reason why a video is left out, after an exception while it was read."""
    return str(error) if isinstance(error, UnreadableVideo) else f"reading it fails with {error!r}"


def write_image(folder, name, jpeg):
    """Write the bytes of an image to the relative path name in a frame folder, creating its class folder.

    The image appears complete or not at all: it is renamed from a temporary file in the frame folder, where no program
    takes it for an image of a class. UserError if the disk is full or not writable.
    """
    folder = Path(folder)
    part = files.temporary_path(folder / "image")
    try:
        part.write_bytes(jpeg)
        try:
            part.replace(folder / name)
        except FileNotFoundError:
            (folder / name).parent.mkdir(exist_ok=True)
            part.replace(folder / name)
    except OSError as error:
        part.unlink(missing_ok=True)
        message = f"cannot write {folder / name}: {error.strerror}; correct this and re-run the command to resume"
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
        try:
            _, picture = next(frames(path, probe(path).select([0])))
            sizes.append(len(encode(picture, plan["settings"], entry)))
        except Exception:  # noqa: S112 (it is only an estimate; reading the video for its images names the reason)
            continue
    return sum(sizes) / max(1, len(sizes))
