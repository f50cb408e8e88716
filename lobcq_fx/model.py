"""QuantizedModel: what `quantize` returns, called as the model was."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, fx, nn

from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import LobcqError
from lobcq_fx.graph.bound_forward import BoundForward
from lobcq_fx.graph.graph_module import copied, ensure_code, hold
from lobcq_fx.graph.run_on_zeros import run_on_zeros
from lobcq_fx.inventory import Inventory
from lobcq_fx.kernels.bind import rows_to_warm, weight_layout
from lobcq_fx.model_card import ModelCard
from lobcq_fx.modules.not_pickled import NotPickled
from lobcq_fx.modules.packed_weight import WeightLayout
from lobcq_fx.ops.schemas import NO_GRADIENT
from lobcq_fx.passes.order import GUARDS, lower
from lobcq_fx.passes.prepack import Prepack, restore_weights, weights_as_stored
from lobcq_fx.passes.retarget_device import RetargetDevice
from lobcq_fx.refusal import Refusal
from lobcq_fx.storage.checkpoint import Checkpoint, StoredGraph, saved_folder
from lobcq_fx.storage.keywords import check_keywords
from lobcq_fx.tracing.autocast import without_autocast
from lobcq_fx.tracing.calling import CallingConvention
from lobcq_fx.tracing.trace import MAIN, TracedModel

GRAPH = "graph_module."


@dataclass(frozen=True)
class ModelGraph:
    """One graph of a model.

    graph_module: what runs, flat tensors in and out. Where the device's kernels want weights in a layout of their own,
        it reads them in that layout.
    stored: the same graph on weights as they are stored, whatever the device: what is saved, exported and lowered.
    calling: how a call of the model becomes a call of the graph.
    """

    graph_module: fx.GraphModule
    stored: fx.Graph
    calling: CallingConvention


@dataclass(frozen=True)
class ModelParts:
    """What a quantized model is built of, by `quantize` or from a folder.

    graphs: emitted, all on the same tensors, by name. refused_graphs: why there is no such graph, by name.
    config, generation_config: of Hugging Face, None for other modules.
    """

    graphs: Mapping[str, TracedModel]
    refused_graphs: Mapping[str, str]
    lobcq_config: LobcqConfig
    inventory: Inventory
    config: Any = None
    generation_config: Any = None

    def checkpoint(self) -> Checkpoint:
        """What a folder holds of them."""
        root = self.graphs[MAIN].graph_module
        graphs = {name: StoredGraph(one.graph_module.graph, one.calling.to_dict()) for name, one in self.graphs.items()}
        config = saved_config(self.config, dtype_of(root))
        return Checkpoint(root, graphs, self.refused_graphs, self.lobcq_config, self.inventory, config)


class Reader(Protocol):
    """What a model needs of its front end (`lobcq_fx.frontends`)."""

    def read(self, saved: Checkpoint, directory: Path) -> ModelParts:
        """The parts of the model that a folder holds."""


class QuantizedModel(NotPickled):
    """A model whose matmuls run in LO-BCQ. Inference only.

    graphs: all on the same tensors, by name; `MAIN` serves every call that no other one is made for.
    refused_graphs: why there is no such graph, by name.
    lobcq_config: the settings it was quantized with.
    inventory: every matmul, what became of it, and why; and what the passes for this device left as it was.
    config: the Hugging Face configuration, None for other modules.
    """

    def __init__(
        self,
        front_end: Reader,
        parts: ModelParts,
    ) -> None:
        super().__init__(*self._base_arguments(parts))
        self.config = parts.config
        self.front_end = front_end
        self.graphs = {
            name: ModelGraph(one.graph_module, one.graph_module.graph, one.calling)
            for name, one in parts.graphs.items()
        }
        self.refused_graphs = dict(parts.refused_graphs)
        self.lobcq_config = parts.lobcq_config
        self.inventory = parts.inventory
        self.graph_module = parts.graphs[MAIN].graph_module  # the owner of every tensor
        # State dicts carry the float model's names: `model.norm.weight`, `...q_proj.weight.codes`.
        self.register_state_dict_post_hook(_strip_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.register_load_state_dict_post_hook(QuantizedModel._forget_bound)
        self.graph_module.eval()
        for graph in self.graphs.values():
            graph.graph_module.training = False
        self.training = False
        self._prepack()

    def _base_arguments(self, parts: ModelParts) -> tuple[Any, ...]:
        """Of the next class's constructor."""
        return ()

    @property
    def stored_graph(self) -> fx.Graph:
        """The main graph on weights as they are stored."""
        return self.graphs[MAIN].stored

    @property
    def calling(self) -> CallingConvention:
        """How a call of the model becomes a call of the main graph."""
        return self.graphs[MAIN].calling

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on a call of the original model; returns what that returned. Autocast changes nothing in it.

        Raises:
            CallError: the traced graph cannot serve the call.
            LobcqError: an input requires a gradient.
        """
        return self._call(self._serving(args, kwargs), args, kwargs)

    def _call(self, graph: ModelGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What one of the graphs makes of a call; raises as `forward`."""
        inputs = graph.calling.flatten(args, kwargs)
        if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
            raise LobcqError(NO_GRADIENT)
        outputs = without_autocast(self._runner(graph.graph_module), inputs)
        return graph.calling.unflatten(outputs, args, kwargs)

    def _runner(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """What runs a graph: the module itself where it has hooks, and where torch.compile wants its parameters."""
        if torch.compiler.is_compiling() or graph_module._forward_hooks or graph_module._forward_pre_hooks:
            return graph_module
        bound = self._bound.get(graph_module)
        if bound is None or not bound.serves(graph_module):
            bound = self._bound[graph_module] = BoundForward(graph_module)
        return bound

    def _forget_bound(self, *_: Any) -> None:
        """Tensors may be others from here on."""
        self._bound: dict[fx.GraphModule, BoundForward] = {}

    def _serving(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelGraph:
        """The graph that serves a call."""
        return self.graphs[MAIN]

    def _prepack(self) -> None:
        """Where the device has kernels of its own, run graphs that are lowered to them; guarded ones in any case."""
        self._forget_bound()
        layout = weight_layout(self.device)
        if layout is not None:
            self.inventory = replace(self.inventory, refusals=self._lower(layout, self.device))
        else:
            self._copy_graphs()
            for one in self.graphs.values():
                for guard in GUARDS:
                    guard(one.graph_module)
        for one in self.graphs.values():
            ensure_code(one.graph_module)

    def _copy_graphs(self) -> None:
        """Run copies of the stored graphs."""
        for one in self.graphs.values():
            hold(one.graph_module, copied(one.stored))

    def _lower(self, layout: WeightLayout, device: torch.device) -> tuple[Refusal, ...]:
        """Run copies of the stored graphs that are lowered to a device's kernels; what its passes left alone."""
        self._copy_graphs()
        stored = frozenset[str]().union(*(weights_as_stored(one.stored) for one in self.graphs.values()))
        return lower([one.graph_module for one in self.graphs.values()], Prepack(layout, stored), device)

    def warmup(self, max_rows: int = 2048) -> None:
        """Compile the kernels of every linear, so that no request pays for it. CPUs' kernels are compiled already.

        Each distinct linear runs once, on zeros, for each number of rows that has kernels of its own. What
        torch.compile makes of the rest of the graph is compiled by a call.

        Args:
            max_rows: tokens of the largest call, batch times length.
        """
        for rows in rows_to_warm(self.device, max_rows):
            run_on_zeros([graph.graph_module for graph in self.graphs.values()], rows)

    def _restore(self) -> None:
        """Run the stored graphs on stored weights again."""
        self._forget_bound()
        restore_weights(self.graph_module)
        for one in self.graphs.values():
            hold(one.graph_module, one.stored)
        self.inventory = replace(self.inventory, refusals=())

    def save_pretrained(
        self,
        directory: str | Path,
        tokenizer: Any = None,
        *,
        max_shard_size: int | str | None = None,
        **keywords: Any,
    ) -> None:
        """Write a folder that `lobcq_fx.load` opens without the float weights.

        Args:
            directory: new, empty, or a folder written by this method, which is replaced as a whole. Files of others
                in it stay, a README.md that is not this method's among them.
            tokenizer: saved beside the weights if given.
            max_shard_size: of a file of weights, in bytes or as "5GB"; larger ones are split as transformers does it.
                None means transformers' own default, 50 GB.
            **keywords: Hugging Face's, where they change nothing here: `push_to_hub=False`, but not `True`.

        Raises:
            CheckpointError: the folder holds something else, the written files do not read back equal, or a keyword
                asks for something else.
            ConfigError: `max_shard_size` is no size.
            OSError: the disk is full or not writable; an existing folder stays as it was.
        """
        check_keywords(keywords)
        saved = self.checkpoint()
        card = ModelCard(self.inventory, self.lobcq_config, saved.config, Path(directory))
        others = (getattr(self, "generation_config", None), tokenizer)
        companions = [card, *(one for one in others if one is not None)]
        with saved_folder(saved, Path(directory), companions, max_shard_size) as (folder, found):
            self.front_end.read(found, folder)  # what cannot be loaded is not left behind

    def checkpoint(self) -> Checkpoint:
        """What a folder holds of the model."""
        graphs = {name: StoredGraph(one.stored, one.calling.to_dict()) for name, one in self.graphs.items()}
        config = saved_config(self.config, self.dtype)
        return Checkpoint(self.graph_module, graphs, self.refused_graphs, self.lobcq_config, self.inventory, config)

    @property
    def device(self) -> torch.device:
        """Where the weights are: where the first tensor is. A state dict would unpack every weight for it."""
        tensors = (
            tensor
            for module in self.graph_module.modules()
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        )
        return next(tensors).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters that stayed in float, of most scalars where they are of several."""
        return dtype_of(self.graph_module)

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
        self._forget_bound()
        if leaves:
            for graph in self.graphs.values():
                RetargetDevice(self.device)(graph.graph_module)
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


def dtype_of(root: nn.Module) -> torch.dtype:
    """Floating-point type of most of the parameters that stayed in float: routers, for example, may be in another."""
    sizes = Counter[torch.dtype]()
    for one in root.parameters():
        if one.dtype.is_floating_point:
            sizes[one.dtype] += one.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def saved_config(config: Any, dtype: torch.dtype) -> dict[str, Any] | None:
    """A Hugging Face configuration as it is saved.

    A model that was cast after it was made has another dtype there, which `from_pretrained` would read.
    """
    if config is None:
        return None
    return {**json.loads(config.to_json_string(use_diff=False)), "dtype": str(dtype).removeprefix("torch.")}


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
