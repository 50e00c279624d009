"""How Hardy's pictures look, and how one becomes the bytes of a PNG file."""

from __future__ import annotations

import io
from typing import Any, Literal

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#2563eb", "#d97706", "#059669", "#dc2626"


def new_figure(width: float, height: float) -> Any:
    """An empty white figure, in inches at 150 dots each, that needs no screen and reaches no global state of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only reports need it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def set_title(axes: Any, title: str, below: float = 26) -> None:
    """Head the axes, with room of ``below`` points under the title for `legend_above`."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=below)


def legend_above(axes: Any, **options: Any) -> None:
    """A legend between title and axes, where it never covers a curve; none where nothing has a label."""
    if options.get("handles") or axes.get_legend_handles_labels()[0]:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3, "ncols": 5}
        look = {"frameon": False, "fontsize": 9, "labelcolor": INK, "handlelength": 1.6, "columnspacing": 1.6, "borderpad": 0}
        axes.legend(**place, **look, **options)


def style(axes: Any) -> None:
    """Quiet axes: a light grid, no frame but a base line, grey tick labels."""
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=MUTED, length=0, labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.margins(x=0.01)


def label_steps(axes: Any, ticks: int | Literal["auto"] = "auto") -> None:
    """Name the x axis, which counts environment steps, with at most about so many ticks, at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("environment steps", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def png(figure: Any) -> bytes:
    """The picture as a file's content; equal pictures have equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
