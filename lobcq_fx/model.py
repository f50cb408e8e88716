"""QuantizedModel: what `quantize` returns, called as the model was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import LobcqError
from lobcq_fx.graph.prepacked_calls import Refusal
from lobcq_fx.graph.run_on_zeros import run_on_zeros
from lobcq_fx.inventory import Inventory
from lobcq_fx.kernels.bind import rows_to_warm, weight_layout
from lobcq_fx.modules.packed_weight import WeightLayout
from lobcq_fx.ops.schemas import NO_GRADIENT
from lobcq_fx.passes.lowering import lower
from lobcq_fx.passes.prepack import Prepack, restore_weights, weights_as_stored
from lobcq_fx.passes.retarget_device import RetargetDevice
from lobcq_fx.storage.checkpoint import save_checkpoint
from lobcq_fx.tracing.autocast import without_autocast
from lobcq_fx.tracing.calling import CallingConvention
from lobcq_fx.tracing.trace import TracedModel

GRAPH = "graph_module."


class QuantizedModel(nn.Module):
    """A model whose matmuls run in LO-BCQ. Inference only.

    graph_module: the FX graph that runs, flat tensors in and out; it can be compiled on its own. Where the device's
        kernels want weights in a layout of their own, it holds them in that layout.
    stored_graph: the same graph on weights as they are stored, whatever the device: what `save_pretrained` writes.
    calling: how a call of the model becomes a call of the graph.
    variants: other graphs of the model on the same tensors, for calls of another kind, by name.
    refused_variants: why there is no such graph, by name.
    lobcq_config: the settings it was quantized with.
    inventory: every matmul, what became of it, and why.
    config: the Hugging Face configuration, None for other modules.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        calling: CallingConvention,
        lobcq_config: LobcqConfig,
        inventory: Inventory,
        config: Any = None,
    ) -> None:
        super().__init__()
        self.config = config
        self._assemble(graph_module, calling, lobcq_config, inventory)

    def _assemble(
        self,
        graph_module: fx.GraphModule,
        calling: CallingConvention,
        lobcq_config: LobcqConfig,
        inventory: Inventory,
        variants: Mapping[str, TracedModel] | None = None,
        refused_variants: Mapping[str, str] | None = None,
    ) -> None:
        self.graph_module = graph_module
        self.stored_graph = graph_module.graph
        self.calling = calling
        self.variants = dict(variants or {})
        self.stored_variants = {name: variant.graph_module.graph for name, variant in self.variants.items()}
        self.refused_variants = dict(refused_variants or {})
        self.lobcq_config = lobcq_config
        self.inventory = inventory
        # State dicts carry the float model's names: `model.norm.weight`, `...q_proj.weight.codes`.
        self.register_state_dict_post_hook(_strip_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)
        graph_module.eval()
        for variant in self.variants.values():
            variant.graph_module.training = False
        self.training = False
        self._prepack()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on a call of the original model; returns what that returned. Autocast changes nothing in it.

        Raises:
            CallError: the traced graph cannot serve the call.
            LobcqError: an input requires a gradient.
        """
        graph_module, calling = self._serving(args, kwargs)
        inputs = calling.flatten(args, kwargs)
        if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
            raise LobcqError(NO_GRADIENT)
        outputs = without_autocast(graph_module, inputs)
        return calling.unflatten(outputs, args, kwargs)

    def _serving(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[fx.GraphModule, CallingConvention]:
        """The graph that serves a call."""
        return self.graph_module, self.calling

    def _graphs(self) -> list[tuple[fx.GraphModule, fx.Graph]]:
        """Every graph module, each with its graph on stored weights."""
        others = [(variant.graph_module, self.stored_variants[name]) for name, variant in self.variants.items()]
        return [(self.graph_module, self.stored_graph), *others]

    def _prepack(self) -> None:
        """Where the device has kernels of its own, run graphs that are lowered to them."""
        layout = weight_layout(self.device)
        if layout is not None:
            self._lower(layout, self.device)

    def _lower(self, layout: WeightLayout, device: torch.device) -> tuple[Refusal, ...]:
        """Run copies of the stored graphs that are lowered to a device's kernels; what its passes left alone."""
        graph_modules = []
        for graph_module, stored_graph in self._graphs():
            graph = fx.Graph()
            graph.output(graph.graph_copy(stored_graph, {}))
            graph_module.graph = graph
            graph_modules.append(graph_module)
        stored = frozenset[str]().union(*(weights_as_stored(graph_module.graph) for graph_module in graph_modules))
        return lower(graph_modules, Prepack(layout, stored), device)

    def warmup(self, max_rows: int = 2048) -> None:
        """Compile the kernels of every linear, so that no request pays for it. CPUs' kernels are compiled already.

        Each distinct linear runs once, on zeros, for each number of rows that has kernels of its own. What
        torch.compile makes of the rest of the graph is compiled by a call.

        Args:
            max_rows: tokens of the largest call, batch times length.
        """
        for rows in rows_to_warm(self.device, max_rows):
            run_on_zeros([graph_module for graph_module, _ in self._graphs()], rows)

    def _restore(self) -> None:
        """Run the stored graphs on stored weights again."""
        restore_weights(self.graph_module)
        for graph_module, stored_graph in self._graphs():
            graph_module.graph = stored_graph

    def save_pretrained(self, directory: str | Path, tokenizer: Any = None) -> None:
        """Write a folder that `lobcq_fx.load` opens without the float weights.

        Args:
            directory: new, empty, or a folder written by this method, which is replaced as a whole.
            tokenizer: saved beside the weights if given.

        Raises:
            CheckpointError: the folder holds something else, or the written files do not read back equal.
            OSError: the disk is full or not writable; an existing folder stays as it was.
        """
        save_checkpoint(self, Path(directory), tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        first: Tensor = next(iter(self.graph_module.state_dict().values()))
        return first.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters that stayed in float."""
        return next((p.dtype for p in self.graph_module.parameters() if p.dtype.is_floating_point), torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> QuantizedModel:
        """Move to a device.

        Raises:
            LobcqError: asked for a dtype, which is fixed in the traced graph.
        """
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and dtype != self.dtype:
            _refuse_cast(dtype)
        if device is not None:
            super().to(device)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModel:
        """Where `.to()`, also that of a module around this one, arrives: move, but keep every dtype."""
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if moved.dtype != self.dtype:
            _refuse_cast(moved.dtype)
        leaves = moved.device != self.device
        if leaves:
            self._restore()  # the layout belongs to the device that is left
        super()._apply(lambda tensor: _keeping_dtype(fn, tensor), recurse)
        if leaves:
            for graph_module, _ in self._graphs():
                RetargetDevice(self.device)(graph_module)
            self._prepack()
        return self

    def cuda(self, device: int | torch.device | None = None) -> QuantizedModel:
        """Move to a GPU."""
        return self.to("cuda" if device is None else device)

    def cpu(self) -> QuantizedModel:
        """Move to the CPU."""
        return self.to(torch.device("cpu"))

    def half(self) -> QuantizedModel:
        """Refused unless the model is in fp16 already."""
        return self.to(torch.float16)

    def bfloat16(self) -> QuantizedModel:
        """Refused unless the model is in bf16 already."""
        return self.to(torch.bfloat16)

    def float(self) -> QuantizedModel:
        """Refused unless the model is in fp32 already."""
        return self.to(torch.float32)

    def double(self) -> QuantizedModel:
        """Refused."""
        return self.to(torch.float64)

    def train(self, mode: bool = True) -> QuantizedModel:
        """Refused: a quantized model is for inference. `eval()` changes nothing."""
        if mode:
            raise LobcqError("a quantized model is inference only: fine-tune the float model, then quantize it")
        return self

    def extra_repr(self) -> str:
        """Format, mode and how many matmuls run in it."""
        config, inventory = self.lobcq_config, self.inventory
        return f"{config.format.name}, {config.mode}, {len(inventory.quantized)} of {len(inventory.records)} matmuls"


def _refuse_cast(dtype: torch.dtype) -> NoReturn:
    raise LobcqError(f"a quantized model cannot be cast to {dtype}: cast the float model, then quantize it")


def _keeping_dtype(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """fn's result, its cast undone: a bf16 model has fp32 tensors (scales, rotary frequencies) that stay fp32."""
    out = fn(tensor)
    if out.dtype == tensor.dtype:
        return out
    return fn(tensor.reshape(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)


def _strip_prefix(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(prefix + GRAPH)]:
        state[prefix + key[len(prefix + GRAPH) :]] = state.pop(key)


def _add_prefix(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(prefix + GRAPH)]:
        state[prefix + GRAPH + key[len(prefix) :]] = state.pop(key)
