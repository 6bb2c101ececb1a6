"""What slicefine needs of Hugging Face transformers."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def conv1d(out_features: int, in_features: int) -> nn.Module:
    """An empty Conv1D, transformers' linear layer with weight (in, out), on the meta device."""
    with torch.device("meta"):
        return Conv1D(out_features, in_features)
