"""Shards in an S3-compatible store: moto's server on the loopback interface, through fsspec and s3fs."""

import threading
from collections.abc import Iterator

import fsspec
import pytest
import torch
from tiny_captures import pack_tiny

from avatars.errors import UserError
from shards import BatchLoader, Manifest, ShardCache, open_shards

pytest.importorskip("s3fs", reason="s3fs is not installed")
moto_server = pytest.importorskip("moto.server", reason="moto's server is not installed")


class Faults:
    """Answers 500 to as many requests for shards as asked for."""

    def __init__(self, application) -> None:
        self.application, self.left, self.answered, self.lock = application, 0, 0, threading.Lock()

    def __call__(self, environ, start_response):
        with self.lock:
            fails = (
                self.left > 0 and environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".tar")
            )
            self.left -= fails
            self.answered += fails
        if not fails:
            return self.application(environ, start_response)
        start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
        return [b"<Error><Code>InternalError</Code><Message>by the test</Message></Error>"]


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    """A store that is used as a user would: with the variables of the AWS tools."""
    from werkzeug.serving import make_server

    faults = Faults(moto_server.DomainDispatcherApplication(moto_server.create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # our own retries are what is tested
        yield faults
    fsspec.filesystem("s3").clear_instance_cache()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack_tiny(
        tmp_path_factory.mktemp("tiny"), subjects=4, timesteps=8, views=4, size=24, timesteps_per_shard=4
    )


@pytest.fixture(scope="module")
def url(packed, faults):
    store = fsspec.filesystem("s3")
    store.mkdir("bucket")
    for path in packed.iterdir():
        store.put_file(str(path), f"bucket/people/{path.name}")
    return "s3://bucket/people"


def batches(location, **options):
    with BatchLoader(location, "train", seed=2, micro_batch=2, views=2, **options) as loader:
        return [next(loader) for _ in range(16)]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a["ids"] == b["ids"]
        assert all(torch.equal(a[name], b[name]) for name in a if name != "ids")


def test_batches_from_a_store_equal_local_ones(packed, url, tmp_path):
    local = batches(packed)
    assert_equal(batches(url), local)  # streamed
    largest = max(shard.bytes for shard in Manifest.load(packed).shards)
    limit = int(2.5 * largest)  # of six shards in training: some are fetched again and again
    assert_equal(batches(url, cache=ShardCache(tmp_path / "cache", limit)), local)
    kept = list((tmp_path / "cache").iterdir())
    assert 1 <= len(kept) <= 2
    assert sum(path.stat().st_size for path in kept) <= limit
    far = open_shards(url, "heldout").read("s03")
    near = open_shards(packed, "heldout").read("s03")
    assert torch.equal(far.targets[1].images([2]), near.targets[1].images([2]))


@pytest.mark.parametrize("cached", [True, False])
def test_errors_of_the_store_are_tried_again(packed, url, faults, tmp_path, cached):
    faults.left, faults.answered = 3, 0
    assert_equal(batches(url, cache=ShardCache(tmp_path, 10**9) if cached else None), batches(packed))
    assert faults.answered == 3


@pytest.mark.slow
def test_a_store_that_does_not_recover_is_a_sentence(url, faults, tmp_path):
    faults.left = 10**6
    try:
        with pytest.raises(
            UserError, match=r"s3://bucket/people/s0\d-000\d.tar cannot be read after 4 attempts"
        ):
            batches(url, cache=ShardCache(tmp_path, 10**9))
    finally:
        faults.left = 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"holds no manifest.json"):
        Manifest.load("s3://bucket/nobody")
