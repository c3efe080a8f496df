"""Captures in, WebDataset shards out, training batches out of those."""

from shards.capture import Capture, View, find_captures, read_capture
from shards.checking import Finding, check
from shards.contents import Contents, contact_sheet, info
from shards.loading import BatchLoader, to_float
from shards.manifest import Manifest, PriorError, PriorSettings
from shards.packing import pack
from shards.plans import Example, Plan, plan
from shards.priors import PriorMaps, input_sets, write_with_priors
from shards.reading import ShardSet, SubjectShards, Target, open_shards
from shards.stores import ShardCache

__all__ = [
    "BatchLoader",
    "Capture",
    "Contents",
    "Example",
    "Finding",
    "Manifest",
    "Plan",
    "PriorError",
    "PriorMaps",
    "PriorSettings",
    "ShardCache",
    "ShardSet",
    "SubjectShards",
    "Target",
    "View",
    "check",
    "contact_sheet",
    "find_captures",
    "info",
    "input_sets",
    "open_shards",
    "pack",
    "plan",
    "read_capture",
    "to_float",
    "write_with_priors",
]
