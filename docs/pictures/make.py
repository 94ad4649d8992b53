"""Makes the pictures of the documents from a real run: the demo in a terminal of 100 columns, and
its report in a browser. Needs tmux and chromium.

    python docs/pictures/make.py [FOLDER]      # the demo is left there; a temporary one otherwise
"""

import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

HERE = Path(__file__).parent
WIDTH, HEIGHT = 100, 70
SESSION = "clipft-pictures"
_FONTS = re.compile(r"@font-face\s*\{.*?\}\s*", re.S)


def tmux(*args: str) -> str:
    return subprocess.run(["tmux", *args], check=True, capture_output=True, text=True).stdout


def screen() -> str:
    return tmux("capture-pane", "-p", "-e", "-t", SESSION).rstrip()


def draw(captured: str, name: str, title: str) -> None:
    """The terminal's content, escape codes and all, as an SVG that loads nothing."""
    with Path("/dev/null").open("w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        for line in captured.splitlines():
            console.print(Text.from_ansi(line), no_wrap=True, crop=False, highlight=False)
        picture = console.export_svg(title=title, theme=MONOKAI, unique_id=name)
    picture = _FONTS.sub("", picture).replace("Fira Code, monospace", "monospace")
    lines = [line.rstrip() for line in picture.splitlines()]
    (HERE / f"{name}.svg").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_demo(folder: Path) -> None:
    clipft = Path(sys.executable).with_name("clipft")
    command = f"{shlex.quote(str(clipft))} demo; echo DONE; sleep 600"
    tmux("new-session", "-d", "-s", SESSION, "-x", str(WIDTH), "-y", str(HEIGHT), "-c", str(folder),
         command)  # fmt: skip
    try:
        in_the_middle = ""
        while "DONE" not in (shown := screen()):
            if ("epoch 2/3" in shown and "samples/s" in shown) or "pairs/s" in shown:
                in_the_middle = shown
            time.sleep(0.2)
        draw(in_the_middle, "training", "clipft demo, the last step")
        whole = shown.replace("DONE", "").rstrip()
        draw(
            whole.rpartition("\n")[0], "demo", "clipft demo"
        )  # not the time, which is the machine's
    finally:
        tmux("kill-session", "-t", SESSION)


def photograph(page: Path) -> None:
    shot = HERE / "report.png"
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu",
             f"--user-data-dir={profile}", "--window-size=740,955",
             "--virtual-time-budget=5000", f"--screenshot={shot}", page.as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
    from PIL import Image

    Image.open(shot).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(
        shot, optimize=True
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    run_demo(folder)
    photograph(folder / "clipft-demo" / "runs" / "dual_lora" / "report.html")
