"""The trilemma report: tables, plots and a page of what a comparison of generators measured.

The trilemma of Xiao et al. (arXiv 2112.07804): quality, coverage of the data and speed, of which generators
used to reach two. Nothing here measures; everything is made of rows of numbers.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
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


class Cell(NamedTuple):
    """A number of the table as it is shown, and whether it is the best of all models."""

    text: str
    best: bool


class Line(NamedTuple):
    """A line of the table, whatever it is shown on."""

    row: Row
    cells: list[Cell]


def table_lines(rows: Sequence[Row]) -> list[Line]:
    """The table that terminal, Markdown and page show: a line for each generator, a cell for each of `COLUMNS`."""
    best = [column.best(rows) for column in COLUMNS]
    return [
        Line(row, [Cell(text, row.kind == "model" and text == top) for text, top in zip(shown, best)])
        for row in rows
        for shown in [[column.show(row) for column in COLUMNS]]
    ]


def console_table(rows: Sequence[Row], title: str) -> Table:
    """The table for a terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column.heading, justify="right")
    for row, cells in table_lines(rows):
        texts = [f"[bold]{text}[/bold]" if best else text for text, best in cells]
        table.add_row(escape(row.name), *texts, style="dim" if row.kind == "real" else "")
    return table


def markdown(rows: Sequence[Row], title: str, conditions: str) -> str:
    """The table as Markdown, with the conditions below it."""
    return _render("trilemma.md", rows, title=title, conditions=conditions)


def trilemma_plot(rows: Sequence[Row]) -> Figure:
    """Quality against speed, with coverage as colour (KL) and size (recall) of each generator's mark."""
    figure = new_figure(8.6, 5.4)
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
    figure = new_figure(12.5, 1.0 + 0.32 * len(makers))
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
    return _render(
        "trilemma.html",
        rows,
        title=title,
        conditions=conditions,
        grids=grids,
        trilemma=svg(trilemma_plot(rows)),
        panels=svg(panels_plot(rows)),
        results=json.dumps(results, indent=2),
    )


def _render(template: str, rows: Sequence[Row], **values: Any) -> str:
    """A file of the folder templates, filled in; in HTML all values are escaped."""
    environment = Environment(
        loader=PackageLoader("ldgan.reports"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"data_uri": _data_uri, "significant": significant}
    shared = {"rows": rows, "columns": COLUMNS, "lines": table_lines(rows), "definitions": DEFINITIONS}
    return environment.get_template(template).render(shared | values)


def new_figure(width: float, height: float) -> Figure:
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
        labels = _label_places(axes, row)
        boxes = [label.get_window_extent() for label in labels]
        hidden = [
            sum(_overlap(box, other) for other in taken) + box.width * box.height - _overlap(box, inside)
            for box in boxes
        ]
        best = hidden.index(min(hidden))
        taken.append(boxes[best])
        for label in labels[:best] + labels[best + 1 :]:
            label.remove()


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


def _data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
