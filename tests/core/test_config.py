"""SliceConfig: validation, JSON both ways, unknown keys."""

from __future__ import annotations

import pytest

from slicefine import SliceConfig


def test_json_round_trip(tmp_path):
    config = SliceConfig(
        r=5,
        slice_type="block",
        r_out=3,
        switch_interval=None,
        target_modules=["q", "v"],
        rank_pattern={"q": 2},
        contiguous=False,
    )
    assert SliceConfig.from_json(config.to_json()) == config
    config.save(tmp_path / "config.json")
    assert SliceConfig.load(tmp_path / "config.json") == config


def test_unknown_keys_warn_and_name_the_nearest():
    with pytest.warns(
        UserWarning,
        match=r"no key 'switch_intervall' \(did you mean 'switch_interval'\?\); it is ignored",
    ):
        assert SliceConfig.from_dict({"r": 3, "switch_intervall": 9}) == SliceConfig(r=3)


def test_sets_become_sorted_lists():
    assert SliceConfig(target_modules={"v", "q"}).target_modules == ["q", "v"]


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"r": 0}, ValueError, "r is 0; expected at least 1"),
        ({"r": 2.5}, TypeError, "r is 2.5; expected an integer"),
        ({"r": True}, TypeError, "r is True"),
        ({"slice_type": "rows"}, ValueError, "slice_type is 'rows'; expected one of"),
        ({"switch_mode": "up"}, ValueError, "switch_mode is 'up'"),
        ({"state_on_switch": "forget"}, ValueError, "state_on_switch is 'forget'"),
        ({"switch_interval": 0}, ValueError, "or None for a slice that stays"),
        ({"start_position": -1}, ValueError, "expected 0 or more"),
        ({"seed": "a"}, TypeError, "seed is 'a'"),
        ({"contiguous": 1}, TypeError, "expected True or False"),
        ({"r_out": 4}, ValueError, "only a block slice has a height"),
        ({"rank_pattern": {"q": 0}}, ValueError, "rank_pattern['q'] is 0"),
        ({"target_modules": "("}, ValueError, "not a regular expression"),
        ({"target_modules": 3}, TypeError, "expected a list of module names"),
        ({"modules_to_save": "classifier"}, TypeError, "expected a list of module names"),
        (
            {"target_modules": "q", "layers_to_transform": [1]},
            ValueError,
            "cannot be used when target_modules is 'q'",
        ),
        (
            {"layers_to_transform": [1]},
            ValueError,
            "cannot be used when target_modules is 'all-linear'",
        ),
        (
            {"target_modules": ["q"], "layers_to_transform": "1"},
            TypeError,
            "expected a layer number",
        ),
        ({"rank_pattern": ["q"]}, TypeError, "expected a dict"),
        ({"rank_pattern": {"(": 3}}, ValueError, "rank_pattern has '('"),
        (
            {"target_modules": ["q"], "layers_pattern": "h"},
            ValueError,
            "without layers_to_transform",
        ),
        ({"bias": "some"}, ValueError, "bias is 'some'"),
        ({"tied_weights": "merge"}, ValueError, "tied_weights is 'merge'"),
    ],
)
def test_bad_values_are_named(values, kind, message):
    with pytest.raises(kind) as error:
        SliceConfig(**values)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["[1]", '"r"'])
def test_json_that_is_no_object(text):
    with pytest.raises(TypeError, match="in JSON is an object"):
        SliceConfig.from_json(text)
