"""Show the results in some folders on one page: curves, accuracies beside published ones, pictures and films.

    python scripts/report.py TC decoding maps films --out report.html

Input: output folders of the scripts, in the order of the page; a folder without results is listed as such. Output: one
HTML file that contains all it shows. Accuracies are printed, too.
"""

import base64
import html
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from moco import cli, files, plots  # noqa: E402
from moco.analysis import accuracy  # noqa: E402
from moco.cli import UserError  # noqa: E402

TITLES = {  # of the folders of reproduce.sh
    "decoding-labeled_S": "Labeled S, random images (Figure 3)",
    "decoding-labeled_S-subsampled": "Labeled S, a tenth of the frames (Figure 3)",
    "decoding-labeled_S-binary": "Four pairs of classes (Figure 4a)",
    "decoding-variants": "Frame rate, episode length, augmentation (Figure 5)",
    "decoding-toybox": "Toybox, random images and unseen exemplars (Figure 3)",
    "maps-class-only": "Class activation maps in images of the class (Figure 6)",
    "maps-others": "Class activation maps in images of other classes (Figure 6)",
    "selectivities": "Selectivity by layer, and variance explained by principal components (Figures 7a and A1)",
    "top_images": "Images that activate selective units most (Figures 7b and A5)",
    "imagenet-linear": "ImageNet: frozen network, new head",
    "imagenet-part": "ImageNet: whole network, part of the images",
    "imagenet-part-linear": "ImageNet: whole network, part of the images; then frozen with a new head",
}
PUBLISHED_NETWORK = "TC-SAY/resnext50_32x4d_"  # of the published accuracies on ImageNet, top-1 in %:
PUBLISHED_LINEAR, PUBLISHED_PART_LINEAR = 36.0, 45.6  # frozen; or first trained on a hundredth of the images
IMAGES = "train_list.txt"  # those that imagenet_finetuning.py trained on
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left } td + td, th + th { text-align: right } th { border-bottom: 2px solid #888 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc } p, figcaption { color: #666; font-size: .85rem }
figure { display: inline-block; vertical-align: top; margin: .5rem 1rem .5rem 0; max-width: 100% }
img { max-width: 100% } video { min-width: 20rem }
"""


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="output folder of a script")
    parser.add_argument("--out", type=Path, default="report.html", metavar="HTML", help="the page")
    cli.shared_flags(parser, "--overwrite", help="replace an existing page")
    return parser.parse_args(argv)


def contents(folder):
    """What is in a folder of results: paragraphs (str), tables (lists of rows of str), Paths of pictures and films."""
    parts, record = [], read_record(folder)
    if epochs := [line for line in read_log(folder) if "step" not in line]:
        parts.append(training_table(folder, record, epochs))
    if (folder / "results.json").exists():
        models = accuracy.read_results([folder / "results.json"])
        print(f"{folder}\n{accuracy.table(models)}")
        parts.append([["top-1 %, mean ± sd", *accuracy.task_names(models)], *accuracy.cells(models)[1:]])
        seeds = files.read_json(folder / "results.json").get("seeds", [])
        parts.append(f"Splits and linear classifiers of {len(seeds)} seeds: {', '.join(map(str, seeds))}.")
    parts += [path for ending in ("png", "mp4") for path in sorted(folder.glob(f"*.{ending}"))]
    if parts and record:
        parts.insert(0, f"{record.get('script', 'Code')}: commit {record.get('commit') or 'unknown'}.")
    return parts or ["No results: its data was not given, or its step has not ended."]


def read_record(folder):
    """The content of args.json in a folder; empty if it is missing or damaged."""
    try:
        return files.read_json(folder / "args.json")
    except UserError as error:
        if folder.exists():
            print(f"warning: {error}", file=sys.stderr)
        return {}


def read_log(folder):
    """The records in the log of a trainer's folder; none if there is no log. A line that is damaged is skipped."""
    path = folder / "log.jsonl"
    records = []
    for number, line in enumerate(files.read_text(path).splitlines() if path.exists() else [], 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # also of the last line, if it is being written or a kill cut it off
            print(f"warning: line {number} of {path} is damaged and skipped", file=sys.stderr)
    return records


def training_table(folder, record, epochs):
    """The table of a training: its network, how far it is, and the metrics of its last epoch."""
    # An epoch that was resumed after its last step has no speed.
    seconds = sum(each["images"] / each["images_per_second"] for each in epochs if each.get("images_per_second"))
    cells = {
        "network": record.get("model") or record.get("arch") or "-",
        "images per epoch": f"{epochs[-1].get('images', '-')}",
        "epochs": f"{len(epochs)} of {record.get('epochs', '?')}",
        "minutes": f"{seconds / 60:.1f}",
    }
    for key, value in epochs[-1].items():
        if key not in plots.NOT_METRICS and value is not None:
            name = plots.METRIC_LABELS.get(key.removeprefix("val_"), key)
            cells["test " * key.startswith("val_") + name] = f"{value:.2f}" if "loss" in key else f"{value:.1f}"
    if (folder / IMAGES).exists():
        cells["network"], cells["published top-1 (%)"] = on_imagenet(folder, record)
    return [list(cells), list(cells.values())]


def on_imagenet(folder, record):
    """(the checkpoint that an ImageNet run started from, directly or through another such run; the published top-1).

    A dash where there is none, as for networks and images other than the published ones.
    """
    path, published = Path(record.get("model_path") or "-"), PUBLISHED_LINEAR
    before = folder.parent / path.parent.name  # both may have been moved
    if (before / IMAGES).exists():
        path, published = Path(read_record(before).get("model_path") or "-"), PUBLISHED_PART_LINEAR
    start = "/".join(path.parts[-2:])
    classes = {image.partition("/")[0] for image in files.read_list(folder / IMAGES)}
    is_published = record.get("freeze_trunk") and len(classes) == 1000 and start.startswith(PUBLISHED_NETWORK)
    return start, f"{published}" if is_published else "-"


def as_html(heading, page):
    """A page [(title, parts)], parts as contents() gives them, in HTML with its pictures and films in it."""
    lines = [f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(heading)}</title>"]
    lines += [f"<style>{STYLE}</style></head><body><h1>{html.escape(heading)}</h1>"]
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
                content, name = part.read_bytes(), html.escape(part.stem, quote=True)
                data = base64.b64encode(content).decode()
                if part.suffix == ".mp4":
                    shown = f"<video controls src='data:video/mp4;base64,{data}'></video>"
                else:
                    width = int.from_bytes(content[16:20]) * 96 // 150  # as in the PDF: a PNG has 150 pixels per inch
                    shown = f"<img alt='{name}' width='{width}' src='data:image/png;base64,{data}'>"
                lines.append(f"<figure>{shown}<figcaption>{name}</figcaption></figure>")
    return "\n".join([*lines, "</body></html>\n"])


def main(argv=None):
    args = parse_args(argv)
    files.refuse_overwrite(args.out, args.overwrite)
    if not any(folder.is_dir() for folder in args.folders):
        raise UserError(f"there is no folder {args.folders[0]}; give the output folders of scripts")
    page = [(TITLES.get(folder.name, folder.name), contents(folder)) for folder in args.folders]
    files.write_text(args.out, as_html(args.out.resolve().parent.name, page))
    print(f"page: {args.out}")


if __name__ == "__main__":
    cli.run(main)
