"""Leaf helpers: they import neither Lightning nor any other part of the package."""
