"""The pages have no violation that axe-core finds in a real browser, in light and dark colors.

Needs Chromium, and axe-core from npm: `npm pack axe-core` and the path of its axe.min.js in
AXE_CORE, or node_modules/axe-core beside the checkout. `.ci/run` brings it.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from clipft.ablation.page import ablation_page
from clipft.cli.app import run
from clipft.report.html import write_page
from tests.ablation.test_summary import a_run, content_of, failed
from tests.report.test_report import made  # noqa: F401  # a fixture

ROOT = Path(__file__).parents[2]
AXE = Path(os.environ.get("AXE_CORE", ROOT / "build" / "axe-core" / "axe.min.js"))
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.skipif(not BROWSER, reason="there is no Chromium"),
    pytest.mark.skipif(not AXE.is_file(), reason="there is no axe-core (see .ci/run)"),
]

CHECK = """<script>{axe}</script><script>
for (const details of document.querySelectorAll("details")) details.open = true;
const words = document.getElementById("words");
if (words) {{ words.value = "alert"; words.dispatchEvent(new Event("input")); }}
axe.run().then((found) => {{
  const result = document.createElement("pre");
  result.id = "axe-result";
  result.textContent = JSON.stringify(found.violations.map(
    (v) => [v.id, v.impact, v.nodes.map((n) => n.html.slice(0, 120)).slice(0, 3)]));
  document.body.append(result);
}});
</script></body>"""


def violations(page: Path, folder: Path, dark: bool) -> list[object]:
    html = page.read_text(encoding="utf-8")
    if dark:
        html = html.replace("@media (prefers-color-scheme: dark)", "@media all")
    copy = folder / "page.html"
    script = CHECK.format(axe=AXE.read_text(encoding="utf-8"))
    copy.write_text(html.replace("</body>", script), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="axe-result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, "axe did not run"
    return list(
        json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_of_an_inspection(made, tmp_path, dark):  # noqa: F811
    page = tmp_path / "inspection.html"
    assert run(["inspect", str(made / "data"), "--model", "tiny", "--html", str(page)]) == 0
    assert violations(page, tmp_path, dark) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_of_an_ablation(tmp_path, dark):
    runs = [a_run(name, seed, 0.3 + seed / 50) for name in ("full", "dual_lora") for seed in (1, 2)]
    content = content_of(a_run("zero_shot", 1, None), *runs, failed("linear_probe", 1))
    page = tmp_path / "report.html"
    write_page(page, ablation_page(content))
    assert violations(page, tmp_path, dark) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_of_a_run(made, tmp_path, dark):  # noqa: F811
    assert violations(made / "runs" / "dual_lora" / "report.html", tmp_path, dark) == []
