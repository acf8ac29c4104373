"""Draw docs/quantize.svg: a quantization and its check, as a terminal shows them.

    .venv/bin/python scripts/picture.py

The commands run as they are, in this process, on the embedded model; only the bars that move are left out.
"""

import os
import shlex
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from quantkit import display
from quantkit.cli import app
from quantkit.recipe import Recipe

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "quantize.svg"
WIDTH = 92
COMMANDS = (
    "quantkit quantize tiny --wbits 3 --group-size 32 --calibration embedded --samples 32 --seqlen 128 -o tiny-w3",
    "quantkit check tiny-w3 --against tiny",
)


class Still(display.QuantizeProgress):
    """Shows what stays on the screen, without the bar."""

    def __init__(self, recipe: Recipe, *, quiet: bool) -> None:  # noqa: ARG002  there is no terminal to ask
        super().__init__(recipe, quiet=True)
        self.quiet = False


def main() -> None:
    """Run the commands where nothing is in their way, and draw what they print."""
    screen = Console(record=True, width=WIDTH, force_terminal=True, highlight=False, soft_wrap=True, file=sys.stderr)
    display._out = display._err = screen
    display.QuantizeProgress = Still
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        for command in COMMANDS:
            screen.print(f"[bold green]$[/] {command}", soft_wrap=False)
            try:
                app(shlex.split(command)[1:])
            except SystemExit as done:
                if done.code:
                    raise
        os.chdir("/")
    PICTURE.write_text(screen.export_svg(title="quantkit"), encoding="utf-8")


if __name__ == "__main__":
    main()
