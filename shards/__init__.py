"""Captures in, WebDataset shards out, training batches out of those."""

from shards.capture import Capture, View, read_capture
from shards.loading import BatchLoader
from shards.manifest import Manifest
from shards.packing import pack
from shards.plans import Example, Plan, plan
from shards.reading import ShardSet, SubjectShards, Target, open_shards

__all__ = [
    "BatchLoader",
    "Capture",
    "Example",
    "Manifest",
    "Plan",
    "ShardSet",
    "SubjectShards",
    "Target",
    "View",
    "open_shards",
    "pack",
    "plan",
    "read_capture",
]
