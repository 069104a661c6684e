"""The HTML of a report, in a real browser: it works alone, sorts, says what pictures show, and lets no record run a script."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from browser import browse
from made_up import SCENES, build_runs, evaluation, subject
from mte_bench.records import Protocol
from reports.markdown import Table, code, plain_text
from reports.page import _html, inline_html, table_html
from reports.report import write_report

NASTY = "<img src=x onerror=\"console.error('run')\"><script>console.error('run')</script>`*|_ [a](javascript:alert(1))"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of runs with everything, of which one record holds what must not come alive."""
    root = tmp_path_factory.mktemp("page")
    build_runs(root / "runs")
    who = subject(method=NASTY, recipe=NASTY, recipe_hash=None, checkpoint=NASTY)
    protocol = Protocol(name="knn`<b>", settings={})
    evaluation(root / "runs" / "nasty", "knn", who, 0.5, {**SCENES, "source": f"imagefolder:{NASTY}"}, protocol=protocol)
    for number, command in enumerate(("```", f"</code></pre>{NASTY}")):
        evaluation(root / "runs" / f"nasty-{number}", "linear", who, 0.5, command=command)
    return write_report([root / "runs"], root / "report").page.with_suffix(".html")


LOOK = """
(() => {
  const frame = document.querySelector(".table");
  const heads = [...frame.querySelectorAll("th")];
  const column = heads.findIndex((head) => head.innerText.includes("ours"));
  const shown = () => [...frame.querySelectorAll("tbody tr")].map((row) => row.cells[column].innerText.split("\\n")[0]);
  const found = { orders: [shown()], states: [] };
  for (let click = 0; click < 3; click++) {
    heads[column].querySelector("button").click();
    found.orders.push(shown());
    found.states.push(heads[column].getAttribute("aria-sort"));
  }
  const field = document.querySelector("input");
  const rows = [...field.nextElementSibling.querySelectorAll("tbody tr")];
  const visible = () => rows.filter((row) => row.offsetParent !== null).length;
  found.rows = [visible()];
  field.value = "random linear";
  field.dispatchEvent(new Event("input"));
  found.rows.push(visible());
  found.pictures = [...document.images].map((image) => [image.alt, image.naturalWidth, image.src.slice(0, 15)]);
  found.foreign = document.querySelectorAll("main script, main b, [onerror], a[href^='javascript']").length;
  found.wide = document.documentElement.scrollWidth - window.innerWidth;
  found.scrolls = [...document.querySelectorAll(".table")].some((table) => table.scrollWidth > table.clientWidth);
  found.ground = getComputedStyle(document.body).backgroundColor;
  found.links = [...document.querySelectorAll("nav a")].map((link) => document.getElementById(link.hash.slice(1)) !== null);
  return found;
})()
"""


def test_the_page_sorts_filters_and_shows_its_pictures(page):
    found = browse(page, LOOK)
    first, falling, rising, again = found["orders"]
    values = sorted((float(text) for text in first if text != "–"), reverse=True)
    missing = ["–"] * first.count("–")
    assert len(values) >= 3
    assert [float(text) for text in falling if text != "–"] == values and falling == [*falling[: len(values)], *missing]
    assert [float(text) for text in rising if text != "–"] == values[::-1] and rising == [*rising[: len(values)], *missing]
    assert again == first and found["states"] == ["descending", "ascending", None]
    assert found["rows"][0] > found["rows"][1] > 0
    assert len(found["pictures"]) >= 7
    assert all(alt and width > 0 and source == "data:image/png;" for alt, width, source in found["pictures"])
    assert found["links"] and all(found["links"])


def test_nothing_in_a_record_comes_alive(page):
    assert browse(page, LOOK)["foreign"] == 0


def test_narrow_and_dark_screens(page):
    light, dark = browse(page, LOOK, width=1200), browse(page, LOOK, width=400, scheme="dark")
    assert light["wide"] <= 0 and dark["wide"] <= 0 and dark["scrolls"]  # tables scroll, the page does not
    assert light["ground"] == "rgb(255, 255, 255)" and max(map(int, re.findall(r"\d+", dark["ground"]))) < 64


class Cells(HTMLParser):
    """The tables of a page as lists of rows, and every address that it loads from."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.addresses, self.row = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.row = []
            self.rows.append(self.row)
        if tag in ("td", "th"):
            self.row.append("")
        self.addresses += [value for name, value in attributes if name == "src" or (tag == "link" and name == "href")]

    def handle_data(self, data):
        if self.row:
            self.row[-1] += data.strip()

    def handle_endtag(self, tag):
        if tag == "table":
            self.row = None


def test_the_page_is_whole_and_says_what_the_markdown_says(tmp_path):
    build_runs(tmp_path / "runs", seeds=(0, 1))
    written = write_report([tmp_path / "runs"], tmp_path / "report")
    found = Cells(written.page.with_suffix(".html").read_text())
    assert found.addresses and all(address.startswith("data:image/") for address in found.addresses)
    lines = [line for line in written.page.read_text().splitlines() if line.startswith("|") and ":---" not in line]
    assert len(lines) == len(found.rows)
    for line, row in zip(lines, found.rows, strict=True):
        text = re.sub(r"\]\([^)]*\)|<br>|\*\*|`|\\", "", line)
        assert re.sub(r"[\s|\[\]]", "", text) == re.sub(r"[\s\[\]]", "", "".join(row))


def test_cells_from_markdown_to_html():
    assert inline_html("**45.4**\n[42.3, 48.5]") == "<strong>45.4</strong><br>[42.3, 48.5]"
    assert inline_html(plain_text("<b>`x`*y*|[z](u)</b> &amp; a_b _c_")) == ("&lt;b&gt;`x`*y*|[z](u)&lt;/b&gt; &amp;amp; a_b _c_")
    assert inline_html(code("a`<b>")) == "<code>a&#x27;&lt;b&gt;</code>"
    assert inline_html('[knn](a%20b/"record.json)') == '<a href="a%20b/&quot;record.json">knn</a>'
    table = Table(("Name", "Value"), (("a", "1"),) * 20, "lr")
    assert table_html(table).count("<tr>") == 21 and 'type="search"' in table_html(table)
    assert 'type="search"' not in table_html(Table(("Name",), (("a",),), "l"))
    assert '<td class="s">a</td>' in table_html(table) and '<td class="r">1</td>' in table_html(table)
    assert '<td class="w">' in table_html(Table(("Name",), (("a",), ("a text of more than a few words",)), "l"))


def test_refresh_reloads_and_is_not_there_otherwise(tmp_path):
    evaluation(tmp_path / "a", "knn", subject(), 0.5)
    write_report([tmp_path / "a"], tmp_path / "live", refresh=30)
    write_report([tmp_path / "a"], tmp_path / "still")
    reload = '<meta http-equiv="refresh" content="30">'
    assert reload in (tmp_path / "live" / "report.html").read_text()
    assert 'http-equiv="refresh"' not in (tmp_path / "still" / "report.html").read_text()
    assert (tmp_path / "live" / "report.md").read_bytes() == (tmp_path / "still" / "report.md").read_bytes()


def test_a_page_is_written_while_runs_come_and_ends_with_ctrl_c(tmp_path, monkeypatch, capsys):
    from reports import live
    from reports.commands import report

    (tmp_path / "runs").mkdir()
    pages = []

    def sleep(seconds):
        page = tmp_path / "out" / "report.html"
        pages.append(json.loads(page.with_suffix(".json").read_text())["records"] if page.is_file() else None)
        if len(pages) == 4:
            raise KeyboardInterrupt
        if len(pages) < 3:
            evaluation(tmp_path / "runs" / str(len(pages)), "knn", subject(seed=len(pages)), 0.5)

    monkeypatch.setattr(live, "sleep", sleep)
    report([str(tmp_path / "runs")], str(tmp_path / "out"), refresh=5)
    assert pages == [None, 1, 2, 2]
    assert "no record.json below" in capsys.readouterr().err
    assert "refresh" not in (tmp_path / "out" / "report.html").read_text().partition("<style>")[0]


def test_a_file_name_with_signs_is_found_again(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a b#1.png")
    text = _html("# Title `x`\n\n![A & B](a%20b%231.png)\n", [], tmp_path, None)
    assert 'alt="A &amp; B"' in text and "data:image/png;base64," in text and "<title>Title x</title>" in text
