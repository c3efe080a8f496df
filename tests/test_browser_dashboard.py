"""MLflow's dashboard in a real browser: see the runs, select two, compare, read their PSNR."""

import os
import signal
import subprocess
import time
import urllib.request
from dataclasses import replace

import pytest
from browser import Browser, browser, needs_browser  # noqa: F401
from test_eval_rows import ROW
from test_eval_tracking import results

from eval.runs import log_evaluation
from eval.tracking import dashboard_command, dashboard_pages
from launch.preflight import free_port

pytestmark = [needs_browser, pytest.mark.e2e]


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    """A served store with three runs of one protocol; the page of its runs."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    for method, psnr in (("avat3r", 26.875), ("flashavatar", 25.414), ("nearest-input", 16.921)):
        row = replace(ROW, method=method, values={"psnr": psnr})
        log_evaluation([row], results(folder, [row]), uri)
    port = free_port(None)
    address = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            dashboard_command(uri, port), stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    try:
        while True:
            assert server.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except OSError:
                time.sleep(0.2)
        yield dashboard_pages(uri, address)[f"{ROW.protocol} {ROW.protocol_id}"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def test_two_runs_are_compared(browser: Browser, dashboard):  # noqa: F811
    browser.open(dashboard, 1400)
    boxes = "[...document.querySelectorAll(\"input[aria-label^='Press Space']\")]"
    browser.wait(f"{boxes}.length >= 3")
    text = browser.text()
    assert all(name in text for name in ("avat3r", "flashavatar", "nearest-input"))
    browser.read(f"{boxes}.slice(0, 2).forEach(box => box.click())")
    compare = "[...document.querySelectorAll('button')].find(button => button.innerText.trim() === 'Compare')"
    browser.wait(f"!!{compare}")
    browser.read(f"{compare}.click()")
    browser.wait("document.body.innerText.includes('eval/psnr')")
    compared = browser.wait("document.body.innerText.includes('Comparing 2 Runs') && document.body.innerText")
    # The newest two are listed first.
    assert "16.92" in compared
    assert "25.41" in compared
    assert "26.87" not in compared
