"""Readers of source layouts, one module a layout; `shards.read_capture` picks one."""
