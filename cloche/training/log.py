"""What a person sees while it works: lines on stderr, the current one redrawn where there is a terminal."""

import contextlib
import sys
import time
from typing import TextIO

from cloche.words import _, duration, number

PLAIN = str.maketrans(
    {
        "━": "=",
        "─": "-",
        "·": "-",
        "→": "->",
        "×": "x",
        "±": "+-",
        "–": "-",
        "…": "...",
        "\u00a0": " ",
        "½": "1/2",
        "▸": ">",
        "“": '"',
        "”": '"',
    }
)
BAR = 20


def printable(text: str, stream: TextIO) -> str:
    """The text as this console can show it: plain ASCII signs where it has no others."""
    encoding = getattr(stream, "encoding", None) or "ascii"
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        return text.translate(PLAIN).encode(encoding, "replace").decode(encoding)


def say(text: str, stream: TextIO | None = None) -> None:
    """A line for the person. A terminal, pipe or disk that takes no more does not end a run."""
    stream = stream or sys.stderr
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: descriptor 2 was closed, so there is no stream
        stream.write(printable(text, stream) + "\n")
        stream.flush()


class Progress:
    """One line an epoch: bar, figures, rate, time left. Of more than 20 epochs only 20 lines stay."""

    def __init__(self, epochs: int, noun: str, quiet: bool = False) -> None:
        self.epochs, self.noun, self.quiet = epochs, noun, quiet
        self.live = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._shown = 0.0

    def step(self, epoch: int, share: float, figures: str, rate: float, left_s: float) -> None:
        """Called after every step; draws at most ten times a second."""
        now = time.monotonic()
        if self.live and now - self._shown > 0.1:
            self._shown = now
            filled = round(BAR * share)
            bar = "\x1b[36m" + "━" * filled + "\x1b[2m" + "─" * (BAR - filled) + "\x1b[0m"
            tail = _("{rate} {noun}/s   {left} left").format(rate=number(rate), noun=self.noun, left=duration(left_s))
            self._draw(f"{self._head(epoch)} {bar} {figures}   {tail}", redraw=True)

    def epoch(self, epoch: int, figures: str, rate: float) -> None:
        """The finished line of an epoch; it stays."""
        each = -(-self.epochs // 20)
        if not self.quiet and ((epoch + 1) % each == 0 or epoch + 1 == self.epochs):
            bar = "━" * BAR
            self._draw(f"{self._head(epoch)} {bar} {figures}   {number(rate)} {self.noun}/s")

    def _head(self, epoch: int) -> str:
        return _("epoch {n}/{all}").format(n=f"{epoch + 1:>{len(str(self.epochs))}}", all=self.epochs)

    def _draw(self, line: str, redraw: bool = False) -> None:
        if not self.live:
            say(line)
            return
        try:
            sys.stderr.write("\r\x1b[2K" + printable(line, sys.stderr) + ("" if redraw else "\n"))
            sys.stderr.flush()
        except (OSError, ValueError):
            self.live = False
