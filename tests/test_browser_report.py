"""The comparison page in a real browser: wide and narrow, light and dark, with the keyboard alone."""

import shutil
from dataclasses import replace

import pytest
from browser import Browser, browser, needs_browser  # noqa: F401
from test_eval_report import evaluated  # noqa: F401

from eval.failures import note_failures
from eval.report import write_report
from eval.rows import row_folder

pytestmark = needs_browser

VARIANT = "guided: its inputs include tracked views of the person"


@pytest.fixture(scope="module")
def page(evaluated, tmp_path_factory):  # noqa: F811
    """A page of two methods on four subjects, a third in a variant of its own, and two failures."""
    rows, out = evaluated
    results = tmp_path_factory.mktemp("page") / "results"
    shutil.copytree(out, results)

    def folder(row):
        return row_folder(results, row.method, row.checkpoint, row.subject, row.protocol, row.protocol_id)

    more = [replace(row, subject=f"{row.subject}b") for row in rows]
    for row, copy in zip(rows, more, strict=True):
        shutil.copytree(folder(row), folder(copy))
    guided = [replace(row, method="guided", variant=VARIANT) for row in rows if row.method == "darker"]
    for row, copy in zip([row for row in rows if row.method == "darker"], guided, strict=True):
        shutil.copytree(folder(row), folder(copy))
    note_failures(results, "darker", {"s09": "no face in any of its pictures"})
    note_failures(
        results,
        "avat3r",
        {"s01": "it ran out of memory; give each actor more, or run fewer at a time"},
        checkpoint="avat3r-cpu-step100000",
        protocol=f"synthetic-heldout {rows[0].protocol_id}",
    )
    return write_report([*rows, *more, *guided], results, results.parent / "report").as_uri()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out_and_every_picture_loads(browser: Browser, page, width):  # noqa: F811
    browser.open(page, width)
    assert browser.read("document.documentElement.scrollWidth") <= width
    browser.read("document.querySelectorAll('details').forEach(d => { d.open = true })")
    browser.read("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
    pictures = browser.wait(
        "[...document.images].every(i => i.complete) && [...document.images].map(i => i.naturalWidth)"
    )
    assert len(pictures) == (1 + 4 + 8) + (1 + 2 + 2)  # of the protocol, and of the variant
    assert min(pictures) > 100
    assert browser.read("document.documentElement.scrollWidth") <= width


def test_the_page_says_what_was_measured(browser: Browser, page):  # noqa: F811
    browser.open(page, 1280)
    text = browser.text()
    for words in (
        "PSNR ↑ [dB]",
        "nearest-input",
        "no face in any of its pictures",
        "it ran out of memory",
        "avat3r-cpu-step100000",
        VARIANT,
        "sign-flip",
        "GPAvatar",
        "20.7",
    ):
        assert words in text
    # Published numbers stand in tables of their own: no table has both.
    # Nor does a variant stand in a table with the others.
    for stranger in ("GPAvatar", "guided"):
        both = browser.read(
            "[...document.querySelectorAll('table')].filter(t => t.innerText.includes('nearest-input') &&"
            f" t.innerText.includes('{stranger}')).length"
        )
        assert both == 0
    assert (
        browser.read(
            "performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length"
        )
        == 0
    )


def test_colours_follow_the_reader(browser: Browser, page):  # noqa: F811
    seen = []
    for dark in (False, True):
        browser.open(page, 1280, dark=dark)
        seen.append(browser.read("getComputedStyle(document.querySelector('h1')).color"))
    assert seen == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]


def test_folds_open_with_the_keyboard(browser: Browser, page):  # noqa: F811
    browser.open(page, 1280)
    for _ in range(40):
        browser.press("Tab")
        if browser.read("document.activeElement.tagName") == "SUMMARY":
            break
    assert browser.read("document.activeElement.tagName") == "SUMMARY"
    assert not browser.read("document.activeElement.parentElement.open")
    browser.press("Enter")
    assert browser.wait("document.activeElement.parentElement.open")
