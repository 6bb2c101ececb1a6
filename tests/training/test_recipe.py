"""One YAML file is one training; what it does not know is an error with the nearest name."""

from __future__ import annotations

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from slicefine.cli.app import app
from slicefine.training.arguments import arguments, check_settings, lonely_launch
from slicefine.training.data import UserError
from slicefine.training.recipe import Recipe, read_yaml, settings_of

FILE = """
model: base
task: text-classification
data: reviews.csv
output: out
lr: 1e-3
epochs: 2
slices: {r: 8, switch_interval: 0}
training:
  save_strategy: no
  lr_scheduler_type: cosine
"""


def cli(*arguments, code=0):
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_options_override_the_file_and_the_print_is_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(FILE)
    more = ("--lr", 2e-3, "--r", 4, "--set", "logging_steps=5", "--print-recipe")
    printed = cli(path, *more)
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    recipe = Recipe.load(again)
    assert (recipe.lr, recipe.epochs, recipe.model) == (2e-3, 2, "base")
    assert recipe.slices == {"r": 4, "switch_interval": 0}
    assert recipe.slice_config().switch_interval is None
    assert recipe.training == {
        "save_strategy": "no",
        "lr_scheduler_type": "cosine",
        "logging_steps": 5,
    }
    assert cli(again, "--print-recipe") == printed


def test_yaml_as_people_mean_it(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "a: 1e-3\nb: no\nc: true\nd: 1_0\ne: 1.5\nf: 3\ng: '1e-3'\nh: .5\ni: 1.2.3\n"
    )
    assert read_yaml(path) == {
        "a": 0.001,
        "b": "no",
        "c": True,
        "d": 10,
        "e": 1.5,
        "f": 3,
        "g": "1e-3",
        "h": 0.5,
        "i": "1.2.3",
    }
    path.write_text("lr: 1\nlr: 2\n")
    with pytest.raises(UserError, match="the key 'lr' stands twice"):
        read_yaml(path)
    for text in ("- a\n", "a: [\n", ""):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a\.yaml"):
            read_yaml(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"learning_rates": 1}, "no key 'learning_rates'"),
        ({"epoch": 1}, "no key 'epoch'; did you mean 'epochs'"),
        ({"slices": {"switch_intervall": 5}}, "did you mean 'switch_interval'"),
        ({"slices": {"slice_type": "diagonal"}}, "slice_type is 'diagonal'"),
        ({"lr": "fast"}, "lr is 'fast'; expected float"),
        ({"epochs": 1.5}, "epochs is 1.5; expected int"),
        ({"bf16": "yes"}, "bf16 is 'yes'; expected bool"),
        ({"batch_size": True}, "batch_size is True; expected int"),
        ({"training": [1]}, "training holds no keys"),
        ({"task": "translation"}, "expected one of text-classification"),
        ({"format": "xml"}, "format is 'xml'"),
        ({"lr": float("nan")}, "expected 0 or more"),
    ],
)
def test_what_a_recipe_refuses(content, message):
    with pytest.raises(UserError, match=message):
        Recipe.from_dict(content)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loging_steps", "has no such field; did you mean 'logging_steps'"),
        ("learning_rate", "it is called lr here"),
        ("output_dir", "it is called output here"),
        ("packing", "no such field|called packing here"),
    ],
)
def test_settings_that_are_none(name, message):
    recipe = Recipe(task="text-classification", output="out", training={name: 1})
    with pytest.raises(UserError, match=message):
        check_settings(recipe)


def test_settings_reach_the_arguments(tmp_path):
    pairs = (
        "lr_scheduler_type=cosine",
        "weight_decay=1e-2",
        "logging_steps=5",
        "report_to=[]",
    )
    recipe = Recipe(
        task="text-classification",
        output=str(tmp_path),
        device="cpu",
        training=settings_of(pairs),
    )
    made = arguments(recipe)
    assert made.lr_scheduler_type == "cosine" and made.weight_decay == 0.01
    assert made.logging_steps == 5 and made.learning_rate == recipe.lr
    with pytest.raises(UserError, match="expected NAME=VALUE"):
        settings_of(["logging_steps"])
    wrong = Recipe(
        task="text-classification",
        output=str(tmp_path),
        device="cpu",
        training={"lr_scheduler_type": "sinus"},
    )
    with pytest.raises(UserError, match="TrainingArguments refuses these settings"):
        arguments(wrong)


def test_errors_of_the_command(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(FILE.replace("epochs", "epoch"))
    assert "did you mean 'epochs'" in cli(path, code=2)
    assert "cannot be read" in cli(tmp_path / "no.yaml", code=2)
    assert "no model: give --model" in cli("--task", "causal-lm", code=2)
    assert "expected NAME=VALUE" in cli("--set", "a", code=2)


def test_the_help_is_short_and_names_what_there_is():
    printed = cli("--help")
    for name in ("--set", "--print-recipe", "--eval-data", "--resume", "--early-stopping"):
        assert name in printed
    assert len(printed.splitlines()) < 110


def test_a_launch_of_several_processes_that_started_one_is_named():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    def environment(*options):
        parser = launch_command_parser()
        asked = parser.parse_args([*options, "--mixed_precision", "no", "script.py"])
        return prepare_simple_launcher_cmd_env(_validate_launch_command(asked)[0])[1]

    alone = environment("--cpu", "--num_processes", "2")
    assert "accelerate launch --multi_gpu --num_processes 2" in lonely_launch(alone)
    assert lonely_launch({**alone, "PMI_SIZE": "2"}) is None
    assert lonely_launch(environment("--cpu", "--num_processes", "1")) is None
    assert lonely_launch({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}) is None
