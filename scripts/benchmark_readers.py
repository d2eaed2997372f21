"""The sampled frames of one video as arrays, in one thread: this project, torchcodec, OpenCV."""

import importlib.util

import cv2

from moco.videos import images, video
from moco.videos.probe import probe

BATCH = 64  # frames in memory


def ours(path, fps):
    """Decode the frames of path sampled at fps frames per second; returns nothing, like the others."""
    info = probe(path)
    for _ in video.frames(path, info.select(images.sampled_frames(info, fps))):
        pass


def has_torchcodec():
    """Whether torchcodec is installed; it is no requirement of this project."""
    return importlib.util.find_spec("torchcodec") is not None


def torchcodec(path, fps):
    """The same with torchcodec."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC")
    step = images.frame_step(decoder.metadata.average_fps, fps)
    indices = list(range(0, decoder.metadata.num_frames, step))
    for start in range(0, len(indices), BATCH):
        decoder.get_frames_at(indices[start : start + BATCH]).data.numpy()


def opencv(path, fps):
    """The same with OpenCV, which has to decode every frame."""
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    step, number = images.frame_step(capture.get(cv2.CAP_PROP_FPS), fps), 0
    while capture.grab():
        if number % step == 0:
            capture.retrieve()
        number += 1
