"""Data that several test modules share, made once."""

import pytest
from tiny_captures import pack_tiny


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory):
    """Shards of four tiny people, the last one held out."""
    return pack_tiny(tmp_path_factory.mktemp("tiny"), subjects=4, timesteps=6, views=12)
