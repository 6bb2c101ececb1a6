"""The budgets of size and density hold, and are shown."""

from __future__ import annotations

import pytest

from tests.repo import size_report
from tests.repo.size_report import CORE, EVERYTHING, LARGEST_CLASS, size_of


def test_the_budgets_are_shown_and_hold(capsys):
    """A file, function or class that outgrows its budget fails."""
    with capsys.disabled():
        print("\n" + size_report.report(), end="")
    assert size_report.largest_files()[0].size <= 600
    assert size_report.largest_functions()[0].size <= 130


def test_classes_have_few_methods():
    classes = size_report.largest_classes()
    layer = [entry for entry in classes if entry.name.endswith(f":{LARGEST_CLASS}")]
    others = [entry for entry in classes if entry not in layer]
    assert all(entry.size <= 28 for entry in layer)
    assert others[0].size <= 20, others[0]


def test_the_density_of_the_code():
    core, tests = size_report.total(CORE), size_report.total(("tests",))
    assert core.tokens_per_line <= 8.0
    assert tests.tokens_per_line <= 9.5
    assert core.comment_share >= 0.04


def test_lines_end_at_the_margin():
    everything = size_report.total(EVERYTHING)
    assert everything.long_share <= 0.02
    assert everything.format_skips <= 20


def test_modules_do_not_import_each_other_in_circles():
    assert size_report.import_circles() == []
    assert size_report.folder_circles() == []


def test_the_readme_is_a_door_and_no_manual():
    lines, pictures = size_report.readme()
    assert lines <= 120 and pictures >= 1


SAMPLE = '''\
"""A docstring is no code."""

# why
x = f"{1 + 2} and {'three'}"  # beside code


def double(value: int) -> int:
    """Nor is this one."""
    # why again
    return 2 * value
'''


def test_what_counts_as_code():
    size = size_of(SAMPLE)
    assert (size.lines, size.code_lines, size.comments) == (10, 3, 2)
    # x = "..." | def double ( value : int ) -> int : | return 2 * value
    assert size.tokens == 3 + 10 + 4


def test_a_circle_is_found(monkeypatch):
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    monkeypatch.setattr(size_report, "import_graph", lambda: graph)
    assert size_report.import_circles() == [["a", "b", "c"]]


@pytest.mark.parametrize("skip", ["# fmt: " + "skip"])
def test_a_long_line_and_a_switched_off_formatter_are_counted(skip):
    size = size_of(f"x = '{'y' * 100}'\nz = 1  {skip}\n")
    assert (size.long_lines, size.format_skips) == (1, 1)
