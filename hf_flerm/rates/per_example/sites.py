"""Sites: the modules at whose outputs the derivative of a tensor is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class Site:
    """A module whose outputs depend on a tensor, at which the tensor's derivative is read.

    Attributes:
        module: Name of the module in the model's `named_modules()`.
        attribute: Name of the parameter below that module.
        dim: Dimension of the module's outputs along which the examples lie.
    """

    module: str
    attribute: str
    dim: int = 0

    def enclosing(self) -> Site | None:
        """Return the site of the same tensor at the parent module; None if this site is the model itself."""
        if not self.module:
            return None
        parent, _, child = self.module.rpartition(".")
        return Site(parent, f"{child}.{self.attribute}")

    def transposed(self) -> Site:
        """Return the same site with the examples along the second dimension."""
        return replace(self, dim=1)


def owners(model: nn.Module, parameter: nn.Parameter) -> list[Site]:
    """List the modules that hold a parameter directly; a tied parameter has several."""
    return [
        Site(path, attribute)
        for path, module in model.named_modules()
        for attribute, value in module.named_parameters(recurse=False, remove_duplicate=False)
        if value is parameter
    ]


def outermost(sites: Iterable[Site]) -> list[Site]:
    """Drop the sites whose module is, or lies inside, the module of another site."""
    outer: list[Site] = []
    for site in sorted(set(sites), key=lambda site: (site.module, site.attribute)):
        if not any(f"{site.module}.".startswith(f"{other.module}.") or not other.module for other in outer):
            outer.append(site)
    return outer
