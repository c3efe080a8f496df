"""Evaluation of avatars on packed tiny captures: what is measured, on which pictures, and how it is kept."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.gaussians import Gaussians
from avatars.inputs import InputSet
from eval.baselines import nearest_input
from eval.evaluate import Made, evaluate, seconds_a_picture
from eval.meter import Meter
from eval.metrics import PSNR, PSNR_CAP, PSNR_MASKED, SSIM
from eval.protocol import data_hash, frontal_first, head_directions, read_protocol, synthetic_heldout
from eval.rows import read_rows, row_folder
from eval.validate import validation
from shards import open_shards

FORMULAS = (PSNR, SSIM, PSNR_MASKED)


@pytest.fixture(scope="module")
def heldout(tiny_shards):
    return open_shards(tiny_shards, "heldout")


@pytest.fixture(scope="module")
def protocol(heldout):
    return synthetic_heldout(heldout, views=5, metrics=FORMULAS)


@dataclass
class Ball:
    """An avatar of one grey Gaussian whose size follows the first code."""

    expression_kind: str = "arkit-52"
    method: str = "ball"
    shade: float = 0.6

    def gaussians(self, expression: torch.Tensor) -> Gaussians:
        one = torch.ones(1)
        return Gaussians(
            means=torch.zeros(1, 3),
            quats=torch.tensor([[1.0, 0, 0, 0]]),
            scales=(0.03 + 0.02 * expression[0]).expand(1, 3),
            opacities=0.9 * one,
            colors=torch.full((1, 3), self.shade),
        )

    def save(self, folder: Path) -> None:
        raise AssertionError("an evaluation saves no avatar")


@dataclass
class Oracle:
    """Shows the target pictures themselves: it finds them by their cameras."""

    shards: object
    subject: str
    noise: float = 0.0
    expression_kind: str = "arkit-52"
    method: str = "oracle"

    def render(self, expression, cameras, size):
        from avatars.rasterize import Rendering

        for target in self.shards.read(self.subject).targets:
            if torch.equal(target.expression, expression):
                views = [
                    next(v for v, w in enumerate(target.cameras.world_to_camera) if torch.equal(w, wanted))
                    for wanted in cameras.world_to_camera
                ]
                images = target.images(views) + self.noise
                masks = target.masks(views)
                return Rendering(images, masks, torch.zeros_like(masks), torch.zeros(len(views), 0, 2))
        raise AssertionError("asked for an expression that is no target's")


def run(heldout, protocol, out, create=nearest_input, method="nearest-input", **options):
    return evaluate(method, create, heldout, protocol, checkpoint="none", out=out, **options)


def test_targets_are_expressions_and_cameras_that_were_no_input(heldout, protocol, tmp_path):
    (row,) = run(heldout, protocol, tmp_path)
    data = heldout.read(row.subject)
    used = data.input_sets[0].provenance
    shown = {(entry["timestep"], entry["camera"]) for entry in row.pictures}
    assert not {t for t, _ in shown} & set(used["timesteps"])
    assert not {c for _, c in shown} & set(used["camera_ids"])
    free = [target for target in data.targets if target.timestep not in used["timesteps"]]
    assert read_protocol(tmp_path / f"synthetic-heldout-{protocol.id}" / "protocol.json") == protocol
    assert row.counts == {"pictures": 5 * len(free), "timesteps": len(free), "views": 5}
    assert len(shown) == len(row.pictures) == row.counts["pictures"]


def test_showing_the_target_itself_scores_the_cap(heldout, protocol, tmp_path):
    (row,) = run(heldout, protocol, tmp_path, lambda inputs: Oracle(heldout, inputs.subject), "oracle")
    assert row.values["psnr"] == PSNR_CAP
    assert row.values["ssim"] == pytest.approx(1, abs=1e-6)
    assert row.values["psnr_masked"] == PSNR_CAP


def test_less_than_half_a_level_off_rounds_to_the_target(heldout, protocol, tmp_path):
    (row,) = run(heldout, protocol, tmp_path, lambda i: Oracle(heldout, i.subject, noise=0.4 / 255), "oracle")
    assert row.values["psnr"] == PSNR_CAP
    (row,) = run(heldout, protocol, tmp_path, lambda i: Oracle(heldout, i.subject, noise=20 / 255), "oracle")
    # 20 levels brighter everywhere, but a bright pixel stops at white
    assert 22.1 <= row.values["psnr"] < 24


def test_gaussians_are_rasterized_and_driven(heldout, protocol, tmp_path):
    (row,) = run(heldout, protocol, tmp_path, lambda inputs: Ball(), "ball")
    assert 5 < row.values["psnr"] < PSNR_CAP
    folder = row_folder(tmp_path, "ball", "none", row.subject, protocol.name, protocol.id)
    with Image.open(folder / "00-prediction.png") as image:
        assert image.size == (48, 48)
        assert min(image.getpixel((24, 24))) > 100 > max(image.getpixel((0, 0)))
    assert row.create_seconds >= 0
    assert row.drive_fps > 0


def test_the_same_numbers_again_and_one_subject_at_a_time(tiny_shards, tmp_path):
    shards = open_shards(tiny_shards, "train")
    protocol = synthetic_heldout(shards, views=3, timesteps=1, metrics=FORMULAS)
    rows = run(shards, protocol, tmp_path / "a")
    alone = [run(shards, protocol, tmp_path / "b", subjects=[name])[0] for name in reversed(shards.subjects)]
    assert [row.subject for row in rows] == shards.subjects
    for one, other in zip(rows, reversed(alone), strict=True):
        assert one.values == other.values
        assert one.pictures == other.pictures
    assert [replace(row, drive_fps=0.0, create_seconds=0.0) for row in read_rows(tmp_path / "a")] == [
        replace(row, drive_fps=0.0, create_seconds=0.0) for row in rows
    ]


def test_creation_is_seeded_and_leaves_the_callers_randomness_alone(heldout, protocol, tmp_path):
    drawn = []

    def create(inputs: InputSet) -> Ball:
        drawn.append(float(torch.rand(1)))
        return Ball(shade=drawn[-1])

    torch.manual_seed(5)
    expected = float(torch.rand(1))
    torch.manual_seed(5)
    (first,) = run(heldout, protocol, tmp_path, create, "ball")
    assert float(torch.rand(1)) == expected
    (second,) = run(heldout, protocol, tmp_path, create, "ball")
    assert drawn[0] == drawn[1]
    assert first.values == second.values


def test_an_avatar_made_elsewhere_brings_its_seconds(heldout, protocol, tmp_path):
    (row,) = run(heldout, protocol, tmp_path, lambda inputs: Made(Ball(), 123.0, "a GPU"), "ball")
    assert row.create_seconds == 123.0
    assert row.create_hardware == "a GPU"


def test_all_methods_keep_the_same_pictures(heldout, protocol, tmp_path):
    (one,) = run(heldout, protocol, tmp_path)
    (other,) = run(heldout, protocol, tmp_path, lambda inputs: Ball(), "ball")

    def kept(row):
        return [(e["timestep"], e["camera"], e["file"]) for e in row.pictures if "file" in e]

    assert kept(one) == kept(other)
    assert sorted(file for _, _, file in kept(one)) == ["00", "01", "02", "03"]
    first = heldout.read(one.subject).targets[0].camera_ids  # the same cameras at every timestep
    cameras = next(
        t for t in heldout.read(one.subject).targets if t.timestep == one.pictures[0]["timestep"]
    ).cameras
    shown = [first.index(entry["camera"]) for entry in one.pictures[:5]]
    most_frontal = first[shown[frontal_first(cameras[shown])[0]]]
    assert next(camera for _, camera, file in kept(one) if file == "00") == most_frontal
    folder = row_folder(tmp_path, one.method, "none", one.subject, protocol.name, protocol.id)
    names = {path.name for path in folder.iterdir()}
    assert {"row.json", "sheet.png", "input-03.png", "03-target.png", "03-prediction.png"} <= names


def test_another_background_lies_behind_prediction_and_target(heldout, protocol, tmp_path):
    white = replace(protocol, background=(1.0, 1.0, 1.0))
    assert white.id != protocol.id
    (row,) = run(heldout, white, tmp_path, lambda inputs: Ball(), "ball")
    folder = row_folder(tmp_path, "ball", "none", row.subject, white.name, white.id)
    for kind in ("target", "prediction"):
        with Image.open(folder / f"00-{kind}.png") as image:
            assert image.getpixel((0, 0)) == (255, 255, 255)
    (row,) = run(heldout, white, tmp_path)  # renders by itself, over black
    folder = row_folder(tmp_path, "nearest-input", "none", row.subject, white.name, white.id)
    with Image.open(folder / "00-prediction.png") as image:
        assert image.getpixel((0, 0)) == (255, 255, 255)


def test_the_nearest_input_is_the_one_from_the_nearest_direction(heldout):
    inputs = heldout.read(heldout.subjects[0]).input_sets[0]
    avatar = nearest_input(inputs)
    shown = avatar.render(torch.zeros(52), inputs.cameras, inputs.size)
    torch.testing.assert_close(shown.image, inputs.images)
    torch.testing.assert_close(shown.alpha, inputs.masks)
    half = avatar.render(torch.zeros(52), inputs.cameras[[2]], (24, 24))
    assert half.image.shape == (1, 3, 24, 24)
    torch.testing.assert_close(
        half.image, torch.nn.functional.avg_pool2d(inputs.images[2:3], 2), atol=0.15, rtol=0
    )
    away = Cameras.look_at(
        inputs.cameras.K[:1],
        1.3 * inputs.cameras.centers[1:2] + 0.02,
        torch.zeros(3),
        torch.tensor([0.0, 1.0, 0.0]),
    )
    nearest = (head_directions(inputs.cameras) @ head_directions(away)[0]).argmax()
    torch.testing.assert_close(
        avatar.render(torch.zeros(52), away, inputs.size).image[0], inputs.images[nearest]
    )
    with pytest.raises(UserError, match="no Gaussians"):
        avatar.gaussians(torch.zeros(52))
    with pytest.raises(UserError, match="nothing to save"):
        avatar.save(Path("nowhere"))


def test_driving_is_timed_on_the_frontal_camera(heldout):
    target = heldout.read(heldout.subjects[0]).targets[0]
    front = target.cameras[frontal_first(target.cameras)[0]]
    assert head_directions(front)[0, 2] > 0.9
    asked = []

    @dataclass
    class Slow(Ball):
        def gaussians(self, expression):
            asked.append(1)
            return super().gaussians(expression)

    assert seconds_a_picture(Slow(), target.expression, front, (48, 48)) > 0
    assert len(asked) >= 7  # two to warm up, five at least to take the median of


def test_no_number_depends_on_how_many_pictures_are_measured_at_once(heldout, protocol, tmp_path):
    def create(inputs):
        return Ball()

    (all_views,) = run(heldout, protocol, tmp_path, create, "ball")
    for batch in (1, 2):
        (row,) = run(heldout, protocol, tmp_path, create, "ball", batch=batch)
        assert row.values == all_views.values
        assert row.pictures == all_views.pictures


def test_validation_gives_the_numbers_the_id_and_the_pictures_of_an_evaluation(heldout, protocol, tmp_path):
    (row,) = run(heldout, protocol, tmp_path, lambda inputs: Ball(), "ball")
    found = validation(lambda inputs: Ball(), heldout, protocol, limit=1, batch=2)
    assert found.values == row.values
    assert found.protocol_id == row.protocol_id
    assert found.subjects == (row.subject,)
    assert [shown.caption for shown in found.pictures] == [
        f"{row.subject} · t {entry['timestep']} · {entry['camera']}"
        for entry in sorted((e for e in row.pictures if "file" in e), key=lambda e: e["file"])
    ]
    folder = row_folder(tmp_path, "ball", "none", row.subject, protocol.name, protocol.id)
    with Image.open(folder / "00-prediction.png") as image:
        saved = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(found.pictures[0].prediction, saved)
    with pytest.raises(UserError, match="are not what the protocol"):
        validation(lambda inputs: Ball(), heldout, replace(protocol, data="0" * 12))
    with pytest.raises(UserError, match="other metrics than the protocol"):
        validation(lambda inputs: Ball(), heldout, protocol, meter=Meter((PSNR,)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": "0" * 12}, "are not what the protocol"),
        ({"split": "train"}, "are not what the protocol"),
        ({"input_set": 99}, "has 2 input sets; the protocol synthetic-heldout asks for number 99"),
        ({"size": (64, 64)}, "measures at (64, 64)"),
    ],
)
def test_shards_that_do_not_fit_the_protocol_are_refused(heldout, protocol, tmp_path, change, said):
    with pytest.raises(UserError) as refused:
        run(heldout, replace(protocol, **change), tmp_path)
    assert said in str(refused.value)
    assert not list(tmp_path.rglob("row.json"))


def test_methods_that_misbehave_are_named(heldout, protocol, tmp_path):
    with pytest.raises(UserError, match=r"driven by flame-135 codes and .* has arkit-52"):
        run(heldout, protocol, tmp_path, lambda inputs: Ball(expression_kind="flame-135"), "ball")
    with pytest.raises(UserError, match="does not know the subjects nobody"):
        run(heldout, protocol, tmp_path, subjects=["nobody"])
    with pytest.raises(UserError, match=r"prediction of oracle .* not finite"):
        run(heldout, protocol, tmp_path, lambda i: Oracle(heldout, i.subject, noise=float("nan")), "oracle")

    def small(inputs: InputSet):
        avatar = nearest_input(inputs)
        return type(
            "Small",
            (),
            {"expression_kind": "arkit-52", "render": lambda self, e, c, s: avatar.render(e, c, (8, 8))},
        )()

    with pytest.raises(UserError, match="Render at the protocol's size"):
        run(heldout, protocol, tmp_path, small, "small")


def test_the_data_hash_follows_the_bytes_and_not_the_names(heldout):
    manifest = heldout.manifest
    before = data_hash(heldout)
    other = type("Other", (), {"subjects": heldout.subjects, "manifest": None})()
    other.manifest = replace(manifest, shards=tuple(replace(s, path=f"x-{s.path}") for s in manifest.shards))
    assert data_hash(other) == before
    other.manifest = replace(manifest, shards=tuple(replace(s, sha256="0" * 64) for s in manifest.shards))
    assert data_hash(other) != before


def test_progress_is_told(heldout, protocol, tmp_path):
    said = []
    run(heldout, protocol, tmp_path, progress=said.append)
    assert said[0] == f"nearest-input none: subject {heldout.subjects[0]} (1 of 1)"
    assert "psnr" in said[1]
