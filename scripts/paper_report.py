"""Write one page of what reproduce.sh has found: every table and figure, the published values beside those measured.

    python scripts/paper_report.py reproduction

In: the folder of the results, whole or half done. Out, in the same folder: report.md, and report.html, which holds its
pictures and can be mailed. It reads what the scripts wrote and computes nothing anew.
"""

import base64
import html
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from moco import cli, files  # noqa: E402
from moco.analysis import accuracy  # noqa: E402

TRAININGS = ["TC-S", "TC-A", "TC-Y", "TC-SAY", "moco_img-S", "moco_temp-S"]
TRAININGS += ["TC-S-1-fps", "TC-S-half-length", "TC-S-no-augmentation"]
READOUTS = {
    "labeled_S": "Labeled S, random halves (Figure 3)",
    "labeled_S-subsampled": "Labeled S, a tenth of the frames (Figure 3)",
    "labeled_S-binary": "Four pairs of classes (Figure 4a)",
    "variants": "Frame rate, length of an episode, augmentation (Figure 5)",
    "toybox": "Toybox, random halves and unseen exemplars (Figure 3)",
}
PUBLISHED_ON_IMAGENET = "TC-SAY/resnext50_32x4d_"  # the network of the published accuracies: trained on all children
IMAGENET = {  # folder -> what it is, its published top-1 in %
    "imagenet-linear": ("frozen network, new head", 36.0),
    "imagenet-part": ("whole network, a share of the images", None),
    "imagenet-part-linear": ("the same, then frozen with a new head", 45.6),
}
FIGURES = {  # folder -> what its pictures show
    "maps-class-only": "Where the evidence for a class is, in pictures of it (Figure 6)",
    "maps-others": "The same in pictures of other classes (Figure 6)",
    "selectivities": "Selectivity by layer, and variance that principal components explain (Figures 7a and A1)",
    "top_images": "Images that selective units answer to most (Figures 7b and A5)",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left } td + td, th + th { text-align: right } th { border-bottom: 2px solid #888 }
img { max-width: 100% } video { min-width: 20rem } figure { margin: 1.5rem 0 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
"""


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("results", type=Path, metavar="FOLDER", help="folder that reproduce.sh writes its results to")
    return parser.parse_args(argv)


def log(folder):
    """The records that a trainer has written; none where it has not begun."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def training(folder):
    """A training's line of the table, None before its first epoch has ended; and the commit of its code."""
    flags = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    epochs = [line for line in log(folder) if "step" not in line]
    if not epochs:
        return None, flags["commit"]
    # An epoch that was continued after its last step has no speed.
    seconds = sum(line["images"] / line["images_per_second"] for line in epochs if line["images_per_second"])
    cells = [folder.name, flags.get("model") or flags.get("arch") or "-", f"{epochs[-1]['images']}"]
    cells += [f"{len(epochs)} of {flags['epochs']}", f"{seconds / 60:.1f}", f"{epochs[-1]['loss']:.2f}"]
    return [*cells, f"{epochs[-1]['acc1']:.1f}"], flags["commit"]


def trainings(results):
    """The table of trainings, and the commits of the code they were made with."""
    rows, commits = [], set()
    for name in TRAININGS:
        if (results / name / "log.jsonl").exists():
            row, commit = training(results / name)
            commits |= {commit} - {None}
            rows += [row] if row else []
    head = ["network", "architecture", "images an epoch", "epochs", "minutes", "loss", "top-1 %"]
    return [head, *rows], sorted(commits)


def accuracies(path):
    """The table of a results.json: a model a row, a task a column, mean and spread, and the published value beside."""
    (_, *tasks), *rows = accuracy.cells(accuracy.read_results([path]))
    return [["top-1 %, mean ± sd", *tasks], *rows]


def trunk(results, name):
    """The checkpoint, below results, whose trunk the ImageNet run of that name began with, itself or the run before."""
    start = Path(json.loads((results / name / "args.json").read_text(encoding="utf-8"))["model_path"])
    return trunk(results, start.parent.name) if start.parent.name in IMAGENET else f"{start.parent.name}/{start.name}"


def imagenet(results):
    """The table of ImageNet: protocol, network, measured top-1 and top-5 of the last epoch, published top-1."""
    rows = [["protocol", "network", "top-1 %", "top-5 %", "published top-1 %"]]
    for name, (what, known) in IMAGENET.items():
        if found := [line for line in log(results / name) if "val_acc1" in line]:
            last, images = found[-1], (results / name / "train_list.txt").read_text(encoding="utf-8").split("\n")
            is_imagenet = len({image.partition("/")[0] for image in images} - {""}) == 1000
            start = trunk(results, name)
            shown = f"{known}" if known and is_imagenet and start.startswith(PUBLISHED_ON_IMAGENET) else "-"
            rows.append([what, start, f"{last['val_acc1']:.1f}", f"{last['val_acc5']:.1f}", shown])
    return rows


def sections(results):
    """The page as a list of (title, [parts]): a part is a line of text, a table (list of rows) or a Path of a file."""
    table, commits = trainings(results)
    made = f"Code: commit {', '.join(commits)}." if commits else "The code's commit is unknown."
    curves = [path for name in TRAININGS if (path := results / name / "training_curve.png").exists()]
    found = [("Trainings", [table, made, *curves] if len(table) > 1 else [])]
    for name, title in READOUTS.items():
        path, parts = results / f"decoding-{name}" / "results.json", []
        if path.exists():
            seeds = json.loads(path.read_text(encoding="utf-8"))["seeds"]
            parts = [accuracies(path), f"Splits and readouts of {len(seeds)} seeds: {', '.join(map(str, seeds))}."]
            parts += sorted(path.parent.glob("accuracies*.png"))
        found.append((title, parts))
    for name, title in FIGURES.items():
        found.append((title, sorted((results / name).glob("*.png"))))
    table = imagenet(results)
    found.append(("ImageNet", [table] if len(table) > 1 else []))
    found.append(("Films of a feature and of a class", sorted((results / "films").glob("*.mp4"))))
    return [
        (title, parts or ["Left out: no data was given for it, or its step has not ended yet."])
        for title, parts in found
    ]


def as_markdown(page, results):
    """The page in Markdown, which refers to its pictures and films by their paths in results."""
    lines = ["# The paper, reproduced", ""]
    for title, parts in page:
        lines += [f"## {title}", ""]
        for part in parts:
            if isinstance(part, str):
                lines.append(part)
            elif isinstance(part, list):
                rows = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in part]
                lines += [rows[0], "|---" * len(part[0]) + "|", *rows[1:]]
            else:
                path = part.relative_to(results).as_posix()
                lines.append(f"{'!' if part.suffix == '.png' else ''}[{part.stem}](<{path}>)")
            lines.append("")
    return "\n".join(lines)


def as_html(page):
    """The page in HTML, with its pictures and films in it."""
    lines = ["<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>The paper, reproduced</title>"]
    lines += [f"<style>{STYLE}</style></head><body><h1>The paper, reproduced</h1>"]
    for title, parts in page:
        lines.append(f"<h2>{html.escape(title)}</h2>")
        for part in parts:
            if isinstance(part, str):
                lines.append(f"<p>{html.escape(part)}</p>")
            elif isinstance(part, list):
                tags = ["th"] + ["td"] * (len(part) - 1)
                rows = [
                    "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
                    for tag, row in zip(tags, part, strict=True)
                ]
                lines.append(f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
            else:
                data = base64.b64encode(part.read_bytes()).decode()
                name = html.escape(f"{part.parent.name}/{part.stem}", quote=True)
                shown = f"<img alt='{name}' src='data:image/png;base64,{data}'>"
                if part.suffix == ".mp4":
                    shown = f"<video controls src='data:video/mp4;base64,{data}'></video>"
                lines.append(f"<figure>{shown}<figcaption>{name}</figcaption></figure>")
    return "\n".join([*lines, "</body></html>\n"])


def main(argv=None):
    args = parse_args(argv)
    if not args.results.is_dir():
        raise cli.UserError(f"there is no folder {args.results}; give the one that reproduce.sh writes to")
    page = sections(args.results)
    files.write_text(args.results / "report.md", as_markdown(page, args.results))
    files.write_text(args.results / "report.html", as_html(page))
    print(f"written: {args.results / 'report.html'} and report.md")


if __name__ == "__main__":
    cli.run(main)
