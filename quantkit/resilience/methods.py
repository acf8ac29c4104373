"""The methods for thresholds by their names: the files beside this one."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def find(name: str) -> Callable[..., Any]:
    """Return the method of a name that `choice.METHODS` has; it is called with a `Material` and a `Resilience`."""
    method: Callable[..., Any] = import_module(f"quantkit.resilience.{name}").METHOD
    return method
