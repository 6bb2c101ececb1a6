"""Rows are read as they stand, or refused with their number; nothing is mended in silence."""

from __future__ import annotations

import gzip
import json

import pytest

from slicefine.training.data import UserError, check_texts, labels_of, read_rows


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def refused(path, columns=("text", "label")):
    with pytest.raises(UserError) as error:
        read_rows(path, list(columns))
    return str(error.value)


TEN = [f"film {i},{'pos' if i % 2 else 'neg'}" for i in range(10)]


def test_a_row_of_the_wrong_length_is_refused(tmp_path):
    more = write(tmp_path, "a.csv", "text,label\na,pos\ngood film, really,pos\n")
    assert "row 2 has 3 values for 2 columns" in refused(more)
    fewer = write(tmp_path, "b.csv", "text,label,note\na,pos,x\nb,neg\n")
    assert "row 2 has 2 values for 3 columns" in refused(fewer)
    tabs = write(tmp_path, "c.tsv", "text\tlabel\na, b\tpos\n")
    assert read_rows(tabs, ["text"])[0] == {"text": "a, b", "label": "pos"}


@pytest.mark.parametrize(
    "rows",
    [
        [*TEN[:3], '"good film,pos', *TEN[3:7], 'bad" plot,neg', *TEN[7:]],
        [*TEN[:3], '"good film,pos', *TEN[3:]],
    ],
)
def test_a_quote_that_is_not_closed_is_refused(tmp_path, rows):
    path = write(tmp_path, "a.csv", "text,label\n" + "\n".join(rows))
    assert "row 4" in refused(path) and "quote" in refused(path)


def test_a_column_name_that_stands_twice_is_refused(tmp_path):
    twice = write(tmp_path, "a.csv", "text,label,label\na,pos,1\nb,neg,2\n")
    assert "the header has 'label' more than once" in refused(twice)
    keys = write(tmp_path, "a.jsonl", '{"text": "a", "label": "x", "label": "y"}\n')
    assert "line 1" in refused(keys) and "'label' stands twice" in refused(keys)


def test_a_field_may_be_long(tmp_path):
    import csv

    before = csv.field_size_limit()
    path = write(tmp_path, "a.csv", "text,label\n" + "film " * 40_000 + ",pos\n")
    assert len(read_rows(path, ["text"])[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_json_that_python_cannot_take_is_refused(tmp_path):
    deep = write(tmp_path, "a.jsonl", "[" * 5 + '{"text": ' + "[" * 100_000 + "\n")
    assert "not JSON" in refused(deep)
    long = write(tmp_path, "b.jsonl", '{"text": "a", "label": ' + "1" * 5_000 + "}\n")
    assert "line 1: not JSON" in refused(long)


def test_csv_texts_stay_as_they_are(tmp_path):
    """pandas, by which `datasets` reads CSV, makes numbers and nothing of these."""
    path = write(tmp_path, "a.csv", "text,label\nNA,1\nnull,01\n007,1.0\n")
    rows = read_rows(path, ["text", "label"])
    assert [row["text"] for row in rows] == ["NA", "null", "007"]
    assert [row["label"] for row in rows] == ["1", "01", "1.0"]


def labels(*values):
    return labels_of([{"label": value} for value in values], "label")


def test_labels_of_one_kind_in_their_order():
    assert labels(*range(11)) == [str(i) for i in range(11)]
    assert labels(*map(str, range(11))) == [str(i) for i in range(11)]
    assert labels("pos", "neg") == ["neg", "pos"]
    assert labels(True, False) == ["False", "True"]
    assert labels("01", "2", "10") == ["01", "10", "2"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 0.0, 1), "row 2.*expected a text or a whole number"),
        (("a", float("nan")), r"row 2.*not a number \(NaN\)"),
        (("a", ["x"]), "row 2.*list"),
        (("a", None), "row 2.*NoneType"),
        (("1", 1), "row 2.*write all labels in one way"),
        ((1, True), "row 2.*write all labels in one way"),
        (
            ("pos", "neg", "pos "),
            r"'pos' \(row 1\) and 'pos ' \(row 3\) differ in blanks only",
        ),
        ((0, 1, -1), "row 3.*without a label"),
        (("a", "a"), "one value only"),
    ],
)
def test_labels_that_are_not_what_they_seem(values, message):
    with pytest.raises(UserError, match=message):
        labels(*values)


def test_texts_that_are_none_are_refused():
    for value in (5, 1.5, None, ["a"], {"a": 1}, True):
        with pytest.raises(UserError, match="row 2"):
            check_texts([{"text": "a"}, {"text": value}], "text")


ROWS = [{"text": f"film {i}", "label": "pos" if i % 2 else "neg"} for i in range(6)]


def test_every_format_gives_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(str(tmp_path / "c.parquet"))
    data.save_to_disk(str(tmp_path / "d"))
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(
        str(tmp_path / "e")
    )
    (tmp_path / "f").mkdir()
    data.select(range(4)).to_parquet(str(tmp_path / "f" / "train-0.parquet"))
    data.select(range(4, 6)).to_parquet(str(tmp_path / "f" / "train-1.parquet"))
    data.select([0]).to_parquet(str(tmp_path / "f" / "test-0.parquet"))
    paths = [
        write(tmp_path, "a.json", json.dumps(ROWS)),
        write(tmp_path, "a.jsonl", lines),
        str(tmp_path / "b.jsonl.gz"),
        str(tmp_path / "c.parquet"),
        str(tmp_path / "d"),
        str(tmp_path / "e"),
        str(tmp_path / "f"),
        str(next((tmp_path / "d").glob("*.arrow"))),
        write(
            tmp_path,
            "a.csv",
            "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in ROWS),
        ),
    ]
    for path in paths:
        assert read_rows(path, ["text", "label"]) == ROWS, path


def test_a_text_file_is_a_text_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a film\r\n\n two, three\n")
    assert read_rows(str(path), ["text"]) == [{"text": "a film"}, {"text": " two, three"}]


def test_what_is_no_data_says_so(tmp_path):
    pytest.importorskip("datasets")
    assert "ends in .csv" in refused(write(tmp_path, "notes.md", "a"))
    broken = write(tmp_path, "a.parquet", "PAR1 and no more")
    assert "not readable as Parquet" in refused(broken)
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed", "a.csv", "text,label\na,b\n")
    write(tmp_path / "mixed", "b.jsonl", '{"text": "a"}\n')
    assert "files of several formats" in refused(str(tmp_path / "mixed"))
    (tmp_path / "splits").mkdir()
    write(tmp_path / "splits", "reviews.csv", "text,label\na,b\n")
    write(tmp_path / "splits", "test.csv", "text,label\na,b\n")
    assert "test.csv seems to be there for an evaluation" in refused(
        str(tmp_path / "splits")
    )
    (tmp_path / "bad.csv.gz").write_bytes(b"no gzip")
    assert "cannot be read" in refused(str(tmp_path / "bad.csv.gz"))


def test_data_of_the_hub_by_id_config_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("owner/films", ["text"]) == ROWS
    read_rows("owner/films@small:test", ["text"])
    assert asked == [
        (("owner/films",), {"split": "train"}),
        (("owner/films",), {"split": "test", "name": "small"}),
    ]


def test_images_in_folders_by_label(tmp_path):
    pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    for label in ("blue", "red"):
        (tmp_path / label).mkdir()
        for i in range(2):
            image.new("RGB", (4, 4), label).save(tmp_path / label / f"{i}.png")
    rows = read_rows(str(tmp_path), ["image", "label"])
    assert sorted(row["label"] for row in rows) == [0, 0, 1, 1]
    assert all(row["image"].size == (4, 4) for row in rows)
