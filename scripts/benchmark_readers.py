"""The sampled frames of one video as arrays, in one thread: this project, torchcodec, OpenCV."""

import importlib.util

import cv2

from moco.videos import images, video
from moco.videos.probe import probe

BATCH = 64  # frames in memory


def ours(path, fps):
    """The number of frames of path that are decoded when sampled at fps frames per second."""
    info = probe(path)
    return sum(1 for _ in video.frames(path, info.select(images.sampled_frames(info, fps))))


def has_torchcodec():
    """Whether torchcodec is installed; it is no requirement of this project."""
    return importlib.util.find_spec("torchcodec") is not None


def torchcodec(path, fps):
    """The same with torchcodec."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC")
    step = images.frame_step(decoder.metadata.average_fps, fps)
    indices = list(range(0, decoder.metadata.num_frames, step))
    batches = (indices[start : start + BATCH] for start in range(0, len(indices), BATCH))
    return sum(len(decoder.get_frames_at(batch).data.numpy()) for batch in batches)


def opencv(path, fps):
    """The same with OpenCV, which has to decode every frame."""
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    step, number, count = images.frame_step(capture.get(cv2.CAP_PROP_FPS), fps), 0, 0
    while capture.grab():
        count += number % step == 0 and capture.retrieve()[0]
        number += 1
    return count
