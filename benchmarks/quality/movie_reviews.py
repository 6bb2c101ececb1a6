"""Real sentences from movie reviews with a sentiment, from the source distribution of
vaderSentiment (MIT).

10,605 snippets with a mean rating in [-4, 4] from twenty people (Hutto & Gilbert, ICWSM 2014).
These are the sentences of the MR benchmark: never train on one and test on MR or SST.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SDIST = "vaderSentiment==3.3.2"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
TEST, TRAIN = 2_000, 6_000


@dataclass
class Split:
    """texts and labels (0 negative, 1 positive), train and test."""

    train_texts: list[str]
    train_labels: list[int]
    test_texts: list[str]
    test_labels: list[int]


def download(folder: Path) -> Path:
    """The sdist, fetched once with pip; it needs setuptools in this environment."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob("vader*entiment-3.3.2.tar.gz"))
    if not found:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            "--dest",
            str(folder),
            SDIST,
        ]
        subprocess.run(command, check=True)
        found = sorted(folder.glob("vader*entiment-3.3.2.tar.gz"))
    return found[0]


def load(folder: Path) -> Split:
    """The binary task: |rating| >= 0.5, a fixed permutation, the first 2,000 for testing and the
    next 6,000 for training.
    """
    with tarfile.open(download(folder)) as sdist:
        inner = next(
            m for m in sdist.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz")
        )
        archive = sdist.extractfile(inner)
        assert archive is not None
        with tarfile.open(fileobj=io.BytesIO(archive.read())) as tar:
            file = tar.extractfile(MEMBER)
            assert file is not None
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t") for line in lines if line.count("\t") >= 2]
    rows = [
        (float(rating), text)
        for _, rating, text in ((r[0], r[1], r[2]) for r in rows)
        if abs(float(rating)) >= 0.5
    ]
    order = np.random.RandomState(0).permutation(len(rows))
    chosen = [rows[i] for i in order[: TEST + TRAIN]]
    texts, labels = [text for _, text in chosen], [int(rating > 0) for rating, _ in chosen]
    return Split(texts[TEST:], labels[TEST:], texts[:TEST], labels[:TEST])
