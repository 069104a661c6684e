"""A page of markdown, and the same as one HTML file that holds its pictures and opens without a server.

A template is rendered twice: with tables as markdown writes them, and with places in which tables as HTML are put after the
rest is converted. Text of records is escaped in both; in the HTML no script but the page's own can run either.
"""

import base64
import hashlib
import html
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mte_bench.files import write_text
from reports.markdown import Table, code, fence, plain_text

TEMPLATES = Path(__file__).parent / "templates"
FILTERED = 16  # rows from which a table has a field that filters it
WRAPPED = 24  # characters from which a line in a cell of words may be broken

_INLINE = re.compile(r"\\(?P<kept>\W|_)|`(?P<code>[^`]*)`|\*\*(?P<bold>.+?)\*\*|\[(?P<text>[^\]]*)\]\((?P<link>[^)]*)\)|\n")
_PLACE = re.compile(r'<div data-table="(\d+)"></div>')


def write_page(template: str, values: dict[str, Any], path: Path, refresh: int | None = None) -> None:
    """Render ``template`` with ``values`` (tables as ``Table``) to ``path``, a ``.md``, and to the ``.html`` beside it.

    Pictures must be there. With ``refresh`` a browser loads the HTML again every so many seconds.
    """
    tables: list[Table] = []

    def place(table: Table) -> str:
        tables.append(table)
        return f'<div data-table="{len(tables) - 1}"></div>'

    write_text(path, _render(template, values, Table.markdown))
    body = _render(template, values, place)
    write_text(path.with_suffix(".html"), _html(body, tables, path.parent, refresh))


def _render(template: str, values: dict[str, Any], table: Callable[[Table], str]) -> str:
    functions = {"table": table, "code": code, "fence": fence, "text": plain_text}
    return str(_templates().get_template(template).render(values | functions))


@cache
def _templates() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _html(text: str, tables: Sequence[Table], folder: Path, refresh: int | None) -> str:
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark")
    markdown.add_render_rule("image", _image)
    tokens = markdown.parse(text)
    headings, taken = [], Counter[str]()
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            title = "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
            anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")  # as GitHub makes it
            taken[anchor] += 1
            anchor += f"-{taken[anchor] - 1}" if taken[anchor] > 1 else ""
            opening.attrSet("id", anchor)
            headings.append((opening.tag, anchor, title))
    body = markdown.renderer.render(tokens, markdown.options, {"folder": folder})
    body = _PLACE.sub(lambda place: table_html(tables[int(place[1])]), body)
    style, script = ((TEMPLATES / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return _render(
        "page.html.j2",
        {
            "title": html.escape(next((title for tag, _, title in headings if tag == "h1"), "")),
            "sections": [(anchor, html.escape(title)) for tag, anchor, title in headings if tag == "h2"],
            "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            "style": style,
            "script": script,
            "refresh": refresh,
            "body": body,
        },
        table_html,
    )


def _image(renderer: Any, tokens: Any, index: int, options: Any, env: dict[str, Any]) -> str:
    token = tokens[index]
    token.attrSet("src", _inlined(env["folder"] / unquote(token.attrGet("src"))))
    return str(renderer.image(tokens, index, options, env))


def _inlined(path: Path) -> str:
    """A picture as a ``data:`` URL."""
    kind = {".jpg": "jpeg", ".svg": "svg+xml"}.get(path.suffix.lower(), path.suffix[1:].lower())
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def table_html(table: Table) -> str:
    """The table as HTML: its head sorts, long ones can be filtered, wide ones scroll by themselves."""
    sides = [f' class="{_width(table, column) if side == "l" else "r"}"' for column, side in enumerate(table.align)]
    head = "".join(
        f'<th scope="col"{side}><button type="button">{inline_html(title)}</button></th>'
        for side, title in zip(sides, table.columns, strict=True)
    )
    rows = (
        "<tr>" + "".join(f"<td{side}>{inline_html(cell)}</td>" for side, cell in zip(sides, row, strict=True)) + "</tr>"
        for row in table.rows
    )
    field = '<input type="search" placeholder="filter" aria-label="filter the rows">\n' if len(table.rows) >= FILTERED else ""
    lines = "\n".join(rows)
    return f'{field}<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>'


def _width(table: Table, column: int) -> str:
    """``s`` for a column of short texts, which are not broken, else ``w``."""
    lines = (re.sub(r"\]\([^)]*\)", "", line) for row in table.rows for line in row[column].split("\n"))  # without addresses
    longest = max(map(len, lines), default=0)
    return "s" if longest < WRAPPED else "w"


def inline_html(cell: str) -> str:
    """A table's cell from markdown to HTML: escapes, code, bold, links and line breaks, which is all that cells have."""
    parts, end = [], 0
    for found in _INLINE.finditer(cell):
        parts += [_escaped(cell[end : found.start()]), _inline(found)]
        end = found.end()
    return "".join(parts) + _escaped(cell[end:])


def _inline(found: re.Match[str]) -> str:
    if found["kept"]:
        return _escaped(found["kept"])
    if found["code"] is not None:
        return f"<code>{html.escape(found['code'])}</code>"
    if found["bold"]:
        return f"<strong>{inline_html(found['bold'])}</strong>"
    if found["link"] is not None:
        return f'<a href="{_escaped(found["link"])}">{inline_html(found["text"])}</a>'
    return "<br>"


def _escaped(text: str) -> str:
    return html.escape(html.unescape(text)) if "&" in text else html.escape(text)
