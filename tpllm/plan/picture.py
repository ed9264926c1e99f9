"""A plan as a page: one HTML file with its pictures in it."""
import html
import math
from collections.abc import Iterable
from typing import Any

from rich.filesize import decimal

from tpllm.plan.table import CANDIDATE_HEADINGS, EXCHANGE_HEADINGS, candidate_rows, exchange_rows, heading, memory_parts, speed_lines

COLORS = {"weights": "#4063d8", "keys and values": "#389826", "slots": "#9558b2", "temporaries": "#cb3c33", "free": "#e8e8e8"}
CELL, GAP, BAR_WIDTH, BAR_HEIGHT = 64, 8, 720, 40
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } h2 { margin-top: 2rem; font-size: 1.1rem } svg text { font: 12px system-ui, sans-serif }
.key { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 1rem }"""


def html_page(report: dict[str, Any]) -> str:
    """The page: the memory of a device, how the devices share the model, what they exchange, and the plan's times."""
    title, *lines = heading(report)
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in (*lines, *speed_lines(report))),
             "<h2>Memory of each device</h2>", _memory(report), "<h2>How the devices share the model</h2>", _split(report)]
    if rows := exchange_rows(report):
        parts += ["<h2>Exchanges of a program</h2>", _table(EXCHANGE_HEADINGS, rows)]
    if "candidates" in report:
        parts += ["<h2>Meshes</h2>", _table(CANDIDATE_HEADINGS, candidate_rows(report))]
    return f"<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n" \
           + "\n".join(parts) + "\n</html>\n"


def _memory(report: dict[str, Any]) -> str:
    """A bar as long as a device's memory, or as all that is asked of it where that is more."""
    parts = {name: value or 0 for name, value in memory_parts(report).items()}
    total, room = sum(max(value, 0) for value in parts.values()), report["memory"]["device_bytes"]
    left, shapes, keys = 0.0, [], []
    for name, value in parts.items():
        width, text = BAR_WIDTH * max(value, 0) / total, f"{name} {decimal(max(value, 0))}"
        shapes.append(f'<rect x="{left:.1f}" y="0" width="{width:.1f}" height="{BAR_HEIGHT}" fill="{COLORS[name]}"><title>{text}</title></rect>')
        keys.append(f'<span class="key" style="background:{COLORS[name]}"></span>{text}')
        left += width
    end = BAR_WIDTH * room / total
    shapes.append(f'<path d="M{end:.1f} 0V{BAR_HEIGHT + 6}" stroke="#000" stroke-width="2"/>'
                  f'<text x="{end:.1f}" y="{BAR_HEIGHT + 20}" text-anchor="end">{decimal(room)}</text>')
    return f'<svg width="{BAR_WIDTH + 4}" height="{BAR_HEIGHT + 24}" role="img">{"".join(shapes)}</svg>\n<p>{"".join(keys)}</p>'


def _split(report: dict[str, Any]) -> str:
    """A row of devices for each data group: a device's share of every cut matrix is its own colored part."""
    sizes = dict(part.split("=") for part in report["plan"]["mesh"].split(","))
    num_groups, width = int(sizes.pop("dp", 1)), math.prod(map(int, sizes.values()))
    cells = [_cell(group, index, width) for group in range(num_groups) for index in range(width)]
    words = f"{num_groups} data group{'s' if num_groups > 1 else ''} of {width} device{'s' if width > 1 else ''}: each group has all weights and "\
            "its own rows, each device of it the colored part of every cut matrix and of the heads"
    return f'<svg width="{width * (CELL + GAP)}" height="{num_groups * (CELL + GAP)}" role="img">{"".join(cells)}</svg>\n<p>{words}.</p>'


def _cell(group: int, index: int, width: int) -> str:
    x, y, part = index * (CELL + GAP), group * (CELL + GAP), CELL / width
    hue = 360 * index // width
    return (f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="#f4f4f4" stroke="#999"/>'
            f'<rect x="{x}" y="{y + index * part:.1f}" width="{CELL}" height="{max(part, 1):.1f}" fill="hsl({hue} 60% 55%)"/>'
            f'<text x="{x + 4}" y="{y + CELL - 4}">{group * width + index}</text>')


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in headings)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"
