"""Show all results of the demo on one page, and print its table of accuracies.

    python scripts/demo_report.py demo

Input: the output folder of demo.sh. Output, in the same folder: report.html, a single file with all figures, and
report.md; and results.json with {MODEL: {TASK: {mean, std}}, majority, chance}, accuracies from 0 to 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from moco import cli, files  # noqa: E402
from moco.analysis import accuracy  # noqa: E402
from scripts import report_page  # noqa: E402

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


def pictures(folder):
    """The figures and films in folder."""
    return sorted(path for path in folder.glob("*") if path.suffix in (".png", ".mp4"))


def main(argv=None):
    folder = parse_args(argv).results
    models = accuracy.read_results([folder / "decoding" / "results.json"])
    files.write_json(folder / "results.json", summarize(models))
    print(accuracy.table(models))
    decoding = [accuracy.cells(models), *sorted((folder / "decoding").glob("accuracies*.png"))]
    page = [("Linear decoding: top-1 in %, mean ± standard deviation over splits", decoding)]
    page += [(title, [path for name in names for path in pictures(folder / name)]) for title, names in FIGURES.items()]
    report_page.write(folder, "The demo", page)


if __name__ == "__main__":
    cli.run(main)
