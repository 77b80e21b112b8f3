"""The report in Chromium: everything is drawn, on wide and narrow, light and dark screens, without an error."""

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from superoffload.reporting import example, records, report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(example.browser() is None, reason="Chromium is not installed"),
]

MEASURE = """
<script>
const inside = (path) => { const box = path.getBoundingClientRect(); return box.width + box.height > 0; };
const plot = document.querySelector(".plot");
const box = plot.getBoundingClientRect();
plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 9}));
const tip = document.querySelector(".tip:not([hidden])");
parent.document.body.append(Object.assign(parent.document.createElement("pre"), {textContent: JSON.stringify({
  width: innerWidth,
  overflow: document.documentElement.scrollWidth - innerWidth,
  plots: [...document.querySelectorAll(".plot svg")].map((svg) => [svg.clientWidth, svg.clientHeight]),
  paths: [...document.querySelectorAll(".plot path")].map((path) => inside(path)),
  paper: getComputedStyle(document.body).backgroundColor,
  tip: tip && tip.textContent,
})}));
</script>
"""


def show(folder: Path, page: str, width: int, scheme: str) -> tuple[dict[str, Any], str]:
    """Show a page in a frame of so many pixels; return what it measures, and what the browser's console says."""
    frame = folder / "frame.html"
    source = html.escape(page.replace("</body>", MEASURE + "</body>"))
    frame.write_text(f'<iframe srcdoc="{source}" style="width:{width}px;height:900px;border:0"></iframe>')
    colors = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    command = [
        example.browser() or "", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", colors,
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width + 200},1000", "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (measured,) = re.findall(r"<pre>(.*?)</pre>\s*</body>", done.stdout, re.S)
    return json.loads(html.unescape(measured)), "\n".join(
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_everything_is_drawn(width: int, scheme: str, tmp_path: Path) -> None:
    example.write(tmp_path / "run")
    page = report.html(records.read(tmp_path / "run"))
    measured, console = show(tmp_path, page, width, scheme)
    assert console == ""
    assert measured["width"] == width and measured["overflow"] <= 0
    assert len(measured["plots"]) == page.count("<svg") == 8
    assert all(200 < plot[0] <= width and plot[1] >= 200 for plot in measured["plots"])
    assert len(measured["paths"]) > 40 and all(measured["paths"])
    assert measured["paper"] == ("rgb(20, 23, 28)" if scheme == "dark" else "rgb(255, 255, 255)")
    assert re.fullmatch(r"step [\d,]+0\.\d+ training, smoothed0\.\d+ held out( at [\d,]+)?", measured["tip"])


def test_an_error_on_the_page_is_noticed(tmp_path: Path) -> None:
    """Or else the test above would prove nothing."""
    example.write(tmp_path / "run")
    page = report.html(records.read(tmp_path / "run")).replace("JSON.parse", "JSON.pars", 1)
    measured, console = show(tmp_path, page, 390, "light")
    assert "TypeError" in console and measured["tip"] is None
