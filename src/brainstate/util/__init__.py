"""Helpers that are not tied to one part of the library."""

from . import filter

__all__ = ["filter"]
