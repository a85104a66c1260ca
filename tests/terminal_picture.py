"""The picture of a run on a terminal: ``python -m tests.terminal_picture CONFIG STEP PICTURE.png [OPTION …]``.

Runs ``cadapter train CONFIG OPTION …`` on a real pseudo-terminal, takes what stood on it once the panel showed STEP,
and has Chromium draw it.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from tests.terminal_sessions import on_terminal, plain
from tests.tiny_project import command

COLUMNS, ROWS = 92, 25
BACKGROUND, TEXT = (22, 24, 29), (214, 217, 222)
NORMAL = [(60, 64, 72), (224, 108, 117), (135, 190, 120), (220, 185, 110), (97, 160, 230), (190, 135, 205),
          (95, 180, 190), TEXT]  # fmt: skip
THEME = TerminalTheme(BACKGROUND, TEXT, NORMAL, NORMAL)
FONT = "DejaVu Sans Mono"
COLOURS = 128
"""Of the picture, which keeps its file small."""


def screen_at(config: str, step: int, options: list[str]) -> list[str]:
    """The lines on the terminal, with their styles, when the panel first showed ``step`` or a later one."""
    session = on_terminal(command("train", config, *options), columns=COLUMNS, rows=ROWS)
    assert session.code == 0, session.text()
    for lines in session.screens():
        shown = re.search(r"step ([\d,]+) of", "\n".join(plain(lines)))
        if shown and int(shown[1].replace(",", "")) >= step and "now" in "\n".join(plain(lines)):
            return lines[-ROWS:]
    raise SystemExit(f"the panel never showed step {step}")


def draw(lines: list[str], picture: Path) -> None:
    """Have Chromium draw ``lines``."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=True)
    svg = console.export_svg(title="", theme=THEME)
    svg = svg.replace("Fira Code", FONT)
    width, height = (float(each) for each in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(f"<body style='margin:0'>{svg}</body>", encoding="utf-8")
        browser = shutil.which("chromium") or shutil.which("chromium-browser")
        if browser is None:
            raise SystemExit("Chromium is needed to draw the picture.")
        scale = 1000 / width
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}",
             f"--screenshot={picture.absolute()}", "--force-device-scale-factor=2",
             f"--window-size=1000,{round(height * scale)}", page.as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
    with Image.open(picture) as drawn:
        few = drawn.convert("RGB").quantize(COLOURS, Image.Quantize.FASTOCTREE)
    few.save(picture, optimize=True)


def main() -> None:
    config, step, picture, *options = sys.argv[1:]
    draw(screen_at(config, int(step), options), Path(picture))


if __name__ == "__main__":
    main()
