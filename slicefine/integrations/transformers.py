"""What slicefine needs of Hugging Face transformers."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from slicefine.fused import refuse_fused_head
from slicefine.layer import SliceLayer
from slicefine.optim import SliceAdamW, load_slice_state_dict, slice_state_dict


class SliceCallback(transformers.TrainerCallback):
    """Optional callback of Trainer, for logs and for checkpoints with an optimizer other than
    SliceAdamW.

    Every log gains ``slice_coverage`` (share of the sliced weights' entries that has trained, 0 to
    1), ``slice_moves`` (of the layer that moved most often) and ``slice_grad_norm`` (of all trained
    parameters at the last optimizer step, after clipping). SliceAdamW's checkpoints hold the
    slices; for Trainer's own optimizers they are written beside them (slices.pt) and read back on
    resume. Training needs no callback.

    Args:
        resume_from: the checkpoint that ``trainer.train(resume_from_checkpoint=...)`` is given,
            which Trainer does not tell its callbacks. Without it the checkpoint is looked for in
            ``args.resume_from_checkpoint`` and in ``output_dir``.
    """

    FILE = "slices.pt"

    def __init__(self, resume_from: str | os.PathLike[str] | None = None) -> None:
        self.resume_from = resume_from
        self._norm: torch.Tensor | None = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Restore the slices of a resumed run whose optimizer does not hold them.

        Raises:
            ValueError: if the checkpoint that is resumed from has none, or the loss reads the
                weight of a sliced head without calling it.
        """
        for module in model.modules():
            refuse_fused_head(module)
        layers = [m for m in model.modules() if isinstance(m, SliceLayer)]
        if not layers:
            warnings.warn(
                "SliceCallback: the model has no slices; call get_slice_model(model, ...) first",
                stacklevel=2,
            )
        if not layers or not state.global_step or _holds_slices(optimizer):
            return
        path = self._saved(args, state)
        # weights_only: a checkpoint may be anybody's file, and a pickle can run code
        load_slice_state_dict(
            model, torch.load(path, map_location="cpu", weights_only=True)
        )

    def _saved(self, args: Any, state: Any) -> Path:
        given = [self.resume_from, args.resume_from_checkpoint]
        folders = [Path(f) for f in given if isinstance(f, str | os.PathLike)]
        folders = folders or [_checkpoint(args, state)]
        for folder in folders:
            if (folder / self.FILE).is_file():
                return folder / self.FILE
        raise ValueError(
            f"the run goes on at step {state.global_step:,d}, and {folders[0]} has no {self.FILE}"
            " with its slices: they would start anew, and the delta would be of a base that nobody"
            " has. Give the checkpoint that is resumed from as SliceCallback(resume_from=...); one"
            " written without SliceCallback can be resumed with SliceAdamW only"
        )

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        gradients = [
            p.grad
            for p in model.parameters()
            # a DTensor's norm is a collective, which all processes would have to enter together
            if p.requires_grad and type(p.grad) is torch.Tensor
        ]
        self._norm = torch.nn.utils.get_total_norm(gradients) if gradients else None

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        logs: Any = None,
        **_: Any,
    ) -> None:
        layers = (
            [m for m in model.modules() if isinstance(m, SliceLayer)]
            if model is not None
            else []
        )
        if not layers or logs is None:
            return
        sizes = [(m.out_features * m.in_features, m.schedule.coverage()) for m in layers]
        extra = {
            "slice_coverage": sum(n * share for n, share in sizes)
            / sum(n for n, _ in sizes),
            "slice_moves": max(m.schedule.moves for m in layers),
        }
        if self._norm is not None:
            extra["slice_grad_norm"] = float(self._norm)
        logs.update(extra)
        if state.log_history:
            # Trainer has written its copy of ``logs`` already
            state.log_history[-1].update(extra)

    def on_save(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        if _holds_slices(optimizer) or not state.is_world_process_zero:
            return
        folder = _checkpoint(args, state)
        if folder.is_dir():
            # A process that dies while it saves leaves no half file under the name that resuming
            # looks for.
            temporary = folder / (self.FILE + ".tmp")
            torch.save(slice_state_dict(model), temporary)
            os.replace(temporary, folder / self.FILE)


def _holds_slices(optimizer: Any) -> bool:
    """Whether the optimizer's own state holds the slices; Accelerate wraps it."""
    return isinstance(getattr(optimizer, "optimizer", optimizer), SliceAdamW)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
