"""Synthetic multi-view captures of people who do not exist."""

from shards.synth.capture import synthesize

__all__ = ["synthesize"]
