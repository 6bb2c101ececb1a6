"""Launch configurations are pure functions."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from hypothesis import given
from hypothesis import strategies as st
from slicefine_kernels.configs import grad_config, token_splits


@given(st.integers(0, 20_000), st.integers(0, 20_000), st.sampled_from([2, 4]))
def test_tiles_are_powers_of_two_that_tl_dot_takes(R, K, size):
    config = grad_config(R, K, size)
    for block in (config.BLOCK_R, config.BLOCK_K, config.BLOCK_T):
        assert block >= 16 and block & (block - 1) == 0
    assert config.BLOCK_R * config.BLOCK_K <= 64 * 64 and config == grad_config(R, K, size)


@given(st.integers(0, 10**6), st.integers(1, 1000), st.integers(1, 200))
def test_splits_leave_each_program_enough_tokens(tokens, tiles, processors):
    splits = token_splits(tokens, tiles, processors, 64)
    assert 1 <= splits <= 64 and (splits == 1 or tokens // splits >= 4 * 64)
