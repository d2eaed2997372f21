"""Combine the accuracies of several evaluations in one table, and in a short results.json.

    python scripts/demo_table.py demo/decoding/results.json demo/hog/results.json --save-dir demo

Input: results.json files of linear_decoding.py and hog_baseline.py. Output: the printed table; results.json in
--save-dir with {MODEL: {TASK: {mean, std}}, majority, chance}, accuracies from 0 to 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from moco import cli, files  # noqa: E402
from moco.analysis import accuracy  # noqa: E402


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("results", nargs="+", metavar="JSON", help="results.json of an evaluation")
    cli.shared_flags(parser, "--save-dir", "--overwrite")
    return parser.parse_args(argv)


def summarize(models):
    """Mean and spread of every model on every task, and the accuracy of guessing, from {model: {task: results}}."""
    summary = {}
    for name, by_task in models.items():
        by_task = {task: {"mean": entry["mean"], "std": entry["std"]} for task, entry in by_task.items()}
        summary["hog" if name == "HOG" else name] = by_task
    return summary | accuracy.baselines(models, accuracy.task_names(models)[0])


def main(argv=None):
    args = parse_args(argv)
    path = files.refuse_overwrite(files.make_output_dir(args.save_dir) / "results.json", args.overwrite)
    models = accuracy.read_results(args.results)
    files.write_json(path, summarize(models))
    print(accuracy.table(models))


if __name__ == "__main__":
    cli.run(main)
