"""A page of results: tables, figures and films, as report.md and as report.html, a single file."""

import base64
import html

from moco import files

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left } td + td, th + th { text-align: right } th { border-bottom: 2px solid #888 }
img { max-width: 100% } video { min-width: 20rem } figure { margin: 1.5rem 0 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
"""


def write(folder, heading, page):
    """Write report.md and report.html into folder, and print where they are.

    page: [(title, parts)]. A part is a paragraph (str), a table (list of rows of str), or the Path of a figure or film
    in folder.
    """
    files.write_text(folder / "report.md", as_markdown(folder, heading, page))
    files.write_text(folder / "report.html", as_html(heading, page))
    print(f"page: {folder / 'report.html'} and report.md")


def as_markdown(folder, heading, page):
    """The page in Markdown, with figures and films by their paths relative to folder."""
    lines = [f"# {heading}", ""]
    for title, parts in page:
        lines += [f"## {title}", ""]
        for part in parts:
            if isinstance(part, str):
                lines.append(part)
            elif isinstance(part, list):
                rows = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in part]
                lines += [rows[0], "|---" * len(part[0]) + "|", *rows[1:]]
            else:
                path = part.relative_to(folder).as_posix()
                lines.append(f"{'!' if part.suffix == '.png' else ''}[{part.stem}](<{path}>)")
            lines.append("")
    return "\n".join(lines)


def as_html(heading, page):
    """The page in HTML, with figures and films embedded."""
    lines = [f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{heading}</title>"]
    lines += [f"<style>{STYLE}</style></head><body><h1>{heading}</h1>"]
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
                content = base64.b64encode(part.read_bytes()).decode()
                name = html.escape(f"{part.parent.name}/{part.stem}", quote=True)
                shown = f"<img alt='{name}' src='data:image/png;base64,{content}'>"
                if part.suffix == ".mp4":
                    shown = f"<video controls src='data:video/mp4;base64,{content}'></video>"
                lines.append(f"<figure>{shown}<figcaption>{name}</figcaption></figure>")
    return "\n".join([*lines, "</body></html>\n"])
