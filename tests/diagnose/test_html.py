"""The HTML writer of reports: what goes in comes out escaped, ids are unique, nothing is fetched."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from slicefine.diagnose.html import Page, cell, new_figure


class Reader(HTMLParser):
    """Collects ids, links and text; a void or SVG-closed tag aside, every tag must be closed in
    order.
    """

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.text, self.open = [], [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [v for k, v in values.items() if k in ("href", "src", "xlink:href")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_with_two_figures():
    page = Page("A <title>", "under & over")
    page.heading("Section")
    page.text('a < b & "c"')
    page.table(
        [{"layer": "x<y", "share": 0.123456, "n": 12345}, {"layer": "z", "ok": True}],
        "rows",
    )
    for _ in range(2):
        figure, ax = new_figure(4, 2)
        ax.plot([0, 1], [0, 1])
        ax.imshow([[0, 1], [1, 0]])
        ax.set_title("drawn")
        page.figure(figure, "a figure")
    return page


def test_the_document_is_well_formed_and_asks_for_nothing(tmp_path):
    page_with_two_figures().write(tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert len(reader.ids) == len(set(reader.ids)) and len(reader.ids) > 10
    assert all(link.startswith(("#", "data:")) for link in reader.links)
    inside = {link[1:] for link in reader.links if link.startswith("#")} | set(
        re.findall(r"url\(#([^)]+)\)", text)
    )
    assert inside <= set(reader.ids)
    shown = " ".join(reader.text)
    for piece in (
        "A <title>",
        "under & over",
        'a < b & "c"',
        "x<y",
        "0.1235",
        "12,345",
        "yes",
        "drawn",
    ):
        assert piece in shown, piece


def test_figures_as_png(tmp_path):
    paths = page_with_two_figures().write_figures(tmp_path / "docs", "page")
    assert [path.name for path in paths] == ["page-1.png", "page-2.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_the_same_page_twice_is_the_same_bytes():
    assert page_with_two_figures().html() == page_with_two_figures().html()


def test_cells_and_levels():
    assert [cell(v) for v in (None, True, 1234, 1.0, 1e-9, [1, 2.5], "a")] == [
        "–",
        "yes",
        "1,234",
        "1",
        "1e-09",
        "1, 2.5",
        "a",
    ]
    with pytest.raises(ValueError, match="level is 1; expected 2"):
        Page("t").heading("h", 1)
