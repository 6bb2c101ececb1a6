"""Bytes and operations of an op, as kernels/README.md has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from slicefine.backends import reference

ROOT = Path(__file__).parents[2]


def test_roofline_formulas_are_the_readmes():
    """The columns "bytes" and "flops" of kernels/README.md, evaluated; products are written without
    a sign there.
    """
    table = [
        line.strip("|").split("|")
        for line in (ROOT / "kernels" / "README.md").read_text().splitlines()
        if line[:1] == "|"
    ]
    head = [cell.strip() for cell in table[0]]
    formulas = {
        row[0].strip().strip("`"): dict(zip(head, map(str.strip, row), strict=True))
        for row in table
        if row[0].strip().strip("`") in roofline.OPS
    }
    assert formulas.keys() == set(roofline.OPS)
    values = {"n": 1000, "R": 77, "K": 16, "e": 2}

    def value(formula):
        product = re.sub(r"(?<=[\w)])\s+(?=[\w(])", " * ", formula)
        return eval(product, {}, values)

    for op, row in formulas.items():
        assert roofline.op_bytes(op, *values.values()) == value(row["bytes"])
        assert roofline.op_flops(op, *list(values.values())[:3]) == value(row["flops"])
    with FlopCounterMode(display=False) as counter:
        reference.slice_grad(torch.randn(50, 12), torch.randn(50, 7))
    assert counter.get_total_flops() == roofline.op_flops("slice_grad", 50, 12, 7)
    with pytest.raises(ValueError, match="no op 'slice'"):
        roofline.op_bytes("slice", 1, 1, 1, 1)
