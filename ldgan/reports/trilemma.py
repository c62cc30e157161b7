"""The trilemma report: tables, plots and a page of what a comparison of generators measured.

The trilemma of Xiao et al. (arXiv 2112.07804): quality, coverage of the data and speed, of which generators
used to reach two. Nothing here measures; everything is made of rows of numbers.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from rich.markup import escape
from rich.table import Table

INK, GREY, BLUE, ORANGE = "#222222", "#8a8a8a", "#0072b2", "#d55e00"  # the colours of Okabe and Ito
COLOUR_MAP = "viridis"  # of even lightness steps, and the same to colour-blind eyes
NOT_MEASURED = "–"


@dataclass(frozen=True)
class Row:
    """What was measured of one generator; None where there is nothing to measure, as in real images.

    ``conditions`` say which checkpoint was measured, and how.
    """

    name: str
    kind: Literal["model", "prior", "real"]
    num_images: int
    precision: float
    confidence: float
    frechet_distance: float
    num_modes: int
    kl: float
    kl_floor: float
    recall: float
    density: float
    coverage: float
    evaluations: float | None
    sampling_seconds: float | None  # per 1,000 images, decoding left out
    decoding_seconds: float | None  # per 1,000 images
    num_parameters: int | None
    training_minutes: float | None
    conditions: dict[str, Any]

    @property
    def images_per_second(self) -> float | None:
        """Samples made in a second, decoding left out."""
        return 1000 / self.sampling_seconds if self.sampling_seconds else None


@dataclass(frozen=True)
class Column:
    """A column of the tables; arrows say which way is better, and the best of all models is set in bold."""

    title: str
    value: Callable[[Row], float | None]
    form: Callable[[float], str]
    better: Literal["higher", "lower"] | None = None

    @property
    def heading(self) -> str:
        """Title with its arrow."""
        return self.title + {"higher": " ↑", "lower": " ↓", None: ""}[self.better]

    def show(self, row: Row) -> str:
        """The row's number as text."""
        value = self.value(row)
        return NOT_MEASURED if value is None else self.form(value)

    def best(self, rows: Sequence[Row]) -> str | None:
        """The best number of the models as it is shown; None where no side is better, or with a single model."""
        models = [row for row in rows if row.kind == "model" and self.value(row) is not None]
        if self.better is None or len(models) < 2:
            return None
        best = max if self.better == "higher" else min
        return self.show(best(models, key=lambda row: self.value(row) or 0.0))


def significant(value: float) -> str:
    """Three digits of a number, or all in front of its point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


COLUMNS = (
    Column("precision", lambda row: row.precision, "{:.3f}".format, "higher"),
    Column("confidence", lambda row: row.confidence, "{:.3f}".format, "higher"),
    Column("Fréchet distance (digit classifier)", lambda row: row.frechet_distance, "{:.3f}".format, "lower"),
    Column("modes of 1,000", lambda row: row.num_modes, "{:,}".format, "higher"),
    Column("KL (nats)", lambda row: row.kl, "{:.4f}".format, "lower"),
    Column("recall", lambda row: row.recall, "{:.3f}".format, "higher"),
    Column("evaluations per sample", lambda row: row.evaluations, significant, "lower"),
    Column("s per 1,000 samples", lambda row: row.sampling_seconds, significant, "lower"),
    Column("decoding them, s", lambda row: row.decoding_seconds, significant),
    Column("parameters (M)", lambda row: row.num_parameters and row.num_parameters / 1e6, "{:.2f}".format),
    Column("training (min)", lambda row: row.training_minutes, "{:.1f}".format),
)

DEFINITIONS = {
    "Precision and recall": "share of samples that lie among the real images, and of real images that lie among the"
    " samples (Kynkäänniemi et al., arXiv 1904.06991, k = 3), in the features of the digit classifier: those in front"
    " of its last layer, averaged over positions, 64 for each colour channel.",
    "Confidence": "mean probability that the classifier gives to the digit it reads in a colour channel. It is trained"
    " with labels smoothed by 0.1, so that 0.91 is sure.",
    "Fréchet distance (digit classifier)": "distance between Gaussians fitted to those features of samples and real"
    " images. It is no FID, which is one in features of Inception.",
    "Modes and KL": "how many of the 1,000 triples of digits occur among the samples, and the KL divergence of their"
    " histogram to uniform. Of N images a perfect generator is expected to score the floor (K - 1) / 2N.",
    "Evaluations": "samples that passed through the network, for each image made.",
    "Seconds per 1,000 samples": "median over batches, the first one left out; from noise to latents, and decoding"
    " them to pixels apart.",
}


def console_table(rows: Sequence[Row], title: str) -> Table:
    """The table for a terminal, one line for each generator."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column.heading, justify="right")
    for row in rows:
        cells = _cells(row, rows, "[bold]{}[/bold]")
        table.add_row(escape(row.name), *cells, style="dim" if row.kind == "real" else "")
    return table


def markdown(rows: Sequence[Row], title: str, conditions: str) -> str:
    """The table as Markdown, with the conditions below it."""
    lines = [
        f"| | {' | '.join(column.heading for column in COLUMNS)} |",
        f"| --- |{' ---: |' * len(COLUMNS)}",
        *(f"| {_in_cell(row.name)} | {' | '.join(_cells(row, rows, '**{}**'))} |" for row in rows),
    ]
    definitions = [f"- {term}: {text}" for term, text in DEFINITIONS.items()]
    return "\n".join([f"# {title}", "", *lines, "", conditions, "", *definitions, ""])


def _in_cell(text: str) -> str:
    """Text that does not end a Markdown table's cell."""
    return text.replace("|", "\\|")


def _cells(row: Row, rows: Sequence[Row], emphasis: str) -> list[str]:
    shown = [(column.show(row), column.best(rows)) for column in COLUMNS]
    return [emphasis.format(text) if row.kind == "model" and text == best else text for text, best in shown]


def trilemma_plot(rows: Sequence[Row]) -> Figure:
    """Quality against speed, with coverage as colour (KL) and size (recall) of each generator's mark."""
    figure = _figure(8.6, 5.4)
    axes = figure.subplots()
    makers = sorted((row for row in rows if row.images_per_second is not None), key=lambda row: -row.recall)
    speeds, precisions = zip(*map(_position, makers))
    marks = axes.scatter(
        speeds,
        precisions,
        s=[_mark_area(row.recall) for row in makers],
        c=[row.kl for row in makers],
        cmap=COLOUR_MAP,
        norm=_kl_norm(makers),
        edgecolors=INK,
        linewidths=0.8,
        zorder=3,
    )
    axes.set_xscale("log")
    axes.margins(x=0.12)
    _logarithmic_ticks(axes.xaxis)
    axes.set_ylim(0, 1)
    axes.set_xlabel("samples per second, without decoding →")
    axes.set_ylabel("precision, in features of the digit classifier →")
    _real_line(axes, rows, lambda row: row.precision, axes.axhline)
    for row in rows:
        if row.kind == "real":
            axes.text(0.005, row.precision + 0.01, row.name, transform=axes.get_yaxis_transform(), color=ORANGE, size=9)
    _plain(axes)
    _colour_bar(figure, axes, marks)
    _size_legend(axes)
    _label(figure, axes, makers)
    return figure


@dataclass(frozen=True)
class Panel:
    """One axis of `panels_plot`: from 0 to ``upper_limit``, or logarithmic without one."""

    title: str
    value: Callable[[Row], float | None]
    upper_limit: float | None = None
    floor: Callable[[Row], float] | None = None


PANELS = (
    Panel("precision →", lambda row: row.precision, 1.0),
    Panel("recall →", lambda row: row.recall, 1.0),
    Panel("modes of 1,000 →", lambda row: row.num_modes, 1050),
    Panel("← KL (nats)", lambda row: row.kl, floor=lambda row: row.kl_floor),
    Panel("← Fréchet distance", lambda row: row.frechet_distance),
    Panel("samples per second →", lambda row: row.images_per_second),
)


def panels_plot(rows: Sequence[Row]) -> Figure:
    """Every generator's numbers side by side; dashed lines are real images, dotted ones what sampling allows."""
    makers = [row for row in rows if row.kind != "real"]
    heights = range(len(makers), 0, -1)
    figure = _figure(12.5, 1.0 + 0.32 * len(makers))
    for panel, axes in zip(PANELS, figure.subplots(1, len(PANELS), sharey=True)):
        points = [(number, height) for height, row in zip(heights, makers) if (number := panel.value(row)) is not None]
        axes.scatter(*zip(*points), color=BLUE, s=34, zorder=3)
        _real_line(axes, rows, panel.value, axes.axvline)
        if panel.floor is not None:
            axes.axvline(panel.floor(makers[0]), color=INK, linestyle=":", linewidth=1.2, zorder=2)
        if panel.upper_limit is None:
            axes.set_xscale("log")
            _logarithmic_ticks(axes.xaxis)
        else:
            axes.set_xlim(0, panel.upper_limit)
            axes.xaxis.set_major_formatter("{x:,g}")
        axes.set_title(panel.title, fontsize=10, color=INK)
        axes.set_yticks(list(heights), [row.name for row in makers])
        axes.set_ylim(0.4, len(makers) + 0.6)
        _plain(axes)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, at 150 pixels an inch; the same figure gives the same bytes."""
    return _save(figure, "png", dpi=150)


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file."""
    return _save(figure, "svg")


def page(
    title: str, rows: Sequence[Row], grids: Mapping[str, bytes], conditions: str, results: Mapping[str, Any]
) -> str:
    """The report as one HTML page that loads nothing: pictures are inside, and there are no scripts.

    Args:
        title: heading of the page.
        rows: what was measured.
        grids: PNG files of samples, by the name of their row.
        conditions: one line under the plot: on what everything was measured.
        results: all settings and numbers, for whoever wants to do it again; shown as JSON.
    """
    figures = "\n".join(_grid_figure(row, grids[row.name]) for row in rows if row.name in grids)
    terms = "\n".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in DEFINITIONS.items())
    return PAGE.format(
        title=html.escape(title),
        conditions=html.escape(conditions),
        trilemma=_data_uri(svg(trilemma_plot(rows)), "image/svg+xml"),
        panels=_data_uri(svg(panels_plot(rows)), "image/svg+xml"),
        table=_html_table(rows),
        figures=figures,
        terms=terms,
        results=html.escape(json.dumps(results, indent=2)),
    )


def _figure(width: float, height: float) -> Figure:
    """A figure of so many inches that no global state of matplotlib knows of."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    no_date = {"Date": None} if file_format == "svg" else {}
    figure.savefig(buffer, format=file_format, metadata=no_date, **options)
    return buffer.getvalue()


def _position(row: Row) -> tuple[float, float]:
    """Where the row's mark lies in the plot of the trilemma."""
    assert row.images_per_second is not None
    return row.images_per_second, row.precision


def _mark_area(recall: float) -> float:
    """Area of a mark in square points."""
    return 40 + 360 * recall


def _kl_norm(rows: Sequence[Row]) -> LogNorm:
    """Colours from the floor that sampling sets, or less, to the largest KL of a model; a prior may lie beyond it."""
    values = [row.kl for row in rows if row.kind == "model"] + [rows[0].kl_floor]
    return LogNorm(min(values), max(max(values), 1.5 * min(values)))


def _colour_bar(figure: Figure, axes: Axes, marks: ScalarMappable) -> None:
    bar = figure.colorbar(marks, ax=axes, pad=0.02, aspect=30, extend="max")
    bar.set_label("← KL to uniform over 1,000 modes (nats)")
    _logarithmic_ticks(bar.ax.yaxis)


def _size_legend(axes: Axes) -> None:
    """What the marks' sizes mean, above the plot, where no mark can lie."""
    sizes = [
        Line2D([], [], linestyle="", marker="o", color=GREY, markersize=_mark_area(recall) ** 0.5, label=f"{recall:g}")
        for recall in (0, 0.5, 1)
    ]
    axes.legend(
        handles=sizes, title="recall", ncols=len(sizes), loc="lower left", bbox_to_anchor=(0, 1), frameon=False,
        columnspacing=1.2, handletextpad=0.6, fontsize=9, title_fontsize=9, alignment="left",
    )  # fmt: skip


def _logarithmic_ticks(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 where a log axis spans little, and at powers of ten otherwise."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_locator(LogLocator(subs=tuple(range(1, 10)), numticks=50))
    axis.set_minor_formatter(NullFormatter())


def _plain(axes: Axes) -> None:
    """A light grid instead of a frame."""
    axes.grid(color="#e6e6e6", linewidth=0.8, zorder=0)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, colors=INK)


def _real_line(
    axes: Axes, rows: Sequence[Row], value: Callable[[Row], float | None], draw: Callable[..., Line2D]
) -> None:
    """A dashed line where real images, judged alike, lie."""
    for row in rows:
        number = value(row)
        if row.kind == "real" and number is not None:
            draw(number, color=ORANGE, linestyle="--", linewidth=1.2, zorder=2)


def _label(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    """Write the names beside the marks, each at the first place around its mark that is still free."""
    figure.draw_without_rendering()  # lays out, so that extents are known
    pixels_per_point = figure.dpi / 72
    taken = []
    for row in rows:
        x, y = axes.transData.transform(_position(row))
        radius = (_mark_area(row.recall) / 3.14) ** 0.5 * pixels_per_point
        taken.append(Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius))
    inside = axes.get_window_extent()
    for row in rows:
        label, overlap = None, float("inf")
        for candidate in _label_places(axes, row):
            box = candidate.get_window_extent()
            outside = box.width * box.height - _overlap(box, inside)
            candidate_overlap = sum(_overlap(box, other) for other in taken) + outside
            if candidate_overlap < overlap:
                if label is not None:
                    label.remove()
                label, overlap = candidate, candidate_overlap
            else:
                candidate.remove()
        assert label is not None
        taken.append(label.get_window_extent())


def _label_places(axes: Axes, row: Row) -> list[Annotation]:
    """The row's name at each place around its mark, the preferred one first."""
    gap = (_mark_area(row.recall) / 3.14) ** 0.5 + 3
    places = [
        (gap, 0, "left", "center"), (-gap, 0, "right", "center"), (0, gap, "center", "bottom"),
        (0, -gap, "center", "top"), (gap, gap, "left", "bottom"), (gap, -gap, "left", "top"),
        (-gap, gap, "right", "bottom"), (-gap, -gap, "right", "top"), (0, 2.2 * gap, "center", "bottom"),
        (0, -2.2 * gap, "center", "top"),
    ]  # fmt: skip
    return [
        axes.annotate(
            row.name, _position(row), (x, y),
            textcoords="offset points", ha=across, va=along, fontsize=9, color=INK,
        )
        for x, y, across, along in places
    ]  # fmt: skip


def _overlap(a: Bbox, b: Bbox) -> float:
    """Area, in square pixels, that two boxes share."""
    shared = Bbox.intersection(a, b)
    return 0.0 if shared is None else shared.width * shared.height


def _html_table(rows: Sequence[Row]) -> str:
    heads = "".join(f"<th>{html.escape(column.heading)}</th>" for column in COLUMNS)
    lines = []
    for row in rows:
        cells = "".join(
            f'<td class="best">{html.escape(text)}</td>'
            if row.kind == "model" and text == column.best(rows)
            else f"<td>{html.escape(text)}</td>"
            for column in COLUMNS
            for text in [column.show(row)]
        )
        lines.append(f'<tr class="{row.kind}"><th scope="row">{html.escape(row.name)}</th>{cells}</tr>')
    return f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _grid_figure(row: Row, grid: bytes) -> str:
    """Samples with the numbers that they should be seen with."""
    name = html.escape(row.name)
    numbers = [f"precision {row.precision:.3f}", f"recall {row.recall:.3f}", f"{row.num_modes:,} modes"]
    if row.evaluations:
        numbers.append(f"{significant(row.evaluations)} evaluation{'s' if row.evaluations > 1 else ''}")
    return (
        f'<figure><img src="{_data_uri(grid, "image/png")}" alt="samples: {name}">'
        f"<figcaption><b>{name}</b><br>{' · '.join(numbers)}</figcaption></figure>"
    )


def _data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #222; --soft: #666; --paper: #fbfbfa; --line: #ddd; --mark: #eef3f7; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8e8e6; --soft: #a5a5a2; --paper: #191a1b; --line: #3a3b3d; --mark: #26313a; }}
}}
body {{ margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
h1 {{ font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }}
h2 {{ font-size: 1.15rem; margin: 2.5rem 0 .7rem; }}
p {{ max-width: 60rem; }}
.conditions, figcaption, dd {{ color: var(--soft); }}
.plot {{ background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .6rem; margin: 1rem 0; }}
.plot img {{ display: block; width: 100%; height: auto; }}
.narrow {{ max-width: 56rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .65rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: bottom; }}
th {{ font-weight: 600; }}
tbody th, thead th:first-child {{ text-align: left; white-space: nowrap; }}
td.best {{ font-weight: 700; background: var(--mark); }}
tr.real th, tr.real td {{ font-style: italic; color: var(--soft); }}
.grids {{ display: flex; flex-wrap: wrap; gap: 1.4rem; }}
figure {{ margin: 0; flex: 0 0 14rem; }}
figure img {{ width: 100%; image-rendering: pixelated; border-radius: 4px; }}
figcaption {{ font-size: .85rem; line-height: 1.4; margin-top: .3rem; }}
figcaption b {{ color: var(--ink); }}
dt {{ font-weight: 600; margin-top: .6rem; }}
dd {{ margin: 0; max-width: 60rem; }}
pre {{ font-size: .75rem; overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; padding: .8rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>Every generator against the three wishes of the generative trilemma: images that look real, all of the data
covered, samples at once. Up and to the right is better; dark and large is better.</p>
<div class="plot narrow"><img src="{trilemma}" alt="quality against speed, coverage as colour and size"></div>
<p class="conditions">{conditions}</p>
<h2>Numbers</h2>
<div class="scroll">{table}</div>
<p class="conditions">Arrows point to the better side; bold is the best of the trained models.</p>
<div class="plot"><img src="{panels}" alt="each number of each generator"></div>
<p class="conditions">Dashed: real images, judged alike. Dotted: the KL that sampling alone leaves.</p>
<h2>Samples</h2>
<p class="conditions">The first ones of each, not picked.</p>
<div class="grids">
{figures}
</div>
<h2>What the numbers mean</h2>
<dl>
{terms}
</dl>
<h2>Conditions</h2>
<details><summary>All settings and results as JSON</summary>
<pre>{results}</pre></details>
</body>
</html>
"""
