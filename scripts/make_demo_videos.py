"""Render the synthetic data set of the demo: head-camera videos of toys in rooms, and labeled images of other toys.

    python scripts/make_demo_videos.py --save-dir demo/world

Input: only a seed. Output: videos/*.mp4, upside down like those of the head camera, and named as in SAYCam after
child, date and age; labeled/CATEGORY/*.jpeg, upright, of toys and rooms that are in no video; world.json, with the
content of every episode and image.
"""

import functools
import itertools
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from moco import cli, files  # noqa: E402
from scripts.demo_rooms import ROOM, make_room  # noqa: E402
from scripts.demo_toys import CATEGORIES, TOYS, WHITE, draw, rotation  # noqa: E402

WIDTH, HEIGHT, RATE = 640, 480, Fraction(30000, 1001)
REPEATS = 2  # frames per rendered image: 15 images per second are smooth enough, and twice as fast to render
ROOMS = 4  # rooms in the videos, and the number of other rooms in the labeled images
TRANSFORMATIONS = ("rotate", "move", "grow")
CENTER = np.array([320, 270])  # of the crop of read_saycam.py
SKIN = np.array([130.0, 165, 215])


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    cli.shared_flags(parser, "--save-dir", "--seed", "--workers")
    parser.set_defaults(save_dir="demo/world")
    count = cli.number(int, 1)
    parser.add_argument("--videos", type=count, default=4, help="number of videos")
    parser.add_argument("--episodes", type=count, default=16, help="episodes per video, each of one toy")
    parser.add_argument("--seconds", type=cli.number(float, 0.1), default=6.0, help="length of an episode in seconds")
    parser.add_argument("--toys", type=count, default=6, help="toys per category in the videos")
    parser.add_argument("--exemplars", type=count, default=10, help="toys per category in the labeled images")
    parser.add_argument("--views", type=count, default=12, help="labeled images per toy")
    return parser.parse_args(argv)


@functools.cache
def room(seed, number):
    """The image of a room: the first ROOMS are in the videos, the next ones in the labeled images."""
    return make_room(np.random.default_rng([seed, 0, number]))


@functools.cache
def toy(seed, category, number):
    """A toy by its number in its category: the first ones are in the labeled images, the next ones in the videos."""
    return TOYS[category](np.random.default_rng([seed, 1, CATEGORIES.index(category), number]))


def wander(rng, t, low, high, period):
    """A smooth random curve between low and high at the times t (seconds), with about the given period."""
    rate, phase = np.array([1, 0.61, 1.73]) / period, rng.uniform(0, 1, 3)
    wave = np.sin(2 * np.pi * (t[:, None] * rate + phase)) @ [0.5, 0.3, 0.2]
    return (low + high) / 2 + (high - low) / 2 * wave


def make_episode(rng, t, free=TRANSFORMATIONS):
    """Camera, toy and light at the times t (seconds), as a dictionary of curves; in pixels and radians.

    free: the movements of the toy that happen, of TRANSFORMATIONS; the others stop at one moment.
    """
    turning, moving, growing = (t if movement in free else 0 * t for movement in TRANSFORMATIONS)
    jitter = np.stack([wander(rng, t, -9, 9, 0.8), wander(rng, t, -9, 9, 0.8)], 1)
    gaze = np.stack([wander(rng, t, 350, ROOM[1] - 350, 7), wander(rng, t, 350, ROOM[0] - 350, 5)], 1)
    path = np.stack([wander(rng, moving, -100, 100, 5), wander(rng, moving, -80, 80, 5)], 1)
    tint = np.stack([wander(rng, t, 0.8, 1.2, 4) for _ in "bgr"], 1)
    spin = rng.uniform(0, 2 * np.pi) + rng.choice([-1, 1]) * rng.uniform(0.4, 0.9) * turning
    return {
        "gaze": gaze + jitter,
        "tilt": wander(rng, t, -0.16, 0.16, 4),
        "zoom": wander(rng, t, 0.8, 1.2, 8),
        "position": CENTER + path + jitter,
        "size": wander(rng, growing, 90, 190, 6),
        "yaw": spin + wander(rng, turning, -0.6, 0.6, 4),
        "pitch": wander(rng, turning, -0.1, 0.9, 5),
        "roll": wander(rng, turning, -0.5, 0.5, 5),
        "lamp": np.stack([wander(rng, t, -1, 1, 7), wander(rng, t, -1, -0.2, 7), np.full(len(t), -0.7)], 1),
        "light": wander(rng, t, 0.7, 1.2, 3)[:, None] * tint,
    }


def render(room, toy, others, in_hand, moment):
    """The upright camera image (480, 640, 3), BGR, at one moment.

    others: (toy, position in the room, size, yaw) of toys in the background. in_hand: whether a hand holds the toy.
    moment: the values of an episode's curves.
    """
    gaze, zoom, lamp, light = (moment[key] for key in ("gaze", "zoom", "lamp", "light"))
    view = cv2.getRotationMatrix2D(gaze.tolist(), np.degrees(moment["tilt"]), zoom)
    view[:, 2] += (WIDTH / 2, HEIGHT / 2) - gaze
    # The room is out of focus, so half the resolution is enough for it.
    half = np.c_[view[:, :2], view[:, 2] / 2]
    image = cv2.warpAffine(room, half, (WIDTH // 2, HEIGHT // 2), borderMode=cv2.BORDER_REFLECT)
    image = cv2.resize(cv2.multiply(image, (*light.tolist(), 0)), (WIDTH, HEIGHT))
    for other, position, size, yaw in others:
        draw(image, other, view @ (*position, 1), size * zoom, rotation(yaw, 0.4, -moment["tilt"]), lamp, light)
    turn = rotation(moment["yaw"], moment["pitch"], moment["roll"])
    wrist = moment["position"] + moment["size"] * np.array([0.3, 0.75])
    if in_hand:
        stroke(image, wrist, moment["position"] * 0.5 + (330, 420), 0.5 * moment["size"], SKIN * 0.85 * light)
    draw(image, toy, moment["position"], moment["size"], turn, lamp, light)
    for finger in (-0.25, 0.05, 0.35) if in_hand else ():
        tip = moment["position"] + moment["size"] * np.array([finger, 0.5 + finger**2])
        stroke(image, wrist, tip, 0.2 * moment["size"], SKIN * light)
    return image


def crop(image):
    """The crop (224, 224, 3) that read_saycam.py would take of an upright image."""
    return cv2.resize(image, (341, 256), interpolation=cv2.INTER_CUBIC)[32:, 59:283]


def stroke(image, start, end, width, fill):
    """Draw a thick line with round ends."""
    ends = [np.round(end).astype(int).tolist() for end in (start, end)]
    cv2.line(image, *ends, np.clip(fill, 0, 255).tolist(), int(width), cv2.LINE_AA)


def make_scene(rng, seed, t, subject, rooms, numbers, free=TRANSFORMATIONS):
    """An episode of one toy in one of the rooms, with up to two toys of the given numbers in the background.

    subject: category and number of the toy. Returns the content, for world.json, and an iterator of len(t) images.
    """
    number = int(rng.choice(rooms))
    others = [(str(rng.choice(CATEGORIES)), int(rng.choice(numbers))) for _ in range(rng.integers(3))]
    floor = (250, 620), (ROOM[1] - 250, ROOM[0] - 120)
    background = [(toy(seed, *other), rng.uniform(*floor), rng.uniform(40, 75), rng.uniform(0, 6)) for other in others]
    in_hand = bool(rng.random() < 0.5)
    episode = make_episode(rng, t, free)
    moments = ({key: curve[i] for key, curve in episode.items()} for i in range(len(t)))
    images = (render(room(seed, number), toy(seed, *subject), background, in_hand, moment) for moment in moments)
    return {"toy": subject, "room": number, "others": others}, images


def film(path, seed, plan, rooms, numbers, seconds):
    """Write a video of the episodes in plan, each (number, subject); returns their content."""
    cv2.setNumThreads(1)
    length = round(seconds * RATE)
    t = np.arange(0, length, REPEATS) / float(RATE)
    content = []
    clock = itertools.count()
    with files.atomic_write(path) as part, av.open(part, "w") as container:
        stream = container.add_stream("libx264", RATE, options={"preset": "ultrafast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        for number, subject in plan:
            rng = np.random.default_rng([seed, 3, number])
            scene, images = make_scene(rng, seed, t, subject, rooms, numbers)
            content.append({"video": path.name, **scene})
            for i in range(length):
                stamp = "{:02d}:{:02d}".format(*divmod(int(next(clock) / RATE), 60))
                if i % REPEATS == 0:
                    frame = cv2.flip(next(images), -1)  # the camera is upside down; its time stamp is not
                    cv2.putText(frame, stamp, (20, HEIGHT - 18), cv2.FONT_HERSHEY_SIMPLEX, 0.8, WHITE.tolist(), 2)
                    planes = cv2.cvtColor(frame, cv2.COLOR_BGR2YUV_I420)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, "yuv420p")))
        container.mux(stream.encode(None))
    return content


def photograph(folder, seed, category, rooms, numbers, views):
    """Write the labeled images of one category; returns their content."""
    cv2.setNumThreads(1)
    content = []
    for number, (k, movement) in itertools.product(numbers, enumerate(TRANSFORMATIONS)):
        rng = np.random.default_rng([seed, 4, CATEGORIES.index(category), number, k])
        t = np.linspace(0, 6, len(range(k, views, len(TRANSFORMATIONS))), endpoint=False)
        scene, images = make_scene(rng, seed, t, (category, number), rooms, numbers, (movement,))
        for i, image in enumerate(images):
            name = f"{category}_{number:02d}_{movement}_{i:04d}.jpeg"
            with files.atomic_write(folder / name) as part:
                part.write_bytes(cv2.imencode(".jpeg", crop(image))[1])
            content.append({"image": f"{category}/{name}", **scene})
    return content


def recording_name(k, n):
    """The name of video k of n, of SAYCam's form: recordings of two children, each at growing ages."""
    child, j = ("A", k) if k < n / 2 else ("S", k - (n + 1) // 2)
    months = min(6 + 7 * j if child == "A" else 9 + 10 * j, 32)
    year, month = divmod(2012 * 12 + 9 + months, 12)  # both were born on 17 October 2012
    return f"{child}_{year}{month + 1:02d}17_{months:02d}00_{j + 1:02d}.mp4"


def plan_episodes(rng, toys, n):
    """n or a few more episodes as [(number, (category, toy))], each category equally often, in random order."""
    subjects = []
    for toy_number in itertools.cycle(toys):
        subjects += [(category, toy_number) for category in rng.permutation(CATEGORIES).tolist()]
        if len(subjects) >= n:
            return list(enumerate(subjects))


def main(argv=None):
    args = parse_args(argv)
    save_dir = files.make_output_dir(args.save_dir)
    summary = save_dir / "world.json"
    if summary.exists():
        raise cli.UserError(f"{summary} exists; give another --save-dir")
    videos = files.make_output_dir(save_dir / "videos")
    labeled = range(1, args.exemplars + 1)
    filmed = range(args.exemplars + 1, args.exemplars + args.toys + 1)
    plan = plan_episodes(np.random.default_rng([args.seed, 2]), filmed, args.videos * args.episodes)

    jobs = []
    for k in range(args.videos):
        part = plan[k * args.episodes : (k + 1) * args.episodes]
        path = videos / recording_name(k, args.videos)
        jobs.append((film, path, args.seed, part, range(ROOMS), filmed, args.seconds))
    for category in CATEGORIES:
        folder = files.make_output_dir(save_dir / "labeled" / category)
        jobs.append((photograph, folder, args.seed, category, range(ROOMS, 2 * ROOMS), labeled, args.views))
    content = []
    processes = ProcessPoolExecutor(args.workers or 1, multiprocessing.get_context("spawn"))
    with processes as pool, cli.Progress(len(jobs), "rendering", "jobs") as progress:
        for result in [pool.submit(*job) for job in jobs]:
            content += result.result()
            progress.update()
    episodes = [entry for entry in content if "video" in entry]
    images = [entry for entry in content if "image" in entry]
    files.write_json(summary, {"seed": args.seed, "episodes": episodes, "labeled": images})


if __name__ == "__main__":
    cli.run(main)
