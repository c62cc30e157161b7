"""What a run says about itself: scalars and image grids, for TensorBoard and as plain files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ldgan.engine.cli import UserError
from ldgan.engine.files import write_atomically
from ldgan.engine.images import image_grid, save_png
from ldgan.engine.run import RunFolder


class Tracker:
    """Writes scalars to ``metrics.jsonl`` and TensorBoard, image grids to ``samples/`` and TensorBoard.

    ``enabled`` is False on all processes but the main one; there every method does nothing. A run that starts
    again after ``resume_step`` finished steps (0: from scratch) goes through later steps twice, so what was
    logged past that step is dropped, and the clock goes on from the last row that stays.
    """

    def __init__(self, run: RunFolder, enabled: bool, resume_step: int = 0) -> None:
        self._run = run
        self._writer: SummaryWriter | None = None
        if enabled:
            rows = _rows_up_to(run.metrics_path, resume_step)
            write_atomically(run.metrics_path, "".join(json.dumps(row) + "\n" for row in rows))
            self._started = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
            self._writer = SummaryWriter(str(run.tensorboard), purge_step=resume_step + 1)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log_scalars(self, step: int, num_images: int, scalars: Mapping[str, float]) -> None:
        """Log values after ``step`` >= 1 steps and ``num_images`` images, with the seconds spent so far."""
        if self._writer is None:
            return
        seconds = round(time.monotonic() - self._started, 3)
        row = {"step": step, "num_images": num_images, "seconds": seconds, **scalars}
        with self._run.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def log_images(self, step: int, name: str, images: Tensor, columns: int) -> None:
        """Log uint8 images (N, C, H, W) as one grid, in ``samples/<name>_<step>.png`` and TensorBoard."""
        if self._writer is None:
            return
        grid = image_grid(images, columns)
        save_png(self._run.samples / f"{name}_{step:09d}.png", grid)
        self._writer.add_image(name, grid, step)

    def close(self) -> None:
        """Write out what TensorBoard still buffers."""
        if self._writer is not None:
            self._writer.close()


def check_finite(terms: Mapping[str, float], step: int, last_checkpoint: Path | None) -> None:
    """Stop a run whose losses are no longer numbers.

    Raises:
        UserError: naming the step, the first term that is NaN or infinite, and the last good checkpoint.
    """
    for name, value in terms.items():
        if not math.isfinite(value):
            last_good = f"last good checkpoint: {last_checkpoint}" if last_checkpoint else "no checkpoint yet"
            raise UserError(f"step {step}: {name} is {value}; {last_good}; a lower learning rate may help")


def _rows_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the rows of ``metrics.jsonl`` for steps up to ``step``; none if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short when the run was killed
        if row["step"] <= step:
            rows.append(row)
    return rows
