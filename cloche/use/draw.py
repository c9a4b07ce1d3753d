"""Figures of the report and of explain: matplotlib's objects (never pyplot), the same bytes every time.

An inline SVG takes its colours from the page (`var(--ink)`, the light one as fall-back): one figure serves light and dark.
Its text stays text: the reader's own fonts set it, in every script.
"""

import io
import re
from typing import Any
import warnings

import matplotlib
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
import numpy as np
from PIL import Image

from cloche.words import _

Array = np.ndarray
INK, DIM, RULE, PAPER = PAGE = ("#1d2733", "#66717f", "#d8dee5", "#fefefd")
HUES = ("#2a6fbb", "#d9622b", "#2e8b57", "#8a57b8", "#b8892b", "#2a97a3", "#c2477f", "#6b7f2a")
VARIABLES = dict(zip(PAGE + HUES, ["ink", "dim", "rule", "paper", *(f"c{i}" for i in range(8))], strict=True))
RC = dict.fromkeys(("text.color", "axes.titlecolor"), INK) | dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), DIM)
RC |= dict.fromkeys(("axes.edgecolor", "grid.color"), RULE) | {"font.size": 8, "axes.titlesize": 8, "axes.titlelocation": "left"}
RC |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False) | {"legend.fontsize": 8}
RC |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "svg.fonttype"), "none") | {"svg.hashsalt": "cloche"}
styled = matplotlib.rc_context(RC)


def svg(figure: Figure) -> str:
    """The figure as an <svg> element for a page: no ids but those it refers to, no date, colours as variables."""
    text = _saved(figure, format="svg", metadata={"Date": None}).decode()
    text = re.sub(r"<metadata>.*?</metadata>\s*|(?<=<g) id=\"[^\"]*\"", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda m: f"var(--{VARIABLES[m[0]]}, {m[0]})" if m[0] in VARIABLES else m[0], text)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file on white."""
    return _saved(figure, format="png", dpi=160, facecolor="white", metadata={"Software": None})


@styled
def _saved(figure: Figure, **how: Any) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():  # letters that the measuring font lacks: the reader's fonts have them
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(out, **how)
    return out.getvalue()


def picture(pixels: Array, most: int = 64, colours: int = 128) -> bytes:
    """(h, w, 1 or 3) in 0..1 → a PNG of at most `most` pixels a side and so many colours: 3 kB."""
    image, out = Image.fromarray(np.round(pixels.repeat(3 // pixels.shape[2], 2) * 255).astype(np.uint8)), io.BytesIO()
    image.thumbnail((most, most))
    image.quantize(colours).save(out, "png")
    return out.getvalue()


def tiles(pictures: Array, across: int = 8, side: int = 96) -> bytes:
    """(n, h, w, 1 or 3) in 0..1 → a PNG with the pictures side by side, each pixel a square of whole pixels."""
    n, h, w, _channels = pictures.shape
    each, across = max(1, side // max(h, w)), min(across, n)
    wide, high = w * each + 4, h * each + 4
    sheet = Image.new("RGB", (across * wide - 4, -(-n // across) * high - 4), "white")
    for i, p in enumerate(pictures):
        image = Image.fromarray(np.round(np.clip(p, 0, 1).repeat(3 // p.shape[2], 2) * 255).astype(np.uint8))
        sheet.paste(image.resize((w * each, h * each), Image.Resampling.NEAREST), (i % across * wide, i // across * high))
    out = io.BytesIO()
    sheet.save(out, "png")
    return out.getvalue()


def new(height: float, across: str = "", up: str = "", log: bool = False) -> tuple[Figure, Any]:
    """A figure 4 inches wide with its axes; call it, and draw, within `styled`."""
    figure = Figure((4.0, height), layout="constrained")
    axes = figure.add_subplot(xlabel=across, title=up, yscale="log" if log else "linear")
    axes.tick_params(which="both", length=0)
    axes.yaxis.set_minor_formatter(lambda v, _at: "")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda v, _at: f"{v:g}".replace(".", _(".")))
    return figure, axes


@styled
def curves(lines: dict[str, Any], across: str, up: str, dots: Any = (), faint: Any = None, level: Any = None, kept: Any = None) -> Figure:
    """Lines by name, (x, y) each, in the order of HUES; the upward axis is logarithmic where they span more than 1 : 30.

    Args:
        dots: (x, y) of points in the hue of each line. faint: (x, y) drawn thin. level: a dashed horizontal. kept: a dotted vertical.
    """
    y = np.concatenate([np.asarray(y, float) for _x, y in [*lines.values(), *dots, *([faint] if faint else [])]])
    y = y[np.isfinite(y)]
    figure, axes = new(2.5, across, up, log=bool(len(y) and y.min() > 0 and y.max() > 30 * y.min()))
    axes.grid(axis="y", lw=0.6)
    axes.xaxis.get_major_locator().set_params(integer=not dots)  # epochs are whole
    for where, rule, dash in ((level, axes.axhline, (4, 3)), (kept, axes.axvline, (1, 2))):
        if where is not None:
            rule(where, color=DIM, lw=0.9, ls=(0, dash))
    if faint:
        axes.plot(*faint, color=HUES[0], alpha=0.35, lw=0.7)
    for (x, y), hue in zip(dots, HUES, strict=False):
        axes.scatter(x, y, s=9, color=hue, alpha=0.4, linewidths=0)
    for (name, (x, y)), hue in zip(lines.items(), HUES, strict=False):
        axes.plot(x, y, color=hue, lw=1.6, label=name, marker="o" if len(x) < 20 else "", ms=2.5)
    axes.legend(loc="lower right", bbox_to_anchor=(1.01, 1.0), ncols=4, handlelength=1.2, columnspacing=1.2, borderaxespad=0)
    return figure


@styled
def surface(best: Array, sure: Array, box: list[float], x: Array, label: Array, said: Array, names: list[str]) -> Figure:
    """Which class a net of two inputs answers where, the fainter the less sure; points in the hue of their class, wrong ones ringed.

    Args:
        best, sure: (rows, columns) class and probability on an even grid, the lowest row first. box: left, right, bottom, top.
        x: (n, 2) points. label, said: (n,) their true and answered class.
    """
    figure, axes = new(3.6)
    hues = np.array([to_rgb(HUES[c % len(HUES)]) for c in range(len(names))])
    alpha = 0.5 * np.clip((sure - 1 / len(names)) / (1 - 1 / len(names)), 0, 1)
    axes.imshow(np.concatenate([hues[best], alpha[..., None]], 2), extent=box, origin="lower", aspect="auto")
    for c, name in enumerate(names):
        axes.scatter(*x[label == c].T, s=9, color=HUES[c % len(HUES)], edgecolors=PAPER, linewidths=0.4, label=name if c < 8 else None)
    axes.scatter(*x[label != said].T, s=34, facecolors="none", edgecolors=INK, linewidths=0.9)
    figure.legend(loc="outside upper left", ncols=4, handletextpad=0.1, columnspacing=0.8, borderaxespad=0.1)
    return figure
