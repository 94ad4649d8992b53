"""Make the images of the documents from real runs.

They show the demo, a run at two widths and an error in a terminal, and the demo's report
and `clipft browse` in a browser. This needs tmux and chromium.

    python docs/pictures/make.py [FOLDER]      # keeps the demo in FOLDER; default: a temporary one
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

HERE = Path(__file__).parent
HEIGHT = 70
SERVER, SESSION = f"clipft-{os.getpid()}", "pictures"
"""A tmux server of its own, so that nobody else's session is touched."""
TRAIN = (
    "clipft train --model tiny --data-dir clipft-demo/data --output-dir {folder} --epochs 3 "
    "--effective-batch-size 64 --lr 4e-3 --max-train-pairs 768 --max-val-pairs 200"
)
_FONTS = re.compile(r"@font-face\s*\{.*?\}\s*", re.S)


def tmux(*args: str) -> str:
    return subprocess.run(
        ["tmux", "-L", SERVER, *args], check=True, capture_output=True, text=True
    ).stdout


def screen() -> str:
    return tmux("capture-pane", "-p", "-e", "-t", SESSION).rstrip()


def watched(command: str, width: int, folder: Path, middle: str = "") -> tuple[str, str]:
    """Run ``command`` in a terminal of ``width`` columns.

    Return what the terminal shows at the end, and what it showed when ``middle`` was last visible,
    both with their escape codes.
    """
    shell = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; {command}"
    size = ("-x", str(width), "-y", str(HEIGHT))
    tmux("new-session", "-d", "-s", SESSION, *size, "-c", str(folder), f"{shell}; echo DONE; cat")
    try:
        in_the_middle = ""
        while "DONE" not in (shown := screen()):
            in_the_middle = shown if middle and middle in shown else in_the_middle
            time.sleep(0.2)
        return shown.replace("DONE", "").rstrip(), in_the_middle
    finally:
        tmux("kill-session", "-t", SESSION)


def draw(captured: str, name: str, width: int, title: str) -> None:
    """Write a terminal's content as an SVG file that loads nothing from the network."""
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=width, file=nowhere, force_terminal=True)
        for line in captured.splitlines():
            console.print(Text.from_ansi(line), no_wrap=True, crop=False, highlight=False)
        svg = console.export_svg(title=title, theme=MONOKAI, unique_id=name)
    svg = _FONTS.sub("", svg).replace("Fira Code, monospace", "monospace")
    lines = [line.rstrip() for line in svg.splitlines()]
    (HERE / f"{name}.svg").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_terminal(folder: Path) -> None:
    whole, _ = watched("clipft demo", 100, folder)
    # Without the last line: the time depends on the machine
    draw(whole.rpartition("\n")[0], "demo", 100, "clipft demo")
    for width in (80, 140):
        command = TRAIN.format(folder=f"runs-{width}")
        _, middle = watched(command, width, folder, middle="epoch 3/3 step")
        draw(middle, f"train-{width}", width, "clipft train")
    wrong = "clipft train --scenario doal_lora --lr x"
    draw(watched(wrong, 80, folder)[0], "error", 80, wrong)


def draw_report(page: Path) -> None:
    """Write a screenshot of a report."""
    shot = HERE / "report.png"
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu",
             f"--user-data-dir={profile}", "--window-size=740,955",
             "--virtual-time-budget=5000", f"--screenshot={shot}", page.as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
    _shrink(shot)


def draw_browse(run: Path) -> None:
    """Write a screenshot of a search in `clipft browse`."""
    from playwright.sync_api import sync_playwright

    shot = HERE / "browse.png"
    data = run.parent.parent / "data"
    command = [sys.executable, "-m", "clipft", "browse", run, data, "--no-open", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            url = json.loads(server.stdout.readline())["url"]
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path=shutil.which("chromium"), args=["--no-sandbox"]
                )
                page = browser.new_page(viewport={"width": 1000, "height": 900})
                page.goto(url)
                page.fill("#words", "a green armchair")
                page.press("#words", "Enter")
                page.wait_for_selector("#list-1 li")
                page.wait_for_load_state("networkidle")
                page.screenshot(path=shot)
        finally:
            server.terminate()
    _shrink(shot)


def _shrink(shot: Path) -> None:
    from PIL import Image

    Image.open(shot).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(
        shot, optimize=True
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    draw_terminal(folder)
    run = folder / "clipft-demo" / "runs" / "dual_lora"
    draw_report(run / "report.html")
    draw_browse(run)
