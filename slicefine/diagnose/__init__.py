"""Look at a pretrained model and a little data before training: spectra, task energy, slice
tangents, winning slices, advice."""

from slicefine.diagnose.advice import Advice, advise
from slicefine.diagnose.capture import input_features, linear_layers, random_weights
from slicefine.diagnose.energy import Energy, task_energy
from slicefine.diagnose.spectra import Balance, spectral_balance
from slicefine.diagnose.survey import Options, survey
from slicefine.diagnose.tangent import (
    TangentReport,
    sample_size,
    slice_gram,
    slice_jacobian,
    slice_of,
    tangent_rank,
)
from slicefine.diagnose.trials import RangeTest, lr_range_test, short_training
from slicefine.diagnose.winning import Winning, gradient_shares, winning_report

__all__ = [
    "Advice",
    "Balance",
    "Energy",
    "Options",
    "RangeTest",
    "TangentReport",
    "Winning",
    "advise",
    "gradient_shares",
    "input_features",
    "linear_layers",
    "lr_range_test",
    "random_weights",
    "sample_size",
    "short_training",
    "slice_gram",
    "slice_jacobian",
    "slice_of",
    "spectral_balance",
    "survey",
    "tangent_rank",
    "task_energy",
    "winning_report",
]
