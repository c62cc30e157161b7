"""Plots of the toys. They know only numbers, and return PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from ldgan.reports.trilemma import BLUE, GREY, INK, ORANGE, new_figure, png

SHADE = "#d9d9d9"


class DenoisingPanel(NamedTuple):
    """q(x_{t-1} | x_t) and what stands for it, as densities (n,) over the bins between ``edges`` (n + 1,)."""

    title: str
    edges: np.ndarray
    true: np.ndarray
    gaussian: np.ndarray
    generator: np.ndarray | None


class GridPanel(NamedTuple):
    """Points (N, 2) of a model, and its numbers in words."""

    title: str
    caption: str
    points: np.ndarray


def denoising_plot(panels: Sequence[DenoisingPanel]) -> bytes:
    """One panel for each step size: the truth as an area, and both fits as lines; each has a scale of its own."""
    figure = new_figure(2.2 * len(panels), 2.9)
    axes: list[Axes] = list(figure.subplots(1, len(panels), sharex=True))
    for ax, panel in zip(axes, panels):
        ax.stairs(panel.true, panel.edges, fill=True, color=SHADE, label="true $q(x_{t-1}\\mid x_t)$")
        ax.stairs(panel.gaussian, panel.edges, color=ORANGE, linewidth=1.8, linestyle="--", label="best Gaussian")
        if panel.generator is not None:
            ax.stairs(panel.generator, panel.edges, color=BLUE, linewidth=1.3, label="our generator, many $z$")
        ax.set_title(panel.title, color=INK, fontsize=10)
        ax.set_xlabel("$x_{t-1}$", color=INK)
        ax.set_ylim(0, 1.75 * panel.true.max())  # without z, the generator's line leaves the panel: it is a point
        _plain(ax)
        ax.set_yticks([])
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return png(figure)


def grid_plot(panels: Sequence[GridPanel], modes: np.ndarray) -> bytes:
    """Scatter of each model's points, with a cross where ``modes`` (K, 2) lie."""
    columns = (len(panels) + 1) // 2
    figure = new_figure(3.0 * columns, 6.8)
    reach = 1.25 * np.abs(modes).max()
    for ax, panel in zip(figure.subplots(2, columns).flat, panels):
        ax.scatter(*modes.T, s=30, c=ORANGE, marker="+", linewidths=0.8, zorder=1)
        ax.scatter(*panel.points.T, s=2.0, c=BLUE, alpha=0.35, linewidths=0, zorder=2)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        ax.set_title(panel.title, color=INK, fontsize=11)
        ax.set_xlabel(panel.caption, color=INK, fontsize=9)
        ax.spines[:].set_color(GREY)
    return png(figure)


def _plain(axes: Axes) -> None:
    """No frame but the ground line."""
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(length=0, colors=INK, labelsize=8)
