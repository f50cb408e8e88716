"""Packed products where transformers divides a model among ranks: each rank reads, and holds, its part of a weight.

transformers says by the name of a style how each module is divided, and has its forward divide what comes in or join
what goes out. Packed products get styles of ours, which divide the bytes of a packed weight, and leave the forward to
the style that was planned. Until they are read, the parts of a weight are `DTensor`s, of which transformers reads the
slice that this rank has, as it does for float weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import TensorParallelLayer

from lobcq_fx.errors import ConfigError
from lobcq_fx.modules.lobcq_convolution import LobcqConvolution
from lobcq_fx.modules.packed_product import PackedProduct
from lobcq_fx.modules.packed_weight import PARTS
from lobcq_fx.modules.weight_part import smallest_part

ROWS, COLUMNS, EXPERTS = -2, -1, -3
"""Dimensions of a weight [N, K], or of a stack [E, N, K]."""

READ = "_is_hf_initialized"
"""transformers' mark of the tensors that it read."""


@dataclass(frozen=True)
class Cut:
    """How a weight is divided: along `dimension`, each of `groups` equal groups for itself."""

    dimension: int
    groups: int = 1


CUTS = {
    "colwise": Cut(ROWS),
    "colwise_rep": Cut(ROWS),
    "colwise_gather_output": Cut(ROWS),
    "packed_colwise": Cut(ROWS, 2),
    "rowwise": Cut(COLUMNS),
    "rowwise_rep": Cut(COLUMNS),
    "rowwise_split_input": Cut(COLUMNS),
    "packed_rowwise": Cut(COLUMNS, 2),
    "grouped_gemm": Cut(EXPERTS),
}
"""Of transformers' styles, by what they do to float weights as these lie in their models."""

WHOLE = ("replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj")
"""Styles that leave each rank the whole weight."""


class DividedProduct(TensorParallelLayer):  # type: ignore[misc]
    """The style of a packed product.

    planned: the style that divides what comes in, or joins what goes out; None where the module of the experts does.
    """

    def __init__(self, cut: Cut, planned: TensorParallelLayer | None) -> None:
        self.cut, self.planned = cut, planned

    def install_forward(self, module: PackedProduct, mesh: DeviceMesh) -> nn.Module:
        """Put placeholders in the places of what is divided, which transformers fills with this rank's part."""
        by_columns = self.cut.dimension == COLUMNS
        if by_columns:
            module.own_columns = _own_columns(module, mesh)
        regroups = by_columns and not _even(module, mesh.size())
        self._put_placeholders(module, mesh, regroups)
        setattr(module, "_hf_quantized_needs_local_tp", True)  # noqa: B010  (transformers': it reads plain tensors)
        if regroups:
            module.forward = partial(_regrouped, module.forward, mesh, module.own_columns)
        if self.planned is not None:
            self.planned.install_forward(module, mesh)
            if by_columns:
                module.forward = partial(_rounded, module.forward)
        return module

    def _put_placeholders(self, module: PackedProduct, mesh: DeviceMesh, whole: bool) -> None:
        """whole: this rank reads all, since its part is none that a style divides."""
        packed = module.packed
        dimensions = "ENK"[-packed.codes.dim() :]
        along = dimensions[self.cut.dimension]
        for name in PARTS:
            tensor = getattr(packed, name)
            has = dimensions[: tensor.dim()]  # a tensor scale has no N and no K
            if along in has:
                setattr(packed, name, self._placeholder(tensor, mesh, None if whole else has.index(along)))
        if along == "K" and module.input_scale is not None:
            module.input_scale = self._placeholder(module.input_scale, mesh, None if whole else 0)

    def _placeholder(self, tensor: Any, mesh: DeviceMesh, at: int | None) -> DTensor:
        """at: the dimension that is divided; None where each rank reads all."""
        if at is None:
            placement: Placement = Replicate()
        elif self.cut.groups == 1:
            placement = Shard(at)
        else:
            placement = _StridedShard(at, split_factor=self.cut.groups)
        return distribute_tensor(tensor, mesh, [placement], src_data_rank=None)


def _even(product: PackedProduct, ranks: int) -> bool:
    """Whether equal parts of its columns have whole block arrays."""
    return product.in_features % (ranks * smallest_part(product.settings.spec)) == 0


def _own_columns(product: PackedProduct, mesh: DeviceMesh) -> range:
    """This rank's, with one block array more on the first ranks where they do not come out even."""
    size, rank = smallest_part(product.settings.spec), mesh.get_local_rank()
    each, more = divmod(product.in_features // size, mesh.size())
    start = each * rank + min(rank, more)
    return range(start * size, (start + each + (rank < more)) * size)


def _regrouped(forward: Callable[..., Tensor], mesh: DeviceMesh, columns: range, x: Tensor, *rest: Any) -> Tensor:
    """Of an activation whose columns are divided evenly, the product of those that this rank has of the weight."""
    evenly = DTensor.from_local(x, mesh, [Shard(-1)], run_check=False)
    whole = evenly.full_tensor(grad_placements=[Partial()])
    return forward(whole[..., columns.start : columns.stop], *rest)


def _rounded(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The sum of all ranks' parts, which are in fp32, as x."""
    return forward(x).to(x.dtype)


def _ours(style: str) -> str:
    return f"lobcq_{style}"


def _of_experts(cut: Cut) -> str:
    return f"lobcq_experts{cut.dimension}_{cut.groups}"


for _style, _cut in CUTS.items():
    ALL_PARALLEL_STYLES.register(_ours(_style), DividedProduct(_cut, ALL_PARALLEL_STYLES[_style]))
    ALL_PARALLEL_STYLES.register(_of_experts(_cut), DividedProduct(_cut, None))


def divide_packed(model: PreTrainedModel) -> None:
    """Have a model whose packed products are in their places divide them when transformers divides it.

    Raises:
        ConfigError: ranks are to share it in a way that leaves packed products whole.
    """
    config = model.config.distributed_config
    for name in ("fsdp_size", "dp_replicate_size", "pp_size"):
        if getattr(config, name) > 1:
            raise ConfigError(
                f"{name}={getattr(config, name)}: packed weights are divided by tensor and expert parallelism alone."
                " Remedy: tp_plan='auto'"
            )
    model._resolve_parallel_plans = partial(_resolved, model, model._resolve_parallel_plans)


def _resolved(model: PreTrainedModel, resolve: Any, config: Any) -> tuple[dict[str, str], ...]:
    """transformers' plans by names of modules and parameters, with our styles for packed products."""
    tp_plan, ep_plan, fsdp_plan = resolve(config)
    _check_heads(model, tp_plan, config.tp_size)
    modules = dict(model.named_modules())

    def ours(plan: dict[str, str], ranks: int) -> dict[str, str]:
        products = {name: style for name, style in plan.items() if isinstance(modules.get(name), PackedProduct)}
        styles = {name: _style_of(name, modules, style, ranks) for name, style in products.items()}
        return styles | {name: style for name, style in plan.items() if name not in styles}

    tp_plan, ep_plan = ours(tp_plan, config.tp_size), ours(ep_plan, config.ep_size)
    for name, style in ep_plan.items():
        if style == _of_experts(CUTS["grouped_gemm"]):  # as transformers does for float ones, before it dispatches
            experts: Any = modules[name.rpartition(".")[0]]
            experts.num_experts = modules[name].packed.stack[0] // config.ep_size
            experts._is_expert_parallel = True
    return tp_plan, ep_plan, fsdp_plan


def _check_heads(model: PreTrainedModel, plan: Mapping[str, str], ranks: int) -> None:
    """That each rank has whole heads.

    Raises:
        ConfigError: it would not.
    """
    text = model.config.get_text_config()
    for projection, name in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        heads = getattr(text, name, None)
        layer = next((one for one, style in plan.items() if one.endswith(projection) and style == "colwise"), None)
        if layer is not None and isinstance(heads, int) and heads % ranks:
            raise ConfigError(
                f"{layer}: {name}={heads} is no multiple of {ranks} ranks. Remedy: a number of ranks that divides it"
            )


def _style_of(name: str, modules: Mapping[str, Any], planned: str, ranks: int) -> str:
    """Our style for a packed product.

    Raises:
        ConfigError: the one planned is not for it, or it cannot be divided like this.
    """
    product = modules[name]
    if planned in WHOLE:
        return planned
    if planned not in CUTS or isinstance(product, LobcqConvolution):
        raise ConfigError(
            f"{name}: packed weights are not divided in style {planned!r}. Remedy: a plan with {', '.join(CUTS)} there,"
            " or exclude the layer when quantizing"
        )
    experts = modules[name.rpartition(".")[0]] if product.packed.stack else None
    cut = CUTS[planned]
    if getattr(experts, "is_transposed", False) and cut.dimension != EXPERTS:  # float stacks are [E, K, N]
        cut = Cut(ROWS + COLUMNS - cut.dimension, cut.groups)
    reason = _why_not(product, cut, ranks, experts)
    if reason is not None:
        raise ConfigError(
            f"{name} [N={product.out_features}, K={product.in_features}] cannot be divided among {ranks} ranks:"
            f" {reason}. Remedy: fewer ranks, or exclude the layer when quantizing"
        )
    return _ours(planned) if experts is None else _of_experts(cut)


def _why_not(product: PackedProduct, cut: Cut, ranks: int, experts: nn.Module | None) -> str | None:
    """Why a product cannot be divided like this; experts: the module whose stack it is."""
    rows, columns, spec = product.out_features, product.in_features, product.settings.spec
    if cut.dimension == EXPERTS:
        count = product.packed.stack[0]
        return f"it has {count} experts" if count % ranks else None
    if getattr(experts, "has_bias", False) or getattr(experts, "has_post_expert_norm", False):
        return "its experts have biases or norms, which are for whole results"
    if cut.dimension == ROWS and cut.groups == 1:
        return f"some would have none of its {rows} rows" if -(-rows // ranks) * (ranks - 1) >= rows else None
    if cut.dimension == ROWS:
        if getattr(product, "bias", None) is not None:
            return f"its bias is not divided in {cut.groups} groups"
        return f"its {cut.groups} groups of rows have unequal parts" if rows % (cut.groups * ranks) else None
    if cut.groups > 1:
        return "columns are not divided in groups"
    size = smallest_part(spec)
    if columns % size or columns % ranks or columns < ranks * size:
        parts = f"parts have whole block arrays of {spec.array_size}, {size} columns at least"
        return f"{parts}: K must be a multiple of {size} and of {ranks}, and {ranks * size} or more"
    return None


def hold_parts(model: PreTrainedModel) -> None:
    """Once they are read: packed products hold what this rank has of their weights, in plain tensors."""
    del model._resolve_parallel_plans  # the class has its own
    for product in (one for one in model.modules() if isinstance(one, PackedProduct)):
        if isinstance(product.packed.codes, DTensor):
            _hold_part(product)


def _hold_part(product: PackedProduct) -> None:
    packed, scale = product.packed, product.input_scale
    tensors = {name: getattr(packed, name) for name in PARTS}
    mesh = tensors["codes"].device_mesh
    product.hold_part({name: _own(one, product) for name, one in tensors.items()}, mesh.get_group())
    for name, one in tensors.items():
        setattr(getattr(packed, name), READ, getattr(one, READ, False))
    if isinstance(scale, DTensor):
        delattr(product, "input_scale")
        product.register_buffer("input_scale", _own(scale, product))
        setattr(product.input_scale, READ, getattr(scale, READ, False))


def _own(tensor: Any, product: PackedProduct) -> Any:
    """What this rank has of a tensor, which may have been read whole."""
    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor.to_local().detach()
    if not tensor.placements[0].is_replicate():
        return local
    width, count = local.shape[-1], product.in_features
    start, stop = (column * width // count for column in (product.own_columns.start, product.own_columns.stop))
    return local[..., start:stop].clone()
