"""The report of a curation, one HTML page with all its pictures: what was dropped, beside what was kept, and why."""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2cli.curate.collection import Collection
from dinov2cli.curate.steps import AGAINST, DUPLICATE, KEPT, NOT_ALIKE, NOT_DRAWN, UNREADABLE, Curation
from dinov2cli.errors import Dino2Error
from dinov2cli.files import replacing, writing
from dinov2cli.search.sheet import inlined, short

PAIRS, GROUPS, MEMBERS, SINGLE, NAMED = 24, 6, 11, 32, 50
"""Pairs and single pictures of a heading, groups of near-duplicates and pictures of each, paths without pictures."""
SIDE = 128
"""Of a picture, in pixels of the page."""


def write_report(file: Path, state: Curation, numbers: Mapping[str, Any]) -> None:
    """Write the page; EnvironmentProblem where that fails."""
    with writing(file), replacing(file) as aside, aside.open("w", encoding="utf-8") as page:
        page.writelines(_page(state, numbers))


def _page(state: Curation, numbers: Mapping[str, Any]) -> Iterator[str]:
    name = html.escape(state.pool.name)
    yield HEAD.format(title=f"Curation of {name}")
    yield f"<h1>Curation of {name}</h1>\n<p>{numbers['kept']:,} of {numbers['images']:,} images are kept.</p>\n"
    yield from (f'<p class="warning">{html.escape(each)}</p>\n' for each in numbers["warnings"])
    steps = [
        (each["name"], f"{each['before']:,}", f"{each['before'] - each['after']:,}", f"{each['after']:,}",
         f"{each['seconds']:.1f}", _said(each["said"]))
        for each in numbers["steps"]
    ]  # fmt: skip
    yield _table(("step", "images", "dropped", "left", "seconds", ""), steps)
    if numbers["histogram"]:
        yield from _similarities(state, numbers)
    yield from _duplicates(state)
    yield from _near(state)
    yield from _alike(state)
    yield from _drawn(state)
    unreadable = np.flatnonzero(state.fate == UNREADABLE)
    if len(unreadable):
        named = "".join(f"<li>{html.escape(state.pool.path(row))}</li>" for row in unreadable[:NAMED].tolist())
        yield f"<h2>Unreadable: {len(unreadable):,}</h2>\n<ul>{named}</ul>\n"
    yield "</main></body></html>\n"


def _similarities(state: Curation, numbers: Mapping[str, Any]) -> Iterator[str]:
    lines = {} if state.request.keep_duplicates else {"near-duplicates": state.request.duplicates}
    lines |= {"evaluation sets": state.request.against_threshold} if state.request.against else {}
    yield "<h2>How similar the nearest image is</h2>\n"
    yield _bars(numbers["histogram"]["counts"], numbers["histogram"]["edges"], lines)
    if state.swept:
        rows = [(f"{each.threshold:g}", f"{each.dropped:.2%}", f"{each.largest:,}") for each in state.swept]
        yield "<p>What other thresholds of near-duplicates would do:</p>\n"
        yield _table(("cosine above", "dropped", "images of the largest group"), rows)


def _duplicates(state: Curation) -> Iterator[str]:
    rows = np.flatnonzero(state.fate == DUPLICATE)
    if not len(rows):
        return
    by_score = rows[np.argsort(state.score[rows], kind="stable")]
    apart, rng = by_score[:PAIRS], np.random.default_rng(0)
    rest = rng.permutation(by_score[PAIRS:])[:PAIRS]
    rest = rest[np.argsort(state.score[rest], kind="stable")]
    said = "Kept on the left, dropped on the right, with their cosine. Below the threshold they are linked by others."
    yield from _pairs(state, DUPLICATE, "Near-duplicates", said, {"the least alike": apart, "any": rest})
    of, counts = np.unique(state.beside[rows], return_counts=True)
    largest = of[np.argsort(-counts, kind="stable")][:GROUPS]
    yield "<h2>The largest groups of near-duplicates</h2>\n"
    for kept in largest.tolist():
        members = rows[state.beside[rows] == kept]
        figures = [_figure(state.pool, kept, "kept")]
        figures += [_figure(state.pool, row, f"{state.score[row]:.3f}") for row in members[:MEMBERS].tolist()]
        yield f'<p>{len(members) + 1:,} images:</p>\n<div class="row">{"".join(figures)}</div>\n'


def _near(state: Curation) -> Iterator[str]:
    rows = np.flatnonzero(state.fate == AGAINST)
    by_score = rows[np.argsort(-state.score[rows], kind="stable")]
    said = (
        "The image of that set on the left, dropped on the right, with their cosine. Below the threshold they are "
        "linked by other images."
    )
    groups = {"the nearest": by_score[:PAIRS], "the least near": by_score[PAIRS:][-PAIRS:]}
    yield from _pairs(state, AGAINST, "Near an evaluation set", said, groups)


def _alike(state: Curation) -> Iterator[str]:
    dropped = np.flatnonzero(state.fate == NOT_ALIKE)
    if NOT_ALIKE not in state.sets:
        return
    kept = np.flatnonzero((state.fate == KEPT) & (state.beside >= 0))
    said = "The image of the set on the left, kept for it on the right."
    groups = {"kept": np.random.default_rng(0).permutation(kept)[:PAIRS]}
    yield from _pairs(state, NOT_ALIKE, "Like the given sets", said, groups)
    yield from _some("Like the given sets: kept", state, np.flatnonzero(state.fate == KEPT))
    yield from _some("Not like the given sets: dropped", state, dropped)


def _drawn(state: Curation) -> Iterator[str]:
    if (state.fate == NOT_DRAWN).any():
        yield from _some("Drawn", state, np.flatnonzero(state.fate == KEPT))
        yield from _some("Not drawn", state, np.flatnonzero(state.fate == NOT_DRAWN))


def _some(title: str, state: Curation, rows: np.ndarray) -> Iterator[str]:
    chosen = np.sort(np.random.default_rng(0).permutation(rows)[:SINGLE])
    if len(chosen):
        figures = "".join(_figure(state.pool, row, "") for row in chosen.tolist())
        yield f'<h2>{title}, {len(chosen)} of {len(rows):,} at random</h2>\n<div class="row">{figures}</div>\n'


def _pairs(state: Curation, fate: int, name: str, said: str, groups: Mapping[str, np.ndarray]) -> Iterator[str]:
    """By heading, pairs of what an image is beside and the image."""
    for title, rows in groups.items():
        pairs = (
            f'<div class="pair">{_figure(*state.set_of(fate, int(state.beside[row])), "")}'
            f"{_figure(state.pool, row, f'{state.score[row]:.3f}')}</div>"
            for row in rows.tolist()
        )
        if len(rows):
            yield f'<h2>{name}: {title}</h2>\n<p>{said}</p>\n<div class="row">{"".join(pairs)}</div>\n'


def _figure(collection: Collection, row: int, heading: str) -> str:
    path = html.escape(collection.path(row), quote=True)
    return (
        f"<figure>{_picture(collection, row, path)}<figcaption><b>{heading}</b> "
        f'<span title="{path}">{html.escape(short(collection.path(row)))}</span></figcaption></figure>'
    )


def _picture(collection: Collection, row: int, alt: str) -> str:
    if collection.images is None:
        return '<div class="none">no picture</div>'
    try:
        pixels = collection.images.image(row)
    except Dino2Error:
        return '<div class="none">cannot be read</div>'
    return f'<img alt="{alt}" loading="lazy" src="{inlined(pixels, SIDE)}">'


def _bars(counts: Sequence[int], edges: Sequence[float], lines: Mapping[str, float]) -> str:
    """A histogram as SVG, with lines at thresholds."""
    width, height, below, low, high = 720, 160, 18 + 15 * len(lines), edges[0], edges[-1]

    def x(value: float) -> float:
        return width * (value - low) / (high - low)

    step, most = width / len(counts), max(*counts, 1)
    drawn = [
        f'<rect x="{i * step:.1f}" y="{height - height * n / most:.1f}" width="{step - 1:.1f}" '
        f'height="{height * n / most:.1f}"><title>{edges[i]:.2f} to {edges[i + 1]:.2f}: {n:,}</title></rect>'
        for i, n in enumerate(counts)
    ]
    ticks = np.arange(np.ceil(low * 10), np.floor(high * 10) + 1) / 10
    drawn += [f'<text x="{x(t):.1f}" y="{height + 13}" text-anchor="middle">{t:.1f}</text>' for t in ticks]
    for number, (name, at) in enumerate(lines.items()):
        anchor = "end" if x(at) > width / 2 else "start"
        drawn.append(f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="0" y2="{height}"/>')
        place = f'x="{x(at):.1f}" y="{height + 28 + 15 * number}" text-anchor="{anchor}"'
        drawn.append(f'<text class="line" {place}>{name}: {at:g}</text>')
    return f'<svg viewBox="-14 -4 {width + 28} {height + below + 4}" role="img">{"".join(drawn)}</svg>\n'


def _said(said: Mapping[str, Any]) -> str:
    parts = []
    for name, value in said.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{inner} {each}" for inner, each in value.items())
        elif isinstance(value, list):
            value = " / ".join(map(str, value))
        parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return "; ".join(parts)


def _table(names: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>\n"


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 0; }}
main {{ max-width: 1100px; margin: 0 auto; padding: 16px; }}
h1 {{ font-size: 22px; overflow-wrap: anywhere; }} h2 {{ font-size: 17px; margin: 28px 0 6px; }}
table {{ border-collapse: collapse; }} th, td {{ padding: 3px 12px 3px 0; text-align: right; vertical-align: top; }}
th:first-child, td:first-child, th:last-child, td:last-child {{ text-align: left; }}
.warning {{ border-left: 4px solid #c60; padding: 6px 10px; background: #fb83; }}
.row {{ display: flex; flex-wrap: wrap; gap: 10px; }}
.pair {{ display: flex; gap: 2px; padding: 3px; border: 1px solid #8886; border-radius: 4px; }}
figure {{ margin: 0; width: 128px; }}
figure img {{ width: 128px; height: 128px; object-fit: contain; background: #8882; }}
.none {{ width: 128px; height: 128px; background: #8882; color: #888;
  display: grid; place-items: center; font-size: 12px; }}
figcaption {{ font-size: 11px; overflow-wrap: anywhere; }}
svg {{ max-width: 740px; width: 100%; }} rect {{ fill: #47a; }} line {{ stroke: #c60; stroke-width: 1.5; }}
text {{ font-size: 11px; fill: currentColor; }} .line {{ fill: #c60; }}
</style></head><body><main>
"""
