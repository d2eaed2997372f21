"""Figures that consist of images: grids, rows, and stages with arrows between them. Each is a PDF and a PNG."""

import numpy as np

from moco import plots


def image_grid(images, captions, path, title, columns=12):
    """Images (N, H, W, 3), 12 a row, to path + '.pdf' and '.png'.

    images: uint8, or floats from 0 to 1. captions: (true, predicted) class of each, written below it; if they differ,
    the predicted class has an arrow and another color.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width = max(columns, 3)
    names = {name for caption in captions for name in caption}
    with plots.page(path, width, 1.28 * rows + 0.3, [*names, title]) as axes:
        axes.text(width / 2, 0.17, title, ha="center", va="center", fontsize=10)
        for number, (image, (true, predicted)) in enumerate(zip(images, captions, strict=True)):
            left, top = number % columns, 1.28 * (number // columns) + 0.33
            axes.imshow(image, extent=(left + 0.03, left + 0.97, top + 0.94, top), aspect="auto")
            text, color = (predicted, plots.COLORS[0]) if true == predicted else (f"→ {predicted}", plots.COLORS[5])
            axes.text(left + 0.5, top + 0.97, true, ha="center", va="top", fontsize=6)
            axes.text(left + 0.5, top + 1.08, text, ha="center", va="top", fontsize=6, color=color)


def image_rows(rows, path):
    """Rows of images, each with lines of text on its left, to path + '.pdf' and '.png'.

    rows: [(lines, images)], images (H, W, 3) uint8; rows may differ in length.
    """
    margin = 1.4
    columns = max(len(images) for _, images in rows)
    names = {line for lines, _ in rows for line in lines}
    with plots.page(path, margin + 1.02 * columns, 1.04 * len(rows), names) as axes:
        for number, (lines, images) in enumerate(rows):
            top = 1.04 * number + 0.04
            axes.text(0.04, top + 0.48, "\n".join(lines), va="center", fontsize=8, linespacing=1.5)
            for column, image in enumerate(images):
                left = margin + 1.02 * column
                axes.imshow(image, extent=(left, left + 0.96, top + 0.96, top), aspect="auto")


def pipeline(stages, path):
    """Stages from left to right with arrows between them, to path + '.pdf' and '.png'.

    stages: [(title, images, columns)], images (H, W, 3) uint8 in a grid of columns.
    """
    height, gap = 2.6, 0.5
    widths = [_grid_width(images, columns, height) for _, images, columns in stages]
    lefts = 0.05 + np.cumsum([0, *(width + gap for width in widths)])
    with plots.page(path, lefts[-1] - gap + 0.05, height + 0.4, [title for title, *_ in stages]) as axes:
        for number, (title, images, columns) in enumerate(stages):
            left, width, middle = lefts[number], widths[number], 0.35 + height / 2
            axes.text(left + width / 2, 0.17, title, ha="center", va="center", fontsize=11)
            if number:
                arrow = dict(arrowstyle="-|>", linewidth=2, color="0.4", mutation_scale=18)
                axes.annotate("", (left - 0.06, middle), (left - gap + 0.06, middle), arrowprops=arrow)
            rows = -(-len(images) // columns)
            for i, image in enumerate(images):
                cell_width, cell_height = width / columns, height / rows
                x, y = left + i % columns * cell_width, 0.35 + i // columns * cell_height
                scale = 0.96 * min(cell_width / image.shape[1], cell_height / image.shape[0])
                w, h = scale * image.shape[1], scale * image.shape[0]
                x, y = x + (cell_width - w) / 2, y + (cell_height - h) / 2
                axes.imshow(image, extent=(x, x + w, y + h, y), aspect="auto")


def _grid_width(images, columns, height):
    """The width of a grid of images (H, W, 3) in columns that has a height."""
    rows = -(-len(images) // columns)
    return columns * max(image.shape[1] / image.shape[0] for image in images) * height / rows
