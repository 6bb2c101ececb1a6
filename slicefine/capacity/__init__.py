"""Capacity of small updates: how many answers a few weights can correct, and patches that do it.

Source: Sohn et al., Fine-Tuning Capacity, UAI 2024, arXiv 2408.00359. Slices and LoRA are not in
that paper, so theirs is measured.
"""

from slicefine.capacity.bounds import Bounds, ftc_bounds, three_layers_pay
from slicefine.capacity.curves import Point, ftc_curve, smallest
from slicefine.capacity.linearized import Prediction, predict_sizes, verdict
from slicefine.capacity.patching import EditReport, Patch, edit_report, load_patch, patch
from slicefine.capacity.samples import Samples
from slicefine.capacity.side import AdditiveSide, exact_side

__all__ = [
    "AdditiveSide",
    "Bounds",
    "EditReport",
    "Patch",
    "Point",
    "Prediction",
    "Samples",
    "edit_report",
    "exact_side",
    "ftc_bounds",
    "ftc_curve",
    "load_patch",
    "patch",
    "predict_sizes",
    "smallest",
    "three_layers_pay",
    "verdict",
]
