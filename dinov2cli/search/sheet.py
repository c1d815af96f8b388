"""Contact sheets: a query on the left, what was found for it beside it, as a PNG file or as one HTML page."""

import html
import os
from base64 import b64encode
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dinov2cli.errors import DataError
from dinov2cli.eval.embed import printable
from dinov2cli.files import check_folder, keep_others, marked, replacing, writing

MOST = {".png": 50, ".html": 500}
"""Queries on a sheet."""
SIDE, GAP, MARGIN, LINE = 160, 12, 16, 16
"""Pixels of the PNG: a picture's square, between two, around all, and a line of text."""
COLUMNS = 8
PAPER, INK, FAINT, NONE = (255, 255, 255), (30, 30, 30), (120, 120, 120), (225, 225, 225)


class Shown(NamedTuple):
    """A picture on a sheet: its path, uint8 [H, W, 3] or None where it cannot be read, its cosine to the query."""

    path: str
    pixels: np.ndarray | None
    score: float | None = None


class Line(NamedTuple):
    """A query and what was found for it, best first."""

    query: Shown
    found: Sequence[Shown]


def check_sheet(file: Path | None) -> None:
    """Refuse, before anything is computed, a sheet that cannot be written.

    Raises:
        DataError: another suffix.
        EnvironmentProblem: no such folder.
    """
    if file is None:
        return
    if file.suffix.lower() not in MOST:
        raise DataError(f"--sheet {file}: sheets are {' or '.join(MOST)} files; give such a name.")
    check_folder(file.parent, "--sheet")
    keep_others(file)


def write_sheet(file: Path, lines: Iterable[Line], title: str) -> None:
    """Write the lines, which are drawn one after the other; EnvironmentProblem where that fails."""
    with writing(file), replacing(file) as aside:
        if file.suffix.lower() == ".png":
            picture([draw(line) for line in lines]).save(drawn := BytesIO(), "PNG")
            aside.write_bytes(marked(drawn.getvalue()))
        else:
            with aside.open("w", encoding="utf-8") as page:
                page.write(PAGE.format(title=html.escape(title)))
                page.writelines(map(section, lines))
                page.write("</main></body></html>\n")


def picture(drawn: Sequence[Image.Image]) -> Image.Image:
    """Lines below each other, a rule between them."""
    width = max(each.width for each in drawn) + 2 * MARGIN
    whole = Image.new("RGB", (width, sum(each.height for each in drawn) + (len(drawn) + 1) * MARGIN), PAPER)
    top, pen = MARGIN, ImageDraw.Draw(whole)
    for number, each in enumerate(drawn):
        if number:
            pen.line([(MARGIN, top - MARGIN // 2), (width - MARGIN, top - MARGIN // 2)], NONE)
        whole.paste(each, (MARGIN, top))
        top += each.height + MARGIN
    return whole


def draw(line: Line) -> Image.Image:
    """The query, a rule, and rows of at most `COLUMNS` pictures, each with cosine and short path below it."""
    columns = max(1, min(COLUMNS, len(line.found)))
    rows = max(1, -(-len(line.found) // columns))
    cell, height = SIDE + GAP, SIDE + 2 * LINE + GAP
    drawn = Image.new("RGB", ((columns + 1) * cell + GAP, rows * height), PAPER)
    pen = ImageDraw.Draw(drawn)
    _draw_one(drawn, line.query, 0, 0, "query")
    pen.line([(cell, 0), (cell, drawn.height)], FAINT)
    for number, each in enumerate(line.found):
        row, column = divmod(number, columns)
        _draw_one(drawn, each, (column + 1) * cell + GAP, row * height, f"{number + 1}.  {each.score:.4f}")
    return drawn


def _draw_one(drawn: Image.Image, shown: Shown, left: int, top: int, heading: str) -> None:
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(12)
    if shown.pixels is None:
        pen.rectangle([left, top, left + SIDE - 1, top + SIDE - 1], NONE)
        pen.text((left + SIDE // 2, top + SIDE // 2), "cannot be read", FAINT, font, "mm")
    else:
        small = ImageOps.contain(Image.fromarray(shown.pixels), (SIDE, SIDE))
        drawn.paste(small, (left + (SIDE - small.width) // 2, top + (SIDE - small.height) // 2))
    pen.text((left, top + SIDE + 2), heading, INK, font)
    pen.text((left, top + SIDE + 2 + LINE), fitting(short(shown.path), SIDE, font), FAINT, font)


def short(path: str) -> str:
    """The file and the folder that it is in."""
    return printable("/".join(path.split(os.sep)[-2:]))


def fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A text whose beginning is left out where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"


def section(line: Line) -> str:
    """A line as HTML."""
    found = "".join(_figure(each, f"{number}.&ensp;{each.score:.4f}") for number, each in enumerate(line.found, 1))
    return f'<section>{_figure(line.query, "query")}<div class="found">{found}</div></section>\n'


def inlined(pixels: np.ndarray, side: int) -> str:
    """A picture as the `src` of an image of so many points, for screens of two pixels a point."""
    encoded, small = BytesIO(), Image.fromarray(pixels)
    small.thumbnail((2 * side, 2 * side), Image.Resampling.LANCZOS)
    small.convert("RGB").save(encoded, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(encoded.getvalue()).decode()}"


def _figure(shown: Shown, heading: str) -> str:
    name = html.escape(printable(shown.path), quote=True)
    if shown.pixels is None:
        inside = '<div class="none">cannot be read</div>'
    else:
        inside = f'<img alt="{name}" src="{inlined(shown.pixels, SIDE)}">'
    if os.path.isfile(shown.path):
        inside = f'<a href="{html.escape(Path(shown.path).absolute().as_uri(), quote=True)}">{inside}</a>'
    caption = f'<b>{heading}</b><br><span title="{name}">{html.escape(short(shown.path))}</span>'
    return f"<figure>{inside}<figcaption>{caption}</figcaption></figure>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="generator" content="dino2"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 13px/1.35 system-ui, sans-serif }}
body {{ margin: 1.5rem }}
h1 {{ font-size: 1.1rem; overflow-wrap: anywhere }}
section {{ display: flex; gap: 1rem; padding: .8rem 0; border-top: 1px solid #8885 }}
section > figure {{ flex: none; padding-right: 1rem; border-right: 1px solid #8888 }}
.found {{ display: flex; flex-wrap: wrap; gap: .8rem }}
figure {{ margin: 0; width: 160px }}
img, .none {{ width: 160px; height: 160px; object-fit: contain; display: block }}
.none {{ background: #8883; display: grid; place-items: center }}
figcaption span {{ opacity: .7; overflow-wrap: anywhere }}
</style></head><body><h1>{title}</h1><main>
"""
