"""What users of PEFT and of transformers' adapters call beside `AdapterModel`'s own methods."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slicefine.deltas.adapters import AdapterModel
from slicefine.deltas.delta import DeltaError


class PeftNames(AdapterModel):
    """Mixed into the class of a model that has slices or loaded deltas."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "adapter_names" in kwargs:
            raise ValueError(
                "adapter_names: one batch cannot mix several deltas, which stand in the weights"
                " themselves. set_adapter(name) before the forward, or export the deltas as LoRA"
                " (slicefine.deltas.lora.to_lora), which PEFT mixes"
            )
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not a way to make slices or to add a LoRA; the error says which way is.

        Raises:
            DeltaError: always.
        """
        raise DeltaError(
            "add_adapter makes no slices: get_slice_model(model, SliceConfig(...), adapter_name)"
            " does, once for a model; load_adapter(folder, name) adds a finished delta. Any other"
            " adapter, such as a LoRA, goes onto the plain model: merge_and_unload() first"
        )

    def disable_adapters(self) -> None:
        """Take every adapter off until `enable_adapters`: transformers' way; see `disable_adapter`.

        A second call changes nothing.
        """
        register = self._adapters
        if register.disabled is None:
            names = register.active
            self._unapply_all()
            register.disabled = names

    def enable_adapters(self) -> None:
        """Apply again what `disable_adapters` took off.

        Raises:
            DeltaError: adapters were applied since, or nothing was taken off and nothing is applied.
        """
        register = self._adapters
        if register.disabled is None:
            if not register.active:
                raise DeltaError("no adapter was disabled; set_adapter(name) applies one")
            return
        if register.active:
            raise DeltaError(
                f"{', '.join(map(repr, register.active))} was applied after disable_adapters();"
                f" set_adapter({register.disabled}) applies what was disabled"
            )
        names = [name for name in register.disabled if name in self.adapters]
        self.set_adapter(names, stack=True)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Nothing to do but what the arguments ask: applied deltas stand in the weights already.

        Args:
            adapter_names: applied before, and no others; None: what is applied.
            safe_merge: check that no weight is NaN.

        Raises:
            ValueError: with ``safe_merge``, a weight is not finite.
        """
        if adapter_names is not None:
            self.set_adapter(adapter_names)
        if safe_merge:
            _check_values(self.get_base_model())

    def unmerge_adapter(self) -> None:
        """Nothing to do: outputs stay those of the applied adapters, as in PEFT. `disable_adapter`
        gives the base.
        """

    def get_base_model(self) -> nn.Module:
        """The model itself, in which the slices are. `disable_adapter` gives the base's outputs,
        `unload` the base.
        """
        model: Any = self
        return model


def _check_values(model: nn.Module) -> None:
    """Raise ValueError naming the first tensor of the state dict with NaN or an infinity."""
    for key, value in model.state_dict().items():
        wrong = isinstance(value, Tensor) and value.is_floating_point()
        if wrong and not bool(value.isfinite().all()):
            raise ValueError(f"safe_merge: {key} has values that are not finite")
