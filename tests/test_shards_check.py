import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from tiny_captures import pack_tiny

from avatars.errors import UserError
from shards import Manifest, check, contact_sheet, info
from shards.manifest import ShardInfo
from shards.tarfiles import ShardReader, ShardWriter


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack_tiny(tmp_path_factory.mktemp("tiny"), subjects=3, timesteps=5, views=4, size=24, input_sets=1)


@pytest.fixture
def shards(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "shards")


def edit_manifest(folder, change):
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def told(folder, **options):
    return [str(finding) for finding in check(folder, **options)]


def rewrite(folder, path, change):
    """Changes samples of a shard, with a manifest that agrees; `change(key, members)` edits a sample in
    place.
    """
    manifest = Manifest.load(folder)
    shard = next(s for s in manifest.shards if s.path == path)
    reader = ShardReader(folder / path, shard.index)
    samples = {}
    for key in reader.keys:
        members = reader.read(key, list(reader.extensions(key)))
        samples[key] = {extension: bytes(data) for extension, data in members.items()}
    with ShardWriter(folder / path) as writer:
        for key, members in samples.items():
            change(key, members)
            writer.write(key, members)

    def agree(content):
        for entry in content["shards"]:
            if entry["path"] == path:
                entry.update(bytes=writer.size, sha256=writer.sha256, index=writer.index)

    edit_manifest(folder, agree)


def rewrite_json(folder, path, of, change):
    def edit(key, members):
        if key == of:
            described = json.loads(members["json"])
            change(described)
            members["json"] = json.dumps(described).encode()

    rewrite(folder, path, edit)


def test_good_shards_have_no_findings(packed):
    assert told(packed) == []


def test_progress_is_told(packed):
    lines = []
    check(packed, pictures=False, progress=lines.append)
    assert lines == [f"{i}/3 s0{i - 1}-0000.tar: no findings" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: shutil.rmtree(f), "is not there"),
        (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{}"), "cannot be read .*schema"),
        (lambda f: (f / "manifest.json").write_text("]"), "cannot be read"),
        (
            lambda f: edit_manifest(f, lambda m: m.__setitem__("schema", 99)),
            "schema 99, this version reads up to 3",
        ),
        (lambda f: edit_manifest(f, lambda m: m["settings"].__setitem__("new", 1)), "cannot be read .*new"),
        (
            lambda f: edit_manifest(f, lambda m: m["shards"][0].__setitem__("path", "../x.tar")),
            "plain file name",
        ),
        (lambda f: (f / "s01-0000.tar").unlink(), r"s01-0000.tar is named by the manifest but is not there"),
        (
            lambda f: (f / "s01-0000.tar").write_bytes((f / "s01-0000.tar").read_bytes()[:-512]),
            r"s01-0000.tar has \d+ bytes where the manifest says \d+: it was cut short",
        ),
    ],
)
def test_a_wrong_folder_is_a_sentence(shards, damage, sentence):
    damage(shards)
    with pytest.raises(UserError, match=sentence):
        Manifest.load(shards)


def test_missing_short_and_changed_shards_are_found(shards):
    (shards / "s00-0000.tar").unlink()
    short = shards / "s01-0000.tar"
    short.write_bytes(short.read_bytes()[:9000])
    changed = bytearray((shards / "s02-0000.tar").read_bytes())
    changed[-2000] ^= 1
    (shards / "s02-0000.tar").write_bytes(changed)
    (shards / "other.tar").write_bytes(b"")
    findings = "\n".join(told(shards))
    assert "error: s00-0000.tar: is not there." in findings
    assert "error: s01-0000.tar: has 9000 bytes" in findings
    assert "error: s02-0000.tar: has the hash" in findings
    assert "warning: other.tar: is beside the manifest but not in it." in findings


def test_a_leaking_split_is_found(shards):
    edit_manifest(shards, lambda m: m["train"].append(m["heldout"][0]))
    assert any(
        "s02 is both a training and a held-out subject" in line for line in told(shards, pictures=False)
    )


def test_a_renamed_subject_is_found_by_its_pictures(shards):
    twin = shards / "s03-0000.tar"
    shutil.copy(shards / "s00-0000.tar", twin)

    def add(content):
        entry = dict(
            next(e for e in content["shards"] if e["subject"] == "s00"), path=twin.name, subject="s03"
        )
        content["shards"].append(entry)
        content["heldout"].append("s03")

    edit_manifest(shards, add)
    rewrite(shards, twin.name, lambda key, m: m.update(json=m["json"].replace(b'"s00"', b'"s03"')))
    assert any(
        "shows the same picture as s00-0000.tar: target-" in line for line in told(shards, pictures=False)
    )


@pytest.mark.parametrize(
    ("of", "change", "sentence"),
    [
        ("target-00001", lambda d: d["expression"].pop(), "has a code of 51 numbers, not 52"),
        (
            "target-00001",
            lambda d: d["expression"].__setitem__(0, float("nan")),
            "code with numbers that are not finite",
        ),
        ("target-00001", lambda d: d["cameras"][0]["K"][0].__setitem__(0, float("inf")), "not finite"),
        ("target-00001", lambda d: d["cameras"][0]["world_to_camera"][0].__setitem__(0, 7), "is no rotation"),
        (
            "target-00001",
            lambda d: d["cameras"][0]["world_to_camera"][0].__setitem__(3, 9),
            "outside the picture",
        ),
        (
            "target-00001",
            lambda d: d["cameras"][0].__setitem__("camera", "c01"),
            "has the camera c01 2 times",
        ),
        ("target-00001", lambda d: d["cameras"].pop(), "other numbers of views than the manifest says"),
        ("target-00001", lambda d: d["cameras"].clear(), "has no cameras"),
        ("target-00001", lambda d: d.__setitem__("timestep", "00000"), "timestep 00000 is there 2 times"),
        ("target-00001", lambda d: d.__setitem__("subject", "s09"), "is of s09 where the manifest says s00"),
        ("target-00001", lambda d: d.pop("cameras"), "lacks a field"),
        ("target-00001", lambda d: d.__setitem__("kind", "inputs"), "says that it is a 'inputs'"),
        (
            "inputs-000",
            lambda d: d["pictures"][0].__setitem__("timestep", d["pictures"][1]["timestep"]),
            "timesteps",
        ),
    ],
)
def test_wrong_descriptions_are_found(shards, of, change, sentence):
    timesteps = [json.loads(_read(shards, f"target-{i:05d}"))["timestep"] for i in range(5)]
    if timesteps[1] == "00000" and "00000 is there 2" in sentence:
        of = "target-00002"
    rewrite_json(shards, "s00-0000.tar", of, change)
    assert any(sentence in line for line in told(shards, pictures=False)), told(shards, pictures=False)


def _read(folder, key):
    shard = next(s for s in Manifest.load(folder).shards if s.path == "s00-0000.tar")
    return bytes(ShardReader(folder / shard.path, shard.index).read(key, ["json"])["json"])


def _array(array) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.pop("001.jpg"), "target-00000.001.jpg: is missing"),
        (lambda m: m.update({"009.jpg": b""}), "target-00000.009.jpg: belongs to no picture"),
        (lambda m: m.update({"001.jpg": b"x"}), "is not a readable JPEG"),
        (lambda m: m.update({"001.mask.png": b"x" * 40}), "is not a readable mask"),
        (lambda m: m.update({"001.mask.png": m["001.mask.png"][:-30]}), "is not a readable mask"),
    ],
)
def test_wrong_pictures_are_found(shards, change, sentence):
    rewrite(shards, "s00-0000.tar", lambda key, m: change(m) if key == "target-00000" else None)
    assert any(sentence in line for line in told(shards)), told(shards)


def test_empty_masks_and_picture_bombs_are_found(shards):
    from shards.codecs import encode_picture
    from shards.pictures import encode_mask

    bomb = encode_picture(np.zeros((4000, 4000, 3), np.uint8), "jpeg", 50, "420")

    def change(key, members):
        if key == "target-00000":
            members["000.mask.png"] = encode_mask(np.zeros((24, 24), np.uint8))
            members["001.jpg"] = bomb
            members["002.mask.png"] = encode_mask(np.zeros((4000, 4000), np.uint8))

    rewrite(shards, "s00-0000.tar", change)
    findings = "\n".join(told(shards))
    assert "target-00000.000: has an empty mask" in findings
    assert "picture of 4000 x 4000 pixels where 24 x 24 are declared" in findings
    assert "mask of 4000 x 4000 pixels where 24 x 24 are declared" in findings


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((1, 24, 24), np.float16), "has a confidence of 0, below 1"),
        (np.full((1, 24, 24), np.nan, np.float16), "not finite"),
        (np.ones((1, 24, 25), np.float16), "is float16 (1, 24, 25)"),
        (np.array([{"a": 1}], dtype=object), "cannot be read (Object arrays cannot be loaded"),
    ],
)
def test_wrong_priors_are_found(shards, array, sentence):
    change = lambda key, m: m.update({"00.confidence.npy": _array(array)}) if key == "inputs-000" else None
    rewrite(shards, "s00-0000.tar", change)
    assert any(sentence in line for line in told(shards)), told(shards)


def member(name="target-00000.json", size=0, kind=tarfile.REGTYPE, data=b""):
    header = tarfile.TarInfo(name)
    header.size, header.type = size, kind
    if kind == tarfile.SYMTYPE:
        header.linkname = "/etc/passwd"
    return header.tobuf(tarfile.USTAR_FORMAT) + data


@pytest.mark.parametrize(
    ("first", "sentence"),
    [
        (member("../../etc/passwd"), "name leads elsewhere"),
        (member("/etc/passwd"), "name leads elsewhere"),
        (member("a/b.json"), "name leads elsewhere"),
        (member(kind=tarfile.CHRTYPE), "no regular file"),
        (member(kind=tarfile.SYMTYPE), "no regular file"),
        (member(kind=tarfile.FIFOTYPE), "no regular file"),
        (member(size=8 * 2**30 - 1), "goes past the end of the file"),
        (member("weird.pkl"), "is a member that no shard has"),
        (b"\x80" * 512, "no valid tar header"),
        (member()[:100], "cut short"),
    ],
)
def test_hostile_tars_are_described_and_not_unpacked(shards, first, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    content = first + (bytes(1024) if len(first) == 512 else b"")
    (shards / "s00-0000.tar").write_bytes(content)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    assert any(sentence in line for line in told(shards)), told(shards)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_lying_index_is_refused(shards):
    manifest = Manifest.load(shards)
    shard = manifest.shards[0]
    path = shards / shard.path
    with pytest.raises(UserError, match="damaged"):
        ShardReader(path, (shard.index[0] + 512, shard.index[1]))
    with pytest.raises(UserError, match="cut short"):
        ShardReader(path, (shard.index[0], 10**12))
    with pytest.raises(UserError, match="damaged"):
        ShardReader(path, (shard.index[0], -5))
    reader = ShardReader(path, shard.index)
    with pytest.raises(UserError, match="has no sample target-00099"):
        reader.read("target-00099", ["json"])
    with pytest.raises(UserError, match=r"target-00000 has no 099.jpg"):
        reader.read("target-00000", ["099.jpg"])


def set_shard(number, **values):
    return lambda m: m["shards"][number].update(values)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m["train"].append("s07"), "error: manifest.json: s07 is in the split but has no shard."),
        (lambda m: m["train"].remove("s00"), "error: manifest.json: s00 has shards but is in no split."),
        (lambda m: m["heldout"].clear(), "warning: manifest.json: the heldout split is empty."),
        (lambda m: m["expression_mean"].pop(), "the statistics of the codes are not two lists of 52 finite"),
        (
            lambda m: m["expression_std"].__setitem__(0, float("nan")),
            "error: manifest.json: the statistics of the codes are not two lists of 52 finite numbers.",
        ),
        (set_shard(1, path="s00-0000.tar"), "error: manifest.json: 2 shards have the name s00-0000.tar."),
        (lambda m: set_shard(1, sha256=m["shards"][0]["sha256"])(m), "error: manifest.json: 2 shards have the hash"),
        (set_shard(0, views=[4] * 6), "s00-0000.tar: has 5 target samples where the manifest says 6."),
        (set_shard(0, inputs=[]), "s00-0000.tar: has 1 inputs samples where the manifest says 0."),
    ],
)  # fmt: skip
def test_manifests_that_do_not_agree_are_found(shards, change, sentence):
    edit_manifest(shards, change)
    lines = told(shards, pictures=False)
    assert any(line.startswith(sentence) or sentence in line for line in lines), lines


def test_a_member_that_is_there_twice_is_found(shards):
    path = shards / "s00-0000.tar"
    content = path.read_bytes()
    size = int(content[124:135], 8)
    first = content[: 512 + -(-size // 512) * 512]
    path.write_bytes(first + content)
    assert "error: s00-0000.tar: inputs-000.json: is there twice." in told(shards, pictures=False)


def test_a_capture_and_a_picture_in_both_splits_are_found(shards):
    def leak(key, members):
        if key == "target-00000":
            members["json"] = members["json"].replace(b'"capture":"s02"', b'"capture":"s00"')
            members["000.jpg"] = stolen

    shard = Manifest.load(shards).shards[0]
    stolen = bytes(ShardReader(shards / shard.path, shard.index).read("target-00002", ["000.jpg"])["000.jpg"])
    rewrite(shards, "s02-0000.tar", leak)
    lines = told(shards)
    assert "error: s00: this capture is in both the training and the held-out split." in lines
    assert any(
        "shows the same picture as s00-0000.tar: target-00002, across the split" in line for line in lines
    )


def test_many_findings_of_a_kind_are_counted(shards):
    rewrite(shards, "s00-0000.tar", lambda k, m: [m.pop(e) for e in list(m) if e.endswith("jpg")])
    findings = told(shards)
    assert sum("is missing" in line for line in findings) == 20
    assert any("and 4 more findings" in line for line in findings)


def test_info_is_a_table(packed):
    text = str(info(packed))
    assert "3 subjects, 3 shards" in text
    assert "codes arkit-52 of 52 numbers, makehuman head" in text
    rows = [line.split() for line in text.splitlines()[-3:]]
    assert [row[:6] for row in rows] == [
        ["s00", "train", "1", "1", "5", "20"],
        ["s01", "train", "1", "1", "5", "20"],
        ["s02", "heldout", "1", "1", "5", "20"],
    ]


def test_the_contact_sheet_shows_every_subject(packed, tmp_path):
    out = contact_sheet(packed, tmp_path / "sheet.png", targets=2)
    with Image.open(out) as sheet:
        assert sheet.size == (6 * 24, 3 * 24)
        pixels = np.asarray(sheet).reshape(3, 24, 6, 24, 3)
    assert (pixels.max((1, 3, 4)) > 100).all()
    with pytest.raises(UserError, match="cannot be written"):
        contact_sheet(packed, tmp_path / "no" / "sheet.png")


def test_a_manifest_survives_saving(packed, tmp_path):
    manifest = Manifest.load(packed)
    assert isinstance(manifest.shards[0], ShardInfo)
    import dataclasses

    again = dataclasses.replace(manifest, folder=tmp_path)
    again.save()
    assert (tmp_path / "manifest.json").read_text() == (packed / "manifest.json").read_text()
    assert Manifest.read(tmp_path).fingerprint == manifest.fingerprint
