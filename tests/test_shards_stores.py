import gzip
import logging
from pathlib import Path

import fsspec
import pytest
import torch
from tiny_captures import pack_tiny

from avatars.errors import UserError
from shards import BatchLoader, Manifest, ShardCache, check, info, open_shards
from shards.stores import RemoteFolder, StreamReader, location


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack_tiny(
        tmp_path_factory.mktemp("tiny"), subjects=4, timesteps=8, views=4, size=24, timesteps_per_shard=4
    )


@pytest.fixture
def url(packed):
    return f"file://{packed}"  # fsspec's own files, opened anew for each reader as an object store's are


def batches(location, count=10, **options):
    with BatchLoader(location, "train", **{"seed": 2, "micro_batch": 2, "views": 2, **options}) as loader:
        return [next(loader) for _ in range(count)]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a["ids"] == b["ids"]
        assert all(torch.equal(a[name], b[name]) for name in a if name != "ids")


def test_streamed_and_cached_batches_equal_local_ones(packed, url, tmp_path):
    local = batches(packed)
    assert_equal(batches(url), local)
    assert_equal(batches(url, threads=4, prefetch=5), local)
    assert_equal(batches(url, cache=ShardCache(tmp_path, 10**9)), local)


def test_a_url_survives_being_a_path(packed):
    assert location(Path("s3://bucket/people")) == location("s3://bucket/people/") == "s3://bucket/people"
    assert location(f"file://{packed}") == location(Path(f"file://{packed}")) == f"file://{packed}"
    assert location(str(packed)) == location(packed) == packed
    assert Manifest.load(Path(f"file://{packed}")).folder == f"file://{packed}"


def test_subjects_are_read_from_afar(packed, url, tmp_path):
    near = open_shards(packed, "train").read("s00")
    for cache in (None, ShardCache(tmp_path, 10**9)):
        far = open_shards(url, "train", cache).read("s00")
        assert [t.id for t in far.targets] == [t.id for t in near.targets]
        assert torch.equal(far.targets[5].images([1, 3]), near.targets[5].images([1, 3]))
        assert torch.equal(far.input_sets[1].positions, near.input_sets[1].positions)
    assert "4 subjects" in str(info(url))
    with pytest.raises(UserError, match="Copy it here and check the copy"):
        check(url)


def test_the_cache_is_bounded_and_keeps_what_was_used_last(packed, tmp_path):
    manifest = Manifest.load(packed)
    remote = RemoteFolder(f"file://{packed}")
    largest = max(shard.bytes for shard in manifest.shards)
    cache = ShardCache(tmp_path / "cache", int(2.5 * largest))
    kept = [cache.path(remote, shard.path, shard.sha256) for shard in manifest.shards[:2]]
    cache.path(remote, manifest.shards[0].path, manifest.shards[0].sha256)
    kept.append(cache.path(remote, manifest.shards[2].path, manifest.shards[2].sha256))
    assert [path.is_file() for path in kept] == [True, False, True]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 2.5 * largest


def test_what_fails_now_and_then_is_tried_again(packed, tmp_path, caplog):
    shard = Manifest.load(packed).shards[0]
    remote = RemoteFolder(f"file://{packed}", attempts=3, wait=0)
    working, failures = remote._files.open, [OSError("reset by peer"), TimeoutError("slow")]

    def flaky(*args, **options):
        if failures:
            raise failures.pop()
        return working(*args, **options)

    remote._files.open = flaky
    try:
        with caplog.at_level(logging.WARNING):
            remote.fetch(shard.path, tmp_path / "a.tar", shard.sha256)
        assert (tmp_path / "a.tar").read_bytes() == (packed / shard.path).read_bytes()
        assert caplog.records[0].message.endswith("attempt 1 failed: slow")
        failures[:] = [OSError("reset by peer")] * 3
        with pytest.raises(UserError, match=r"cannot be read after 3 attempts .reset by peer"):
            remote.fetch(shard.path, tmp_path / "b.tar", shard.sha256)
    finally:
        del remote._files.open
    with pytest.raises(UserError, match=r"after 3 attempts .its hash is"):
        remote.fetch(shard.path, tmp_path / "b.tar", "0" * 64)
    with pytest.raises(UserError, match="is not there"):
        remote.fetch("other.tar", tmp_path / "b.tar", "0" * 64)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_an_unreadable_shard_is_put_aside_up_to_a_limit(tmp_path, caplog):
    shards = pack_tiny(tmp_path, subjects=5, heldout=1, timesteps=6, views=2, size=24, n_inputs=2)
    whole = batches(shards, 12)
    for name in ("s01-0000.tar", "s02-0000.tar"):
        content = (shards / name).read_bytes()
        (shards / name).write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match=r"s0[12]-0000.tar is damaged"):
        batches(shards, 12)
    with pytest.raises(UserError, match="More than 1 shards cannot be read"):
        batches(shards, 12, tolerate=1)
    caplog.clear()
    with (
        caplog.at_level(logging.WARNING),
        BatchLoader(shards, "train", seed=2, micro_batch=2, views=2, tolerate=2) as loader,
    ):
        rest = [next(loader) for _ in range(12)]
        assert set(loader.quarantined) == {"s01-0000.tar", "s02-0000.tar"}
    assert len(caplog.records) == 2
    names = [name for batch in rest for name in batch["ids"]]
    assert len(names) == 24
    assert {name.split("/")[0] for name in names} == {"s00", "s03"}
    straight = [name for batch in whole for name in batch["ids"]]
    readable = [i for i, name in enumerate(straight) if name.split("/")[0] in ("s00", "s03")]
    assert [names[i] for i in readable] == [straight[i] for i in readable]  # the others stay where they were


def test_no_shard_left_is_a_sentence(tmp_path):
    shards = pack_tiny(tmp_path, subjects=1, heldout=0, timesteps=6, views=2, size=24, n_inputs=2)
    path = shards / "s00-0000.tar"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match="no shard left"):
        batches(shards, 1, tolerate=3)


def test_streams_refuse_what_is_no_plain_tar(packed):
    files = fsspec.filesystem("memory")
    content = (packed / "s00-0000.tar").read_bytes()
    files.pipe_file("/odd/zipped.tar", gzip.compress(content))
    remote = RemoteFolder("memory://odd")
    with pytest.raises(UserError, match=r"zipped.tar is not a plain tar"):
        StreamReader(remote, "zipped.tar").read("inputs-000", ["json"])
    for length in (5000, 7000, 9000):
        files.pipe_file("/odd/short.tar", content[:length])
        with pytest.raises(
            UserError, match=r"short.tar (cannot be read to its end|ends without target-00003)"
        ):
            StreamReader(remote, "short.tar").read("target-00003", ["json"])
    with pytest.raises(UserError, match=r"none.tar is not there"):
        StreamReader(remote, "none.tar").read("inputs-000", ["json"])
    files.rm("/odd", recursive=True)


def test_several_expressions_need_a_copy_of_the_shard(packed, url, tmp_path):
    options: dict = {"seed": 0, "micro_batch": 1, "views": 1, "expressions": 2}
    with pytest.raises(UserError, match=r"2 expressions an example jump about.*--data\.cache"):
        BatchLoader(url, "train", **options)
    for folder, cache in ((url, ShardCache(tmp_path, 10**9)), (packed, None)):
        with pytest.raises(UserError, match=r"pack larger shards"):  # read, and found to be too small
            BatchLoader(folder, "train", cache=cache, **options)


def test_streams_go_back_when_asked_to(packed, url):
    name = "s00-0000.tar"
    reader = StreamReader(RemoteFolder(url), name)
    forward = [reader.read(f"target-{i:05d}", ["json"]) for i in range(4)]
    assert [reader.read(f"target-{i:05d}", ["json"]) for i in (3, 0, 2, 1)] == [
        forward[i] for i in (3, 0, 2, 1)
    ]
    with pytest.raises(UserError, match="ends without target-00099"):
        reader.read("target-00099", ["json"])
    with pytest.raises(UserError, match=r"target-00000 has no 099.jpg"):
        reader.read("target-00000", ["099.jpg"])
    assert reader.keys[-1] == "index"


@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        ("pipe:cat /etc/passwd", "is not there"),
        ("pipe://cat", "cannot be opened"),
        ("memory://nowhere", r"holds no manifest.json"),
    ],
)
def test_odd_locations_are_sentences(location, sentence):
    with pytest.raises(UserError, match=sentence):
        Manifest.load(location)


def test_batches_that_are_kept_do_not_change(packed):
    with BatchLoader(packed, "train", seed=0, micro_batch=1, views=2, prefetch=1) as loader:
        kept = [next(loader) for _ in range(3)]
        part = next(loader)["target_images"][0, 1]  # a view keeps its batch
        copies = [{name: value.clone() for name, value in batch.items() if name != "ids"} for batch in kept]
        part_copy = part.clone()
        places = set()
        for _ in range(20):
            places.add(next(loader)["target_images"].data_ptr())
    assert torch.equal(part, part_copy)
    for batch, copy in zip(kept, copies, strict=True):
        assert all(torch.equal(batch[name], copy[name]) for name in copy)
    assert len(places) <= 4  # and memory is used again
