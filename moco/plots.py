"""Pictures for the eye and the page: curves, bars, confusion matrices, grids. Every figure is a PDF and a PNG."""

from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moco import files

# Okabe and Ito's colours, which colour-blind eyes can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "pdf.fonttype": 42,  # text stays text in the PDF
    "figure.constrained_layout.use": True,
}


@contextmanager
def _figure(path, width, height):
    """A Figure of width x height inches; written to path as .pdf and .png, whole or not at all, at the end."""
    path = Path(path)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        yield figure
        for ending, metadata in ((".pdf", {"CreationDate": None}), (".png", None)):
            with files.whole(path.with_name(path.name + ending)) as part:
                figure.savefig(part, dpi=150, metadata=metadata)


def training_curve(records, path):
    """Loss and top-1 accuracy by epoch, to path + '.pdf' and '.png'.

    records: one dict an epoch with 'epoch' and, where they are known, 'loss', 'acc1' and 'val_acc1' (%).
    """
    with _figure(path, 7, 2.8) as figure:
        loss, accuracy = figure.subplots(1, 2)
        _line(loss, records, "loss", COLOURS[0], "training")
        _line(accuracy, records, "acc1", COLOURS[0], "training")
        _line(accuracy, records, "val_acc1", COLOURS[1], "test")
        loss.set(xlabel="epoch", ylabel="cross-entropy loss")
        loss.set_ylim(0, 1.05 * loss.get_ylim()[1])
        accuracy.set(xlabel="epoch", ylabel="top-1 accuracy (%)", ylim=(0, 100))
        if len(accuracy.lines) > 1:
            accuracy.legend(loc="best")
        for axes in (loss, accuracy):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(axis="y", color="0.9")


def _line(axes, records, key, colour, label):
    known = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
    if known:
        axes.plot(*np.transpose(known), color=colour, label=label, marker="o", markersize=3, clip_on=False)
