"""Modules, which own States, and a few layers."""

from ._layers import Dropout, Linear, Sequential
from ._module import Module

__all__ = ["Dropout", "Linear", "Module", "Sequential"]
