"""Random small modules: layers, branches on sizes, views, padding, shared weights, state and odd names."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 16
NAMES = (
    "layer",
    "graph",
    "code",
    "meta",
    "class",
    "training_",
    "forward_",
    "with space",
    "with-hyphen",
    "ünicode",
    "0",
)
"""Of submodules: some are names of FX's own, Python's, or none of Python's at all."""

HEADS = "heads"
"""What the names of weights of heads [heads, D, K] start with."""

Step = Callable[[nn.Module, Tensor], Tensor]


def as_matrix(name: str, weight: Tensor) -> Tensor:
    """A weight as rows of K: of heads that of all, of a convolution each channel's."""
    return weight.flatten(0, 1) if name.startswith(HEADS) else weight.flatten(1)


class Generated(nn.Module):
    """Runs steps one after the other on x [B, T, WIDTH]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = Random(seed)
        self.names = list(NAMES)
        self.rng.shuffle(self.names)
        torch.manual_seed(seed)
        self.linears: list[nn.Module] = []
        self.linear()  # at least one matmul to quantize
        self.texts: list[str] = []
        self.steps = [self._step() for _ in range(self.rng.randint(1, 4))]
        self.second = self.rng.choice((None, None, "add", "cat"))
        self.output = self.rng.choice(("tensor", "tuple", "list", "dict", "nested"))

    def add(self, module: nn.Module) -> nn.Module:
        """Register a module under one of the odd names, or a plain one when they are used up."""
        self.add_module(self.names.pop() if self.names else f"m{len(self._modules)}", module)
        return module

    def linear(self, inputs: int = WIDTH) -> nn.Module:
        """A linear layer, new or one that is there already."""
        old = [one for one in self.linears if one.in_features == inputs]
        if old and self.rng.random() < 0.3:
            return self.rng.choice(old)
        self.linears.append(self.add(nn.Linear(inputs, WIDTH, bias=self.rng.random() < 0.7)))
        return self.linears[-1]

    def add_parameter(self, name: str, *shape: int) -> str:
        """Register a parameter; what it is called."""
        name = f"{name}{len(self._parameters)}"
        self.register_parameter(name, nn.Parameter(0.2 * torch.randn(shape)))
        return name

    def _step(self) -> Step:
        make = self.rng.choice(STEPS)
        self.texts.append(make.__name__)
        return make(self, self.rng)

    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 1.0) -> Any:
        """The last step's result, in one of several structures."""
        if y is not None:
            x = x + y if self.second == "add" else torch.cat((x, y), 1)
        x = self.linears[0](x) * scale
        for step in self.steps:
            x = step(self, x)
        mean = x.mean()
        return {
            "tensor": x,
            "tuple": (x, mean),
            "list": [x, mean],
            "dict": {"out": x, "mean": mean},
            "nested": {"out": (x, [mean])},
        }[self.output]


def linear(m: Generated, rng: Random) -> Step:
    layer = m.linear()
    return lambda m, x: layer(x)


def mlp(m: Generated, rng: Random) -> Step:
    up, down = m.add(nn.Linear(WIDTH, 40)), m.add(nn.Linear(40, WIDTH))
    return lambda m, x: x + down(functional.gelu(up(x)))


def norm(m: Generated, rng: Random) -> Step:
    layer = m.add(nn.LayerNorm(WIDTH))
    return lambda m, x: layer(x)


def convolution(m: Generated, rng: Random) -> Step:
    layer = m.add(nn.Conv1d(WIDTH, WIDTH, 1))
    return lambda m, x: layer(x.transpose(1, 2)).transpose(1, 2)


def viewed_convolution(m: Generated, rng: Random) -> Step:
    """Its result is contiguous, of which the view makes use."""
    layer = m.add(nn.Conv1d(WIDTH, WIDTH, 1, bias=rng.random() < 0.5))
    pairs = WIDTH // 2
    return lambda m, x: layer(x.transpose(1, 2)).view(x.shape[0], pairs, -1).unflatten(2, (2, -1)).flatten(1, 2).mT


def patches(m: Generated, rng: Random) -> Step:
    size = rng.choice((1, 2, 3))
    layer = m.add(nn.Conv1d(WIDTH, WIDTH, size, stride=size + rng.randrange(2)))
    return lambda m, x: layer(x.transpose(1, 2)).transpose(1, 2)


def heads(m: Generated, rng: Random) -> Step:
    """Projections by einsum, tensordot and bmm; see `as_matrix`."""
    name = m.add_parameter(HEADS, 4, WIDTH // 4, WIDTH)
    project = rng.choice((
        lambda x, w: torch.einsum("btk,hdk->bthd", x, w).flatten(2),
        lambda x, w: torch.einsum("hdk,...k->h...d", w, x).permute(1, 2, 0, 3).reshape(x.shape),
        lambda x, w: torch.tensordot(x, w, dims=([2], [2])).flatten(2),
        lambda x, w: torch.bmm(x, w.view(1, WIDTH, WIDTH).transpose(1, 2).expand(x.shape[0], -1, -1)),
    ))  # fmt: skip
    return lambda m, x: x + project(x, getattr(m, name))


def cross_attention(m: Generated, rng: Random) -> Step:
    wide = rng.random() < 0.5
    layer = m.add(nn.MultiheadAttention(WIDTH, 2, batch_first=True, **({"kdim": 32, "vdim": 32} if wide else {})))
    weights = rng.random() < 0.5

    def step(m: nn.Module, x: Tensor) -> Tensor:
        memory = x.flip(1)[:, :3]
        memory = torch.cat((memory, memory), -1) if wide else memory
        return layer(x, memory, memory, need_weights=weights)[0]

    return step


def attention(m: Generated, rng: Random) -> Step:
    layer = m.add(nn.MultiheadAttention(WIDTH, 2, batch_first=True))
    return lambda m, x: layer(x, x, x, need_weights=False)[0]


def fused_attention(m: Generated, rng: Random) -> Step:
    causal = rng.random() < 0.5
    return lambda m, x: functional.scaled_dot_product_attention(x, x, x, is_causal=causal)


def encoder(m: Generated, rng: Random) -> Step:
    layer = m.add(nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True))
    return lambda m, x: layer(x)


def positions(m: Generated, rng: Random) -> Step:
    layer = m.add(nn.Embedding(64, WIDTH))
    return lambda m, x: x + layer(torch.arange(x.shape[1]))


def branch(m: Generated, rng: Random) -> Step:
    one, other, dim, limit = m.linear(), m.linear(), rng.randrange(2), rng.choice((1, 2, 3, 4, 6, 8))
    ask = rng.choice((
        lambda x: x.shape[dim] > limit,
        lambda x: x.shape[dim] == limit,
        lambda x: x.shape[dim] % 2 == 0,
        lambda x: x.shape[dim] % limit,
        lambda x: x.shape[0] < x.shape[1],
        lambda x: x.numel() > 16 * limit,
        lambda x: x.shape[1] // 2 >= limit,
        lambda x: x.shape[dim] in (1, limit),
        lambda x: len(x) > limit,
        lambda x: x.shape[0] * x.shape[1] <= 2 * limit and x.shape[dim] != 3,
        lambda x: x.size(dim) != limit or x.size(1) > 5,
    ))  # fmt: skip
    return lambda m, x: one(x) if ask(x) else x - other(x)


def windows(m: Generated, rng: Random) -> Step:
    layer, size = m.linear(), rng.choice((2, 3, 4))

    def step(m: nn.Module, x: Tensor) -> Tensor:
        length = x.shape[1]
        padded = functional.pad(x, (0, 0, 0, -length % size))
        return layer(padded.view(x.shape[0], -1, size, WIDTH)).flatten(1, 2)[:, :length]

    return step


def padded_if_needed(m: Generated, rng: Random) -> Step:
    layer, size = m.linear(), rng.choice((2, 4))

    def step(m: nn.Module, x: Tensor) -> Tensor:
        rest = -x.shape[1] % size
        x = functional.pad(x, (0, 0, 0, rest)) if rest else x
        return torch.cat([layer(part) for part in x.split(size, 1)], 1)

    return step


def pairs(m: Generated, rng: Random) -> Step:
    layer = m.linear(2 * WIDTH)
    return lambda m, x: layer(x.reshape(x.shape[0], x.shape[1] // 2, 2 * WIDTH))


def flattened(m: Generated, rng: Random) -> Step:
    layer = m.linear()
    return lambda m, x: layer(x.reshape(-1, WIDTH)).view(x.shape[0], x.shape[1], -1)


def chunked(m: Generated, rng: Random) -> Step:
    layer, count = m.linear(), rng.choice((2, 3))
    return lambda m, x: torch.cat([layer(part) for part in x.chunk(count, 1)], 1)


def sliced(m: Generated, rng: Random) -> Step:
    part = rng.choice((slice(None, 1), slice(None, 3), slice(-2, None), slice(1, None), slice(None, None, 2)))
    return lambda m, x: x[:, part]


def shortened(m: Generated, rng: Random) -> Step:
    limit = rng.choice((2, 4, 6))
    return lambda m, x: x[:, : min(x.shape[1], limit)]


def with_first(m: Generated, rng: Random) -> Step:
    return lambda m, x: x + x[:, :1]


def with_mean(m: Generated, rng: Random) -> Step:
    return lambda m, x: x - x.mean(1, keepdim=True).expand(x.shape)


def weighted(m: Generated, rng: Random) -> Step:
    count = rng.choice((2, 5))
    return lambda m, x: x * (torch.arange(x.shape[1]) < count)[None, :, None]


def averaged(m: Generated, rng: Random) -> Step:
    return lambda m, x: torch.tril(torch.ones(x.shape[1], x.shape[1])) @ x / x.shape[1]


def divided(m: Generated, rng: Random) -> Step:
    return lambda m, x: x / x.shape[1] ** 0.5


def rounded(m: Generated, rng: Random) -> Step:
    return lambda m, x: x * int(x.shape[1] ** 0.5)


def squeezed(m: Generated, rng: Random) -> Step:
    def step(m: nn.Module, x: Tensor) -> Tensor:
        y = x.squeeze(1)
        return y.unsqueeze(1) * 2 if y.dim() == 2 else y

    return step


def rolled(m: Generated, rng: Random) -> Step:
    return lambda m, x: torch.roll(x, 1, 1) + x.flip(1).cumsum(1)


def loop(m: Generated, rng: Random) -> Step:
    layer = m.linear()
    return lambda m, x: torch.stack([layer(x[:, i]) for i in range(x.shape[1])], 1)


def counted(m: Generated, rng: Random) -> Step:
    if not hasattr(m, "count"):
        m.register_buffer("count", torch.zeros(()))

    def step(m: nn.Module, x: Tensor) -> Tensor:
        m.count.add_(1)
        return x + m.count

    return step


def remembered(m: Generated, rng: Random) -> Step:
    if not hasattr(m, "state"):
        m.register_buffer("state", torch.zeros(WIDTH))

    def step(m: nn.Module, x: Tensor) -> Tensor:
        x = x + m.state
        m.state = x.mean((0, 1))
        return x

    return step


STEPS: tuple[Callable[[Generated, Random], Step], ...] = (
    linear, mlp, norm, convolution, viewed_convolution, patches, heads, cross_attention, attention, fused_attention,
    encoder, positions, branch, branch, branch, windows, padded_if_needed, pairs, flattened, chunked, sliced,
    shortened, with_first, with_mean, weighted, averaged, divided, rounded, squeezed, rolled, loop, counted,
    remembered,
)  # fmt: skip
