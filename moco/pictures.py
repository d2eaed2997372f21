"""Figures of images: grids and rows, with captions. Each is written as a PDF and a PNG."""

import itertools
import textwrap

from moco import plots


def image_grid(images, captions, path, title, legend):
    """Images (N, H, W, 3), 12 a row, to path + '.pdf' and '.png'.

    images: uint8, or floats from 0 to 1. captions: (true, predicted) class of each, written below it; if they differ,
    the predicted class has an arrow and another color. A predicted class of None is not written. legend: below title.
    """
    columns = min(12, len(images))
    rows = -(-len(images) // columns)
    width = max(columns, 3)
    legend = textwrap.wrap(legend, 20 * width)
    head = 0.33 + 0.13 * len(legend)
    with plots.page(path, width, 1.28 * rows + head) as axes:
        axes.text(width / 2, 0.17, plots.legible(title), ha="center", va="center", fontsize=10)
        axes.text(width / 2, 0.3, "\n".join(legend), ha="center", va="top", fontsize=7, color="0.3")
        for number, (image, (true, predicted)) in enumerate(zip(images, captions, strict=True)):
            left, top = number % columns, 1.28 * (number // columns) + head
            axes.imshow(image, extent=(left + 0.03, left + 0.97, top + 0.94, top), aspect="auto")
            axes.text(left + 0.5, top + 0.97, true, ha="center", va="top", fontsize=6)
            if predicted is not None:
                text, color = (predicted, plots.COLORS[0]) if true == predicted else (f"→ {predicted}", plots.COLORS[5])
                axes.text(left + 0.5, top + 1.08, text, ha="center", va="top", fontsize=6, color=color)


def image_rows(rows, path, title):
    """Rows of images, each with lines of text on its left, to path + '.pdf' and '.png'.

    rows: [(lines, images, captions)], images (H, W, 3) uint8, captions below them; rows may differ in length.
    """
    margin, head, height = 1.4, 0.33, 1.04 + 0.13 * any(captions for _, _, captions in rows)
    columns = max(len(images) for _, images, _ in rows)
    width = max(margin + 1.02 * columns, 0.3 + 0.075 * len(title))
    with plots.page(path, width, head + height * len(rows)) as axes:
        axes.text(0.04, 0.17, plots.legible(title), va="center", fontsize=10)
        for number, (lines, images, captions) in enumerate(rows):
            top = head + height * number + 0.04
            axes.text(0.04, top + 0.48, "\n".join(lines), va="center", fontsize=8, linespacing=1.5)
            for column, (image, caption) in enumerate(itertools.zip_longest(images, captions, fillvalue="")):
                left = margin + 1.02 * column
                axes.imshow(image, extent=(left, left + 0.96, top + 0.96, top), aspect="auto")
                axes.text(left + 0.48, top + 0.99, caption, ha="center", va="top", fontsize=6)
