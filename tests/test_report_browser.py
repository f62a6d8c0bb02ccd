"""The report in a headless browser: no error, no scrolling sideways, and what its controls do."""

from __future__ import annotations

import html
import json
import pathlib
import re
import shutil
import subprocess

import pytest

from jaxalign.evaluation.report import write_report
from tests.test_report import make_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")

VISIT = (pathlib.Path(__file__).parent / "report_visit.js").read_text(encoding="utf-8")


def visited(page: pathlib.Path, *, dark: bool = False):
    """What VISIT saw at 1280 and at 390 pixels, and the browser's messages."""
    text = html.escape(page.read_text(encoding="utf-8"), quote=True)
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{text}"></iframe>' for width in (1280, 390))
    holder = page.with_name("holder.html")
    holder.write_text(f'<meta charset="utf-8"><pre></pre>{frames}<script>{VISIT}</script>', encoding="utf-8")
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    command += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=20000"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--blink-settings=preferredColorScheme={int(not dark)}"]
    command += ["--dump-dom", holder.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    messages = [line for line in found.stderr.splitlines() if "CONSOLE" in line]
    pre = re.search("<pre>(.*?)</pre>", found.stdout, re.DOTALL)
    assert pre is not None
    return json.loads(html.unescape(pre.group(1))), messages


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = make_run(tmp_path_factory.mktemp("browser") / "run")
    path = root.parent / "page.html"
    write_report([root], path)
    return path


def test_the_page_in_a_browser(page):
    found, messages = visited(page)
    assert messages == []
    for width in ("1280", "390"):
        saw = found[width]
        assert "error" not in saw, saw["error"]
        assert (saw["wide"], saw["wideOpen"], saw["small"]) == (0, 0, 0), width
        assert (saw["plots"], saw["series"], saw["over"], saw["curves"]) == (2, 4, 2, 1)
        assert (saw["rows"], saw["rowsLess"], saw["rowsAll"]) == (4, 3, 6)
        assert (saw["seriesLess"], saw["pressed"], saw["seriesAgain"]) == (3, "false", 4)
        assert saw["sorted"] == sorted(saw["sorted"], key=float, reverse=True)
        assert saw["sort"] == "descending"
        assert "KL" in saw["tip"]
        assert saw["tipAfter"]
        assert (saw["selects"], saw["columns"], saw["articles"]) == (4, {"1280": 4, "390": 2}[width], 6)
        assert saw["searched"] == 1
        assert set(saw["marked"]) == {"about 3"}
        assert saw["nothing"] == [0, "0 of 6 prompts"]
        assert (saw["cut"], saw["hacked"], saw["hackedStrong"]) == (0, 0, 6)
        assert saw["none"] == "No method is chosen."
        assert saw["images"] == 2  # the page's own scripts
        assert saw["prompt"].startswith("</script><script>alert(1)")
        assert saw["background"] == "rgb(253, 253, 252)"


def test_the_page_in_the_dark(page):
    found, messages = visited(page, dark=True)
    assert messages == []
    assert {found[width]["background"] for width in ("1280", "390")} == {"rgb(22, 24, 27)"}
