"""The sampled frames of a video as arrays, by this project, torchcodec and OpenCV; the published loop over videos."""

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


def plain_loop(videos, folder, step=6):
    """Read every frame of one video after another in one process; write each step-th as an image, as published."""
    count = 0
    for name in videos:
        video, number = cv2.VideoCapture(name), 0
        while True:
            there, frame = video.read()
            if not there:
                break
            if number % step == 0:
                frame = cv2.resize(frame, (frame.shape[1] * 256 // frame.shape[0], 256), interpolation=cv2.INTER_CUBIC)
                left = (frame.shape[1] - 224) // 2
                cv2.imwrite(f"{folder}/img_{count:07d}.jpeg", frame[:224, left : left + 224][::-1, ::-1])
                count += 1
            number += 1
