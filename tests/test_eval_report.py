"""Tables, sheets and the comparison page."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from test_eval_rows import ROW

from avatars.errors import UserError
from eval.baselines import nearest_input
from eval.evaluate import evaluate
from eval.metrics import LPIPS, PSNR, SSIM
from eval.protocol import synthetic_heldout
from eval.report import write_report
from eval.rows import row_folder
from eval.sheets import SheetColumn, comparison_sheet, contact_sheet, error_picture, save_picture
from eval.tables import by_protocol, table
from shards import open_shards


@pytest.fixture(scope="module")
def evaluated(tiny_shards, tmp_path_factory):
    """Rows and pictures of two methods on two subjects, and their folder."""
    shards = open_shards(tiny_shards, "train")
    protocol = synthetic_heldout(shards, views=3, timesteps=2, metrics=(PSNR, SSIM, LPIPS))
    out = tmp_path_factory.mktemp("results")
    two = protocol.subjects[:2]

    def darker(inputs):
        avatar = nearest_input(inputs)
        return replace(avatar, images=avatar.images * 0.5, method="darker")

    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HEADSPLAT_WEIGHTS", raising=False)
        patch.setenv("TORCH_HOME", str(out / "none"))
        for name, create in (("nearest-input", nearest_input), ("darker", darker)):
            rows += evaluate(name, create, shards, protocol, checkpoint="none", out=out, subjects=two)
    return rows, out


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_means_of_metrics_and_medians_of_times():
    rows = [
        replace(ROW, subject="s01", values={"psnr": 20.0, "ssim": 0.5}, create_seconds=1.0, drive_fps=10.0),
        replace(ROW, subject="s02", values={"psnr": 30.0, "ssim": 0.7}, create_seconds=2.0, drive_fps=20.0),
        replace(ROW, subject="s03", values={"psnr": 31.0, "ssim": 0.9}, create_seconds=90.0, drive_fps=30.0),
    ]
    better = [
        replace(row, method="best", values={"psnr": row.values["psnr"] + 1, "ssim": 0.9}) for row in rows
    ]
    lines = table(rows + better).splitlines()
    assert cells(lines[0]) == ["method", "PSNR ↑ [dB]", "SSIM ↑", "seconds to create", "frames a second"]
    assert cells(lines[2]) == ["best", "28.00", "0.900", "2.00", "20.0"]
    assert cells(lines[3]) == ["avat3r", "27.00", "0.700", "2.00", "20.0"]
    assert len({len(line) for line in lines[:4]}) == 1  # aligned also where Markdown is not rendered
    assert "synthetic-heldout 0123456789ab: 3 subjects, 6 pictures a method." in lines


def test_the_table_says_what_has_no_number_and_why():
    rows = [
        replace(ROW, values={"psnr": 20.0, "akd/mtcnn-5": 3.0}),
        replace(ROW, subject="s02", values={"psnr": 22.0}),
    ]
    rows[1].missing["akd/mtcnn-5"] = "not available: a face was found in none of the 2 pictures"
    text = table(rows)
    assert cells(text.splitlines()[0])[1:3] == ["PSNR ↑ [dB]", "AKD-5 (MTCNN) ↓ [px]"]
    assert cells(text.splitlines()[2])[1:3] == ["21.00", "n/a"]
    assert "LPIPS (alex): not available: it needs a file." in text
    assert "AKD-5 (MTCNN): not available: a face was found in none of the 2 pictures." in text
    assert "AKD-5 (MTCNN): pictures left out, of 4: avat3r 2." in text


def test_checkpoints_of_one_method_are_told_apart():
    text = table([ROW, replace(ROW, checkpoint="step-200", values={"psnr": 26.0})])
    assert [cells(line)[0] for line in text.splitlines()[2:4]] == ["avat3r step-200", "avat3r step-100"]


def test_what_does_not_compare_gets_no_table():
    with pytest.raises(UserError, match="2 protocols"):
        table([ROW, replace(ROW, protocol_id="ffff")])
    with pytest.raises(UserError, match="no result rows"):
        table([])
    with pytest.raises(UserError, match="2 variants"):
        table([ROW, replace(ROW, method="other", variant="guided")])
    with pytest.raises(UserError, match="Evaluate at least one method on all subjects"):
        table([ROW, replace(ROW, method="other", subject="s02")])
    groups = by_protocol([ROW, replace(ROW, protocol_id="ffff"), replace(ROW, subject="s02")])
    assert {name: len(rows) for name, rows in groups.items()} == {
        "synthetic-heldout 0123456789ab": 2,
        "synthetic-heldout ffff": 1,
    }


def test_a_run_that_lacks_subjects_is_left_out_and_told():
    text = table([ROW, replace(ROW, subject="s02"), replace(ROW, method="other", subject="s02")])
    assert [cells(line)[0] for line in text.splitlines() if line.startswith("| ")][2:] == ["avat3r"]
    assert "other step-100 is left out: it has 1 rows for 2 subjects (missing: s01)" in text


def test_the_table_tells_when_not_all_people_were_measured():
    assert "synthetic-heldout 0123456789ab: 1 of the protocol's 4 subjects, 2 pictures" in table(
        [ROW], people=4
    )
    assert "1 subjects, 2 pictures" in table([ROW], people=1)
    assert "Timed on a machine, 2 threads." in table([ROW])
    assert "Timed on a machine, 2 threads, 8 rows at a time." in table([replace(ROW, at_a_time=8)])


def test_a_page_on_which_nothing_compares_says_so(evaluated, tmp_path):
    rows, out = evaluated
    text = write_report([rows[0], rows[-1]], out, tmp_path).read_text()
    assert "Evaluate at least one method on all subjects." in text
    assert "Published numbers" in text


def test_rows_of_a_variant_have_a_table_of_their_own():
    guided = replace(ROW, method="other", variant="guided: sees tracked views", values={"psnr": 30.0})
    groups = by_protocol([guided, ROW])
    assert list(groups) == [
        "synthetic-heldout 0123456789ab",
        "synthetic-heldout 0123456789ab · guided: sees tracked views",
    ]
    assert [[row.method for row in rows] for rows in groups.values()] == [["avat3r"], ["other"]]


def test_the_error_picture_is_black_where_equal_and_bright_where_not():
    target = torch.full((3, 4, 4), 0.5)
    prediction = target.clone()
    prediction[:, 0, 0] = 1.0
    prediction[:, 0, 1] = 0.55
    colors = error_picture(prediction, target)
    assert colors.shape == (3, 4, 4)
    assert colors[:, 2, 2].tolist() == [0, 0, 0]
    assert colors[:, 0, 0].sum() > 2.4
    assert 0 < colors[:, 0, 1].sum() < colors[:, 0, 0].sum()


@pytest.mark.parametrize("size", [(24, 24), (300, 200)])
@pytest.mark.parametrize("counts", [(4, 4), (4, 1), (1, 3)])
def test_a_contact_sheet_shows_what_it_was_given(size, counts):
    inputs = [torch.full((3, *size), 0.9) for _ in range(counts[0])]
    columns = [
        SheetColumn(torch.full((3, *size), 0.5), torch.full((3, *size), 0.25), "t 0 · c0", 12.3)
        for _ in range(counts[1])
    ]
    sheet = contact_sheet(inputs, ["t · c"] * counts[0], columns, title="a method " * 30, note="p 0123")
    pixels = np.asarray(sheet)
    assert pixels[0, 0].tolist() == [0, 0, 0]
    for grey in (230, 128, 64):
        assert (pixels == grey).all(axis=-1).any()


def test_the_comparison_puts_all_methods_on_the_same_targets(evaluated):
    rows, out = evaluated
    sheet = comparison_sheet(rows, out)
    assert sheet.mode == "RGB"
    one = comparison_sheet([row for row in rows if row.method == "darker"], out, subjects=1)
    assert one.width == sheet.width - 234  # a column less
    assert one.height < sheet.height
    with pytest.raises(UserError, match="nothing to put side by side"):
        comparison_sheet([rows[0], replace(rows[1], method="other")], out)
    with pytest.raises(UserError, match="holds no pictures"):
        comparison_sheet([replace(row, checkpoint="gone") for row in rows], out)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_page_holds_everything_itself(evaluated, tmp_path):
    rows, out = evaluated
    page = write_report(rows, out, tmp_path / "report")
    text = page.read_text()
    parsed = Page(text)
    assert parsed.open == []
    assert {"darker", "nearest-input", "PSNR ↑ [dB]"} <= set(parsed.cells)
    assert len(parsed.images) == 1 + 2 * 2 + len(rows)  # side by side, best and worst of two, a sheet a row
    assert all(image["src"].startswith("data:image/jpeg;base64,") and image["alt"] for image in parsed.images)
    assert not re.search(r"(src|href)=['\"](?!data:|#)", text)
    assert "LPIPS (alex): not available" in text
    markdown = (tmp_path / "report" / "report.md").read_text()
    (name,) = re.findall(r"\((comparison-\w+\.png)\)", markdown)
    with Image.open(tmp_path / "report" / name) as image:
        assert image.width > 600
    assert table(rows, full=True, people=3) in markdown


def test_a_page_of_two_protocols_has_two_sections(evaluated, tmp_path):
    rows, out = evaluated
    other = [replace(row, protocol_id="ffff") for row in rows]
    for row in rows:
        folder = row_folder(out, row.method, row.checkpoint, row.subject, row.protocol, row.protocol_id)
        copy = row_folder(out, row.method, row.checkpoint, row.subject, row.protocol, "ffff")
        copy.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
    text = write_report(rows + other, out, tmp_path).read_text()
    assert text.count("<section") == 4  # two protocols, failures, published numbers
    with pytest.raises(UserError, match="no result rows to report"):
        write_report([], out, tmp_path)


def test_names_from_outside_cannot_write_html(evaluated, tmp_path):
    rows, out = evaluated
    evil = [replace(row, method="<script>x</script>") for row in rows if row.method == "darker"]
    for row in evil:
        folder = row_folder(out, row.method, row.checkpoint, row.subject, row.protocol, row.protocol_id)
        source = row_folder(out, "darker", row.checkpoint, row.subject, row.protocol, row.protocol_id)
        folder.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    text = write_report(evil, out, tmp_path).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_a_saved_picture_is_the_picture(tmp_path):
    picture = torch.randint(0, 256, (3, 5, 7)) / 255
    save_picture(picture, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        pixels = np.asarray(image)
    np.testing.assert_array_equal(pixels, (picture * 255).round().byte().permute(1, 2, 0).numpy())


def test_a_metric_of_somebodys_own_has_its_column():
    text = table([replace(ROW, values={"psnr": 20.0, "sharpness": 0.25})])
    assert cells(text.splitlines()[0])[1:3] == ["PSNR ↑ [dB]", "sharpness"]
    assert cells(text.splitlines()[2])[1:3] == ["20.00", "0.250"]
