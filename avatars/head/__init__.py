"""Parametric heads: geometry with an identity, an expression and a face that moves."""

from avatars.head.model import ParametricHead

__all__ = ["ParametricHead"]
