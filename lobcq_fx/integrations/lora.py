"""PEFT's LoRA on packed linears: the adapters are trained, the base stays in LO-BCQ.

It is imported while PEFT is, so that what needs the whole of PEFT is imported when it is called.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, cast

from peft.tuners.lora.config import LoraConfig
from torch import nn

from lobcq_fx.errors import LobcqError
from lobcq_fx.modules.lobcq_convolution import LobcqConvolution
from lobcq_fx.modules.lobcq_linear import LobcqLinear


def _adapted(base: LobcqLinear, adapter_name: str, **settings: Any) -> Any:
    """What PEFT puts around a packed linear.

    Raises:
        LobcqError: adapters that read or change the base's weight.
    """
    from peft.tuners.lora.layer import Linear

    class LobcqLora(Linear):
        """`base(x)` and what the adapters add."""

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            return base.in_features, base.out_features  # PEFT warns of kinds of layers that it does not know

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Refused."""
            raise LobcqError(
                "adapters are not merged into packed weights. Remedy: keep them beside the base, or merge them into the"
                " float model and quantize that"
            )

    if isinstance(base, LobcqConvolution):
        raise LobcqError("adapters are not made for packed convolutions. Remedy: leave them out of target_modules")
    config = settings["config"]
    if config.use_dora or config.init_lora_weights not in (True, False, "gaussian"):
        raise LobcqError(
            f"use_dora={config.use_dora}, init_lora_weights={config.init_lora_weights!r} read the float weight, which a"
            " packed linear does not have. Remedy: plain LoRA"
        )
    return LobcqLora(base, adapter_name, **settings)


_post_init = LoraConfig.__post_init__


@wraps(_post_init)
def _with_packed_linears(self: LoraConfig) -> None:
    _post_init(self)
    self._register_custom_module({LobcqLinear: cast("Any", _adapted)})  # it is called as a class is


LoraConfig.__post_init__ = _with_packed_linears  # type: ignore[method-assign]
