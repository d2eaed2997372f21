"""Write one page with the results of reproduce.sh: every table and figure, with measured and published values.

    python scripts/paper_report.py reproduction

Input: the output folder of reproduce.sh, finished or not. Output, in the same folder: report.md, and report.html, which
is a single file with its figures. It only reads the files that the scripts wrote.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from moco import cli, files  # noqa: E402
from moco.analysis import accuracy  # noqa: E402
from moco.cli import UserError  # noqa: E402
from scripts import report_page  # noqa: E402

TRAININGS = ["TC-S", "TC-A", "TC-Y", "TC-SAY", "moco_img-S", "moco_temp-S"]
TRAININGS += ["TC-S-1-fps", "TC-S-half-length", "TC-S-no-augmentation"]
DECODINGS = {
    "labeled_S": "Labeled S, random halves (Figure 3)",
    "labeled_S-subsampled": "Labeled S, a tenth of the frames (Figure 3)",
    "labeled_S-binary": "Four pairs of classes (Figure 4a)",
    "variants": "Frame rate, episode length, augmentation (Figure 5)",
    "toybox": "Toybox, random halves and unseen exemplars (Figure 3)",
}
PUBLISHED_ON_IMAGENET = "TC-SAY/resnext50_32x4d_"  # the network of the published accuracies
IMAGENET = {  # folder -> protocol, published top-1 in %
    "imagenet-linear": ("frozen network, new head", 36.0),
    "imagenet-part": ("whole network, part of the images", None),
    "imagenet-part-linear": ("the same, then frozen with a new head", 45.6),
}
FIGURES = {  # folder -> title of its figures
    "maps-class-only": "Class activation maps in images of the class (Figure 6)",
    "maps-others": "The same in images of other classes (Figure 6)",
    "selectivities": "Selectivity by layer, and variance explained by principal components (Figures 7a and A1)",
    "top_images": "Images that activate selective units most (Figures 7b and A5)",
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("results", type=Path, metavar="FOLDER", help="output folder of reproduce.sh")
    return parser.parse_args(argv)


def read_log(folder):
    """The records in the log of a trainer's folder; none if there is no log. A line that is damaged is skipped."""
    path = folder / "log.jsonl"
    records = []
    for number, line in enumerate(files.read_text(path).splitlines() if path.exists() else [], 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:  # also the last line, if it is being written or a kill cut it off
            print(f"warning: line {number} of {path} is damaged and skipped", file=sys.stderr)
    return records


def read_flags(folder):
    """The content of args.json in a folder; empty if it is missing or damaged."""
    try:
        return files.read_json(folder / "args.json")
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)
        return {}


def training(folder):
    """A training's row of the table, None before the end of its first epoch; and the commit of its code, if known."""
    flags = read_flags(folder)
    epochs = [record for record in read_log(folder) if "step" not in record]
    if not epochs:
        return None, flags.get("commit")
    # An epoch that was resumed after its last step has no speed.
    seconds = sum(record["images"] / record["images_per_second"] for record in epochs if record["images_per_second"])
    row = [
        folder.name,
        flags.get("model") or flags.get("arch") or "-",
        f"{epochs[-1]['images']}",
        f"{len(epochs)} of {flags.get('epochs', '?')}",
        f"{seconds / 60:.1f}",
        f"{epochs[-1]['loss']:.2f}",
        f"{epochs[-1]['acc1']:.1f}",
    ]
    return row, flags.get("commit")


def trainings(results):
    """The table of trainings, and the commits of the code they ran with."""
    rows = [["network", "architecture", "images per epoch", "epochs", "minutes", "loss", "top-1 %"]]
    commits = set()
    for name in TRAININGS:
        if (results / name / "log.jsonl").exists():
            row, commit = training(results / name)
            if commit:
                commits.add(commit)
            if row:
                rows.append(row)
    return rows, sorted(commits)


def accuracies(path):
    """The table in a results.json: one row per model, one column per task with mean, spread and published value."""
    (_, *tasks), *rows = accuracy.cells(accuracy.read_results([path]))
    return [["top-1 %, mean ± sd", *tasks], *rows]


def start_checkpoint(results, name):
    """The checkpoint, relative to results, that an ImageNet run started from, directly or through another such run."""
    path = read_flags(results / name).get("model_path")
    if not path:
        return "-"
    path = Path(path)
    return (
        start_checkpoint(results, path.parent.name)
        if path.parent.name in IMAGENET
        else f"{path.parent.name}/{path.name}"
    )


def imagenet(results):
    """The table of ImageNet: protocol, network, top-1 and top-5 after the last epoch, published top-1."""
    rows = [["protocol", "network", "top-1 %", "top-5 %", "published top-1 %"]]
    for name, (protocol, published) in IMAGENET.items():
        epochs = [record for record in read_log(results / name) if "val_acc1" in record]
        if not epochs:
            continue
        classes = {image.partition("/")[0] for image in files.read_list(results / name / "train_list.txt")}
        start = start_checkpoint(results, name)
        is_published = published and len(classes) == 1000 and start.startswith(PUBLISHED_ON_IMAGENET)
        accuracies = [f"{epochs[-1][key]:.1f}" for key in ("val_acc1", "val_acc5")]
        rows.append([protocol, start, *accuracies, f"{published}" if is_published else "-"])
    return rows


def decoding(folder):
    """The parts of a section on linear decoding: table, seeds and figures; none without results."""
    path = folder / "results.json"
    if not path.exists():
        return []
    seeds = files.read_json(path).get("seeds", [])
    text = f"Splits and linear classifiers of {len(seeds)} seeds: {', '.join(map(str, seeds))}."
    return [accuracies(path), text, *sorted(folder.glob("accuracies*.png"))]


def sections(results):
    """The sections of the page, as report_page.write takes them."""
    table, commits = trainings(results)
    code = f"Code: commit {', '.join(commits)}." if commits else "The commit of the code is unknown."
    curves = [path for name in TRAININGS if (path := results / name / "training_curve.png").exists()]
    page = [("Trainings", [table, code, *curves] if len(table) > 1 else [])]
    for name, title in DECODINGS.items():
        page.append((title, decoding(results / f"decoding-{name}")))
    for name, title in FIGURES.items():
        page.append((title, sorted((results / name).glob("*.png"))))
    table = imagenet(results)
    page.append(("ImageNet", [table] if len(table) > 1 else []))
    page.append(("Films of a feature and of a class", sorted((results / "films").glob("*.mp4"))))
    return [
        (title, parts or ["No results: its data was not given, or its step has not ended."]) for title, parts in page
    ]


def main(argv=None):
    args = parse_args(argv)
    if not args.results.is_dir():
        raise UserError(f"there is no folder {args.results}; give the output folder of reproduce.sh")
    page = sections(args.results)
    report_page.write(args.results, "The paper, reproduced", page)


if __name__ == "__main__":
    cli.run(main)
