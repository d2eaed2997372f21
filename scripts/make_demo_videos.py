"""Render the small world of the demo: head-camera videos of toys seen in rooms, and a labelled set of other toys.

    python scripts/make_demo_videos.py --save-dir demo/world

In: nothing but a seed. Out: videos/*.mp4, upside down like a head camera's; labelled/CATEGORY/*.jpeg, the right way up,
with toys and rooms that no video shows; world.json, which says what every episode and every picture shows.
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
from scripts.demo_toys import TOYS, WHITE, draw, rotation  # noqa: E402

WIDTH, HEIGHT, RATE = 640, 480, Fraction(30000, 1001)
HELD = 2  # frames that a picture is held for: drawing 15 a second is smooth enough, and twice as fast
ROOMS = 4  # rooms in the videos, and as many others in the labelled set
CATEGORIES = sorted(TOYS)
TRANSFORMATIONS = ("rotate", "move", "grow")
MIDDLE = np.array([320, 270])  # of the part of a picture that read_saycam.py keeps
SKIN = np.array([130.0, 165, 215])


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    cli.shared_flags(parser, "--save-dir", "--seed", "--workers")
    parser.set_defaults(save_dir="demo/world")
    count = cli.number(int, 1)
    parser.add_argument("--videos", type=count, default=4, help="video files")
    parser.add_argument("--episodes", type=count, default=16, help="episodes a video, each about one toy")
    parser.add_argument("--seconds", type=cli.number(float, 0.1), default=6.0, help="length of an episode in seconds")
    parser.add_argument("--toys", type=count, default=6, help="toys of a category in the videos")
    parser.add_argument("--exemplars", type=count, default=10, help="toys of a category in the labelled set")
    parser.add_argument("--views", type=count, default=12, help="labelled pictures of a toy")
    return parser.parse_args(argv)


@functools.cache
def room(seed, number):
    """The picture of a room: the first ROOMS are in the videos, the next in the labelled set."""
    return make_room(np.random.default_rng([seed, 0, number]))


@functools.cache
def toy(seed, category, number):
    """The toy of that number: 1, 2, ... are in the labelled set, those after its last in the videos."""
    return TOYS[category](np.random.default_rng([seed, 1, CATEGORIES.index(category), number]))


def wander(rng, t, low, high, period):
    """A smooth curve between low and high at the times t (seconds), which takes about a period to come back."""
    rate, phase = np.array([1, 0.61, 1.73]) / period, rng.uniform(0, 1, 3)
    wave = np.sin(2 * np.pi * (t[:, None] * rate + phase)) @ [0.5, 0.3, 0.2]
    return (low + high) / 2 + (high - low) / 2 * wave


def make_episode(rng, t, free=TRANSFORMATIONS):
    """Where camera, toy and light are at the times t (seconds): a dictionary of curves.

    free: which of the toy's movements happen; in the others it stays as it is at one moment. Places and sizes are in
    pixels, angles in radians.
    """
    turning, moving, growing = (t if movement in free else 0 * t for movement in TRANSFORMATIONS)
    jitter = np.stack([wander(rng, t, -9, 9, 0.8), wander(rng, t, -9, 9, 0.8)], 1)
    look = np.stack([wander(rng, t, 350, ROOM[1] - 350, 7), wander(rng, t, 350, ROOM[0] - 350, 5)], 1)
    path = np.stack([wander(rng, moving, -100, 100, 5), wander(rng, moving, -80, 80, 5)], 1)
    tint = np.stack([wander(rng, t, 0.8, 1.2, 4) for _ in "bgr"], 1)
    spin = rng.uniform(0, 2 * np.pi) + rng.choice([-1, 1]) * rng.uniform(0.4, 0.9) * turning
    return {
        "look": look + jitter,
        "tilt": wander(rng, t, -0.16, 0.16, 4),
        "zoom": wander(rng, t, 0.8, 1.2, 8),
        "place": MIDDLE + path + jitter,
        "size": wander(rng, growing, 90, 190, 6),
        "yaw": spin + wander(rng, turning, -0.6, 0.6, 4),
        "pitch": wander(rng, turning, -0.1, 0.9, 5),
        "roll": wander(rng, turning, -0.5, 0.5, 5),
        "lamp": np.stack([wander(rng, t, -1, 1, 7), wander(rng, t, -1, -0.2, 7), np.full(len(t), -0.7)], 1),
        "light": wander(rng, t, 0.7, 1.2, 3)[:, None] * tint,
    }


def see(room, toy, others, held, moment):
    """What the camera sees: a picture (480, 640, 3), BGR, the right way up.

    others: (toy, place in the room, size, yaw) of the toys that lie about. held: whether a hand holds the toy.
    moment: the values of an episode's curves.
    """
    look, zoom, lamp, light = moment["look"], moment["zoom"], moment["lamp"], moment["light"]
    view = cv2.getRotationMatrix2D(look.tolist(), np.degrees(moment["tilt"]), zoom)
    view[:, 2] += (WIDTH / 2, HEIGHT / 2) - look
    # The room is out of focus, so half the resolution is enough for it.
    half = np.c_[view[:, :2], view[:, 2] / 2]
    image = cv2.warpAffine(room, half, (WIDTH // 2, HEIGHT // 2), borderMode=cv2.BORDER_REFLECT)
    image = cv2.resize(cv2.multiply(image, (*light.tolist(), 0)), (WIDTH, HEIGHT))
    for other, place, size, yaw in others:
        draw(image, other, view @ (*place, 1), size * zoom, rotation(yaw, 0.4, -moment["tilt"]), lamp, light)
    turn = rotation(moment["yaw"], moment["pitch"], moment["roll"])
    wrist = moment["place"] + moment["size"] * np.array([0.3, 0.75])
    if held:
        stroke(image, wrist, moment["place"] * 0.5 + (330, 420), 0.5 * moment["size"], SKIN * 0.85 * light)
    draw(image, toy, moment["place"], moment["size"], turn, lamp, light)
    for finger in (-0.25, 0.05, 0.35) if held else ():
        tip = moment["place"] + moment["size"] * np.array([finger, 0.5 + finger**2])
        stroke(image, wrist, tip, 0.2 * moment["size"], SKIN * light)
    return image


def cut(picture):
    """The part (224, 224, 3) of a picture that read_saycam.py would keep of it."""
    return cv2.resize(picture, (341, 256), interpolation=cv2.INTER_CUBIC)[32:, 59:283]


def stroke(image, start, end, width, fill):
    """Draw a thick line with round ends."""
    ends = [np.round(end).astype(int).tolist() for end in (start, end)]
    cv2.line(image, *ends, np.clip(fill, 0, 255).tolist(), int(width), cv2.LINE_AA)


def shoot(rng, seed, t, about, rooms, numbers, free=TRANSFORMATIONS):
    """Look at one toy in one of the rooms, others of these numbers lying about now and then.

    about: category and number of the toy. Returns what is seen, for world.json, and an iterator of len(t) pictures.
    """
    number = int(rng.choice(rooms))
    others = [(str(rng.choice(CATEGORIES)), int(rng.choice(numbers))) for _ in range(rng.integers(3))]
    floor = (250, 620), (ROOM[1] - 250, ROOM[0] - 120)
    lying = [(toy(seed, *other), rng.uniform(*floor), rng.uniform(40, 75), rng.uniform(0, 6)) for other in others]
    held = bool(rng.random() < 0.5)
    episode = make_episode(rng, t, free)
    moments = ({key: curve[i] for key, curve in episode.items()} for i in range(len(t)))
    pictures = (see(room(seed, number), toy(seed, *about), lying, held, moment) for moment in moments)
    return {"toy": about, "room": number, "others": others}, pictures


def film(path, seed, plan, rooms, numbers, seconds):
    """Write a video of the episodes in plan, (number, about) each; returns what they show."""
    cv2.setNumThreads(1)
    length = round(seconds * RATE)
    t = np.arange(0, length, HELD) / float(RATE)
    shown, clock = [], itertools.count()
    with files.atomic_write(path) as part, av.open(part, "w") as container:
        stream = container.add_stream("libx264", RATE, options={"preset": "ultrafast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        for number, about in plan:
            what, pictures = shoot(np.random.default_rng([seed, 3, number]), seed, t, about, rooms, numbers)
            shown.append({"video": path.name, **what})
            for i in range(length):
                stamp = "{:02d}:{:02d}".format(*divmod(int(next(clock) / RATE), 60))
                if i % HELD == 0:
                    frame = cv2.flip(next(pictures), -1)  # the camera is worn upside down; its time stamp is not
                    cv2.putText(frame, stamp, (20, HEIGHT - 18), cv2.FONT_HERSHEY_SIMPLEX, 0.8, WHITE.tolist(), 2)
                    planes = cv2.cvtColor(frame, cv2.COLOR_BGR2YUV_I420)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, "yuv420p")))
        container.mux(stream.encode(None))
    return shown


def photograph(folder, seed, category, rooms, numbers, views):
    """Write the labelled pictures of one category; returns what they show."""
    cv2.setNumThreads(1)
    shown = []
    for number, (k, movement) in itertools.product(numbers, enumerate(TRANSFORMATIONS)):
        rng = np.random.default_rng([seed, 4, CATEGORIES.index(category), number, k])
        t = np.linspace(0, 6, len(range(k, views, len(TRANSFORMATIONS))), endpoint=False)
        what, pictures = shoot(rng, seed, t, (category, number), rooms, numbers, (movement,))
        for i, picture in enumerate(pictures):
            name = f"{category}_{number:02d}_{movement}_{i:04d}.jpeg"
            with files.atomic_write(folder / name) as part:
                part.write_bytes(cv2.imencode(".jpeg", cut(picture))[1])
            shown.append({"picture": f"{category}/{name}", **what})
    return shown


def main(argv=None):
    args = parse_args(argv)
    save_dir = files.make_output_dir(args.save_dir)
    summary = save_dir / "world.json"
    if summary.exists():
        raise cli.UserError(f"{summary} exists; give another --save-dir")
    videos = files.make_output_dir(save_dir / "videos")
    labelled = range(1, args.exemplars + 1)
    filmed = range(args.exemplars + 1, args.exemplars + args.toys + 1)
    rng, plan = np.random.default_rng([args.seed, 2]), []
    for number in itertools.cycle(filmed):
        plan += [(category, number) for category in rng.permutation(CATEGORIES).tolist()]
        if len(plan) >= args.videos * args.episodes:
            break
    plan = list(enumerate(plan))

    jobs = [
        (film, videos / f"video_{k + 1:02d}.mp4", args.seed, plan[k * args.episodes : (k + 1) * args.episodes],
         range(ROOMS), filmed, args.seconds)
        for k in range(args.videos)
    ] + [
        (photograph, files.make_output_dir(save_dir / "labelled" / category), args.seed, category,
         range(ROOMS, 2 * ROOMS), labelled, args.views)
        for category in CATEGORIES
    ]  # fmt: skip
    shown, processes = [], ProcessPoolExecutor(args.workers or 1, multiprocessing.get_context("spawn"))
    with processes as pool, cli.Progress(len(jobs), "rendering", "jobs") as progress:
        for result in [pool.submit(*job) for job in jobs]:
            shown += result.result()
            progress.update()
    files.write_json(summary, {"seed": args.seed, "episodes": [s for s in shown if "video" in s],
                               "labelled": [s for s in shown if "picture" in s]})  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
