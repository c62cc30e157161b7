"""Tables, plots and the page of a comparison: they show the numbers they are given, and load nothing."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.text import Annotation
from PIL import Image
from rich.console import Console

from ldgan.reports.trilemma import (
    ORANGE,
    Row,
    console_table,
    markdown,
    page,
    panels_plot,
    png,
    significant,
    trilemma_plot,
)


def row(name: str, kind: str = "model", **changes: Any) -> Row:
    numbers: dict[str, Any] = {
        "num_images": 5000,
        "precision": 0.5,
        "confidence": 0.8,
        "frechet_distance": 0.9,
        "num_modes": 990,
        "kl": 0.2,
        "kl_floor": 0.0999,
        "recall": 0.3,
        "density": 0.4,
        "coverage": 0.5,
        "evaluations": 4.0,
        "sampling_seconds": 5.0,
        "decoding_seconds": 4.0,
        "num_parameters": 1_050_000,
        "training_minutes": 9.6,
        "conditions": {"seed": 0},
    }
    return Row(name=name, kind=kind, **numbers | changes)


FEW = row("few [red]<b>steps</b>", precision=0.4321, kl=0.15, recall=0.2)
MANY = row("many | steps", precision=0.62, kl=0.11, recall=0.45, evaluations=1000.0, sampling_seconds=1312.0)
PRIOR = row(
    "prior", "prior", precision=0.99, kl=1.5, recall=0.01, evaluations=0.0, sampling_seconds=0.0077,
    num_parameters=None, training_minutes=None,
)  # fmt: skip
NOTHING = {"evaluations": None, "sampling_seconds": None, "decoding_seconds": None, "num_parameters": None}
REAL = row("real images", "real", precision=0.907, recall=0.9, kl=0.1, training_minutes=None, **NOTHING)
ROWS = [FEW, MANY, PRIOR, REAL]


def column(text: str, title: str) -> list[str]:
    """The cells of a column of a Markdown table."""
    lines = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")]
    (place,) = [number for number, cell in enumerate(lines[0]) if cell.strip().startswith(title)]
    return [cells[place].strip() for cells in lines[2:]]


def test_the_best_model_is_bold_whatever_prior_and_real_images_score() -> None:
    text = markdown(ROWS, "Title", "conditions")
    assert column(text, "precision ↑") == ["0.432", "**0.620**", "0.990", "0.907"]
    assert column(text, "KL (nats) ↓") == ["0.1500", "**0.1100**", "1.5000", "0.1000"]
    assert column(text, "evaluations per sample ↓") == ["**4**", "1,000", "0", "–"]
    assert column(text, "s per 1,000 samples ↓") == ["**5**", "1,312", "0.0077", "–"]
    assert column(text, "training (min)") == ["9.6", "9.6", "–", "–"]
    # Equal as they are shown, equally bold.
    assert column(text, "modes of 1,000") == ["**990**", "**990**", "990", "990"]
    assert column(text, "parameters (M)") == ["1.05", "1.05", "–", "–"]


def test_a_single_model_is_not_the_best() -> None:
    assert "**" not in markdown([FEW, PRIOR, REAL], "Title", "conditions")


def test_the_terminal_shows_what_the_file_says() -> None:
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(console_table(ROWS, "Title"))
    text = console.export_text()
    for title in ("precision", "KL (nats)", "s per 1,000"):
        for cell in column(markdown(ROWS, "", ""), title):
            assert cell.strip("*") in text
    assert FEW.name in text


@pytest.mark.parametrize(
    ("value", "text"), [(0.00768, "0.00768"), (4.711, "4.71"), (10.0, "10"), (1312.4, "1,312"), (123456.0, "123,456")]
)
def test_three_digits_or_all_in_front_of_the_point(value: float, text: str) -> None:
    assert significant(value) == text


def marks(axes: Axes) -> PathCollection:
    (collection,) = [item for item in axes.collections if isinstance(item, PathCollection)]
    return collection


def real_lines(axes: Axes) -> list[Any]:
    return [line for line in axes.lines if to_hex(line.get_color()) == ORANGE]


def test_marks_of_the_trilemma_lie_where_the_numbers_say() -> None:
    axes = trilemma_plot(ROWS).axes[0]
    collection = marks(axes)
    made = np.asarray(sorted(np.asarray(collection.get_offsets()).tolist()))
    np.testing.assert_allclose(made, [(1000 / 1312, 0.62), (200.0, 0.4321), (1000 / 0.0077, 0.99)])
    assert axes.get_xscale() == "log"
    (line,) = real_lines(axes)
    assert set(line.get_ydata()) == {0.907}


def test_marks_grow_with_recall_and_lighten_with_the_divergence() -> None:
    makers = [row(f"model {n}", recall=0.1 * n, kl=0.12 * 1.6**n, sampling_seconds=2.0**n) for n in range(6)]
    figure = trilemma_plot(makers)
    figure.draw_without_rendering()
    collection = marks(figure.axes[0])
    speeds = np.asarray(collection.get_offsets())[:, 0]
    by_number = np.argsort(-speeds)
    areas = collection.get_sizes()[by_number]
    np.testing.assert_allclose(np.diff(areas), np.diff(areas)[0])  # proportional differences
    assert np.all(np.diff(areas) > 0)
    lightness = (collection.get_facecolors()[by_number][:, :3] @ (0.2126, 0.7152, 0.0722)).tolist()
    assert lightness == sorted(lightness)


def test_a_prior_does_not_use_up_the_colours() -> None:
    norms = [marks(trilemma_plot(rows).axes[0]).norm for rows in ([FEW, MANY], [FEW, MANY, PRIOR])]
    assert [(norm.vmin, norm.vmax) for norm in norms] == [(0.0999, 0.15), (0.0999, 0.15)]


def test_every_name_is_readable_where_marks_crowd() -> None:
    makers = [
        row(f"generator {n}", sampling_seconds=seconds, precision=precision)
        for n, (seconds, precision) in enumerate([(1, 0.4), (1.3, 0.42), (5, 0.41), (5, 0.45), (6, 0.43), (900, 0.44)])
    ]
    figure = trilemma_plot(makers)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert sorted(label.get_text() for label in labels) == sorted(maker.name for maker in makers)
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_panels_show_each_number_beside_its_name() -> None:
    figure = panels_plot(ROWS)
    values = {
        "precision →": [0.4321, 0.62, 0.99],
        "← KL (nats)": [0.15, 0.11, 1.5],
        "samples per second →": [200.0, 1000 / 1312, 1000 / 0.0077],
    }
    panels = {axes.get_title(): axes for axes in figure.axes}
    for title, numbers in values.items():
        points = np.asarray(marks(panels[title]).get_offsets())
        assert points[:, 0].tolist() == pytest.approx(numbers)
        names = dict(zip(figure.axes[0].get_yticks(), [text.get_text() for text in figure.axes[0].get_yticklabels()]))
        assert [names[height] for height in points[:, 1]] == [FEW.name, MANY.name, PRIOR.name]
    assert [set(line.get_xdata()) for line in real_lines(panels["← KL (nats)"])] == [{0.1}]
    assert not real_lines(panels["samples per second →"])
    assert {0.0999} in [set(line.get_xdata()) for line in panels["← KL (nats)"].lines]


def test_the_same_rows_give_the_same_picture() -> None:
    first, second = png(trilemma_plot(ROWS)), png(trilemma_plot(ROWS))
    assert first == second
    assert Image.open(io.BytesIO(first)).size == (1290, 810)
    assert png(trilemma_plot([replace(FEW, precision=0.1), *ROWS[1:]])) != first


@pytest.fixture(scope="module")
def grids() -> dict[str, bytes]:
    result = {}
    for number, one in enumerate(ROWS):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "png")
        result[one.name] = buffer.getvalue()
    return result


@pytest.fixture(scope="module")
def report(grids: dict[str, bytes]) -> str:
    return page("A & B", ROWS, grids, "N < 5", {"quoted": '</pre><script>"'})


def test_the_page_loads_nothing(report: str) -> None:
    assert "<script" not in report
    sources = re.findall(r"""(?:src|href|action|data)\s*=\s*["']([^"']*)""", report)
    assert len(sources) == 2 + len(ROWS)
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"@import|url\(|<link|<iframe", report)


def test_the_page_holds_every_picture(report: str, grids: dict[str, bytes]) -> None:
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]*)", report)]
    assert pictures == list(grids.values())
    plots = [base64.b64decode(data) for data in re.findall(r"data:image/svg\+xml;base64,([^\"]*)", report)]
    assert [plot.lstrip().startswith(b"<?xml") for plot in plots] == [True, True]


def test_names_and_settings_are_text_to_the_page(report: str) -> None:
    assert "<b>steps" not in report
    assert report.count("few [red]&lt;b&gt;steps&lt;/b&gt;") == 3  # table, alt text, caption
    assert "<title>A &amp; B</title>" in report
    (settings,) = re.findall(r"<pre>(.*?)</pre>", report, re.DOTALL)
    assert json.loads(html.unescape(settings)) == {"quoted": '</pre><script>"'}


def test_the_pages_table_marks_the_best(report: str) -> None:
    cells = re.findall(r'<td class="best">(.*?)</td>', report)
    assert "0.620" in cells
    assert "0.990" not in cells
