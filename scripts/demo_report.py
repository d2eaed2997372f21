"""Show all results of the demo on one page, and print its table of accuracies.

    python scripts/demo_report.py demo

Input: the output folder of demo.sh. Output, in the same folder: report.html, a single file with all figures, and
report.md; pipeline.png and .pdf; and results.json with {MODEL: {TASK: {mean, std}}, majority, chance}, accuracies from
0 to 1.
"""

import sys
import tempfile
from pathlib import Path

import av
import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from moco import cli, files, plots  # noqa: E402
from moco.analysis import accuracy  # noqa: E402
from moco.data import augment, manifest  # noqa: E402
from moco.data.folders import FrameFolder  # noqa: E402
from scripts import report_page  # noqa: E402
from scripts.paper_report import read_log  # noqa: E402

FIGURES = {  # title -> where its figures and films are
    "Training": ["TC", "moco_img", "moco_temp"],
    "Embeddings of the labeled images": ["embeddings"],
    "Where the network sees a class": ["maps", "films"],
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("results", type=Path, metavar="FOLDER", help="output folder of demo.sh")
    return parser.parse_args(argv)


def summarize(models):
    """Mean and spread of every model on every task, and the accuracy of guessing, from {model: {task: results}}."""
    summary = {}
    for name, by_task in models.items():
        by_task = {task: {"mean": entry["mean"], "std": entry["std"]} for task, entry in by_task.items()}
        summary["hog" if name == "HOG" else name] = by_task
    return summary | accuracy.baselines(models, accuracy.task_names(models)[0])


def figures(folder):
    """The figures and films in folder."""
    return sorted(path for path in folder.glob("*") if path.suffix in (".png", ".mp4"))


def first_frame(path):
    """The first frame of a video, as it is stored: uint8 (height, width, 3)."""
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def pipeline(folder):
    """The stages of the demo in its own pictures, as plots.pipeline takes them."""
    plan, frames = manifest.read(folder / "frames"), FrameFolder(folder / "frames")
    videos = [Path(plan["folders"][video["folder"]]) / video["name"] for video in plan["videos"]]
    shown = np.linspace(0, len(frames) - 1, 9).astype(int).tolist()
    learned = [folder / "decoding" / "accuracies.png", next((folder / "maps").glob("*.png"))]
    epochs = [record for record in read_log(folder / "TC") if "step" not in record]
    losses = [{"epoch": record["epoch"], "loss": record["loss"]} for record in epochs]
    with tempfile.TemporaryDirectory() as temporary:
        plots.training_curve(losses, Path(temporary) / "loss")
        images = [cv2.imread(str(path))[..., ::-1] for path in [Path(temporary) / "loss.png", *learned]]
    return [
        ("videos", [first_frame(path) for path in videos[:2]], 1),
        ("frames, by episode", [augment.decode(frames.read(i)) for i in shown], 3),
        ("training", images[:1], 1),
        ("what the network learned", images[1:], 1),
    ]


def main(argv=None):
    folder = parse_args(argv).results
    models = accuracy.read_results([folder / "decoding" / "results.json"])
    files.write_json(folder / "results.json", summarize(models))
    print(accuracy.table(models))
    decoding = [accuracy.cells(models), *sorted((folder / "decoding").glob("accuracies*.png"))]
    plots.pipeline(pipeline(folder), folder / "pipeline")
    page = [("From videos to a network that recognizes objects", [folder / "pipeline.png"])]
    page += [("Linear decoding: top-1 in %, mean ± standard deviation over splits", decoding)]
    page += [(title, [path for name in names for path in figures(folder / name)]) for title, names in FIGURES.items()]
    report_page.write(folder, "The demo", page)


if __name__ == "__main__":
    cli.run(main)
