"""Models without a library: what users write themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

WIDTH = 8


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.grouped(torch.tanh(self.stem(x)))))
        return self.head(torch.tanh(self.depthwise(h)).mean((2, 3)))


class ResidualMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Attention(nn.Module):
    """nn.MultiheadAttention, whose projections of queries, keys and values are parameters of its own."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        h = self.attention(x, x, x, need_weights=False)[0].tanh()
        return self.head(h if self.attention.batch_first else h.transpose(0, 1))


class Recurrent(nn.Module):
    """The same module at every depth, and its weight once more in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.block(x)
        return F.linear(x, self.block[0].weight)


class Functional(nn.Module):
    """Calls a module with a weight that it makes of its own parameter, as a hypernetwork does."""

    def __init__(self) -> None:
        super().__init__()
        self.template = nn.Linear(WIDTH, WIDTH)
        self.factor = nn.Parameter(torch.randn(WIDTH, 2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.template.weight + self.factor @ self.factor.T
        return self.head(torch.func.functional_call(self.template, {"weight": weight}, (x,)).tanh())


class Skew(nn.Module):
    """Any square matrix to a rotation."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.matrix_exp(weight - weight.T)


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.spectral = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.rotation = nn.Linear(WIDTH, WIDTH)
        parametrize.register_parametrization(self.rotation, "weight", Skew())
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rotation(self.spectral(self.normed(x).tanh()).tanh()).tanh())


class TimeMajor(nn.Module):
    """Has positions first, [T, N, d], between its first and its last line."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.gru(self.inner(x.transpose(0, 1)).tanh())
        return self.head(h).cumsum(0).tanh().transpose(0, 1)


class Contrastive(nn.Module):
    """Compares every image with every text of its batch, as CLIP does."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        image, text = F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1)
        return self.log_scale.exp() * image @ text.T


class Unused(nn.Module):
    """A parameter that nothing reads and a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3)
        self.idle = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)
