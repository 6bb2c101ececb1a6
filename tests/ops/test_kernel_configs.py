"""Launch configurations are pure functions."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from hypothesis import given
from hypothesis import strategies as st
from slicefine_kernels import tuned
from slicefine_kernels.configs import (
    MAX_TILE,
    GradConfig,
    grad_config,
    tile_class,
    token_splits,
    workspace_floats,
    workspace_tickets,
)


@given(st.integers(0, 20_000), st.integers(0, 20_000), st.sampled_from([2, 4]))
def test_tiles_are_powers_of_two_that_tl_dot_takes(R, K, size):
    config = grad_config(R, K, size, "sm_90")
    for block in (config.BLOCK_R, config.BLOCK_K, config.BLOCK_T):
        assert block >= 16 and block & (block - 1) == 0
    assert config.BLOCK_R * config.BLOCK_K <= MAX_TILE and config == grad_config(
        R, K, size, "sm_90"
    )


@given(
    st.integers(0, 10**6),
    st.integers(1, 1000),
    st.integers(1, 200),
    st.sampled_from([32, 64]),
)
def test_splits_cover_the_tokens_and_fit_the_workspace(tokens, tiles, processors, block_t):
    splits, each = token_splits(tokens, tiles, processors, block_t)
    assert (
        splits >= 1
        and each % block_t == 0
        and splits * each >= tokens > (splits - 1) * each - (tokens == 0)
    )
    if splits > 1:
        assert each >= 4 * block_t  # enough work for each
        assert tiles * splits * MAX_TILE <= workspace_floats(
            processors
        ) and tiles <= workspace_tickets(processors)


def test_a_measured_configuration_comes_before_the_default(monkeypatch):
    default = grad_config(4096, 16, 2, "sm_90")
    monkeypatch.setitem(
        tuned.GRAD, ("sm_90", *tile_class(4096, 16, 2)), (64, 16, 128, 8, 4)
    )
    assert grad_config(4096, 16, 2, "sm_90") == GradConfig(64, 16, 128, 8, 4) != default
    assert grad_config(4096, 16, 2, "sm_80") == default  # of another architecture
    assert grad_config(16, 4096, 2, "sm_90") != grad_config(4096, 16, 2, "sm_90")
