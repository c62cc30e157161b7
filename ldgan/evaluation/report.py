"""The results of an evaluation as people read them: tables, each number under its full name and with its N."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 110  # characters


def print_result(result: Mapping[str, Any]) -> None:
    """Print everything that was measured, and what readers should know of the images."""
    # Brackets and colons are those of names: nothing here is markup.
    console = Console(width=WIDTH, highlight=False, markup=False, emoji=False)
    for line in (headline(result), *(f"note: {warning}" for warning in warnings(result))):
        console.print(line, soft_wrap=True)
    for key, table in TABLES.items():
        if result.get(key):
            console.print(table(result))


def headline(result: Mapping[str, Any]) -> str:
    """Of how many and which images the numbers are, and what they are compared with."""
    images = result["images"]
    number = f"{result['num_images']:,} images of " if "num_images" in result else ""  # none: the time alone
    text = f"{number}{result['checkpoint'] or images['path']}, {size_of(images)}"
    reference = result.get("reference")
    if reference is None:
        return text
    number = f"{reference['num_images']:,}" if reference["num_images"] is not None else "an unknown number"
    return f"{text}, beside {number} of {reference['path']}"


def size_of(description: Mapping[str, Any]) -> str:
    """The size of images, with how they came to it."""
    height, width = description["size"]
    resize = description["resize"]
    return f"{height}x{width} px" + (f" (resized, {resize['filter']})" if resize else "")


def warnings(result: Mapping[str, Any]) -> list[str]:
    """What makes numbers differ from those of others, or from what was meant."""
    found = []
    reference, heldout = result.get("reference", {}), result.get("copying", {}).get("heldout", {})
    for name, images, notes in (
        ("images", result["images"], result.get("notes", {})),
        ("reference", reference, reference.get("notes", {})),
        ("held-out images", heldout, heldout.get("notes", {})),
    ):
        if images.get("lossy"):
            found.append(f"{name}: stored with loss ({', '.join(images['formats'])}), which shifts distances")
        if images.get("num_left_out"):
            found.append(f"{name}: beside the numbered ones, {images['num_left_out']} pictures are left out")
        counted = {note: number for note, number in notes.items() if isinstance(number, int) and number}
        if counted:
            texts = (f"{number:,} {note.removeprefix('num_')}" for note, number in counted.items())
            found.append(f"{name}: {', '.join(texts)}")
    return found


def metrics_table(result: Mapping[str, Any]) -> Table:
    """Metrics of features; arrows point to the better side."""
    table = Table(title="Quality and coverage", title_justify="left")
    for column in ("metric", "value", "std", "images", "reference"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for metric in result["metrics"]:
        details = metric["details"]
        label = f"{metric['name']} {'↑' if metric['better'] == 'higher' else '↓'}"
        std = "" if metric["std"] is None else significant(metric["std"])
        numbers = (details.get(key) for key in ("num_images", "num_reference_images"))
        table.add_row(
            label, significant(metric["value"]), std, *("" if number is None else f"{number:,}" for number in numbers)
        )
    return table


def significant(value: float) -> str:
    """Four decimals, or five significant digits of small numbers."""
    return f"{value:,.4f}" if abs(value) >= 0.01 or value == 0 else f"{value:.4g}"


def copying_table(result: Mapping[str, Any]) -> Table:
    """Distances to the nearest reference images, of samples and of held-out images."""
    copying = result["copying"]
    table = Table(title="Copying: distance to the nearest image of the reference", title_justify="left")
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_column("of new images", justify="right")
    table.add_row("a sample is nearer than a held-out image", f"{copying['nearer_than_heldout']:.1%}", "50 %")
    table.add_row("samples nearer than 99 % of held-out images", f"{copying['very_near_share']:.1%}", "1 %")
    medians = (significant(copying[f"median_distance_{kind}"]) for kind in ("samples", "heldout"))
    table.add_row("median distance", *medians)
    return table


def text_table(result: Mapping[str, Any]) -> Table:
    """How often samples are nearer to images of their own prompt than to those of others."""
    text = result["text"]
    title = (
        f"Nearer to images of its own of {text['num_prompts']:,} prompts, in features of {result['network']['name']}"
    )
    table = Table(title=title, title_justify="left", caption="plus or minus a standard error; by chance 50 %")
    table.add_column("")
    for column in ("than to another's", "than to each other's", "N"):
        table.add_column(column, justify="right")
    for label, key in (("samples", "samples"), ("real images, to others of their caption", "real_images")):
        if (numbers := text[key]) is not None:
            shares = (f"{numbers[s]:.1%} ± {numbers[f'{s}_std_error']:.1%}" for s in ("share", "mean_rank_share"))
            table.add_row(label, *shares, f"{numbers['num_points']:,}")
    return table


def modes_table(result: Mapping[str, Any]) -> Table:
    """Mode coverage beside that of real images and the floor."""
    samples, real = (result["modes"][kind] for kind in ("samples", "real_images"))
    table = Table(title=f"StackedMNIST at N = {samples['num_images']:,}", title_justify="left")
    for column in ("", "modes of 1,000", "KL to uniform (nats)"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("images", f"{samples['num_covered']:,}", f"{samples['kl']:.4f}")
    table.add_row("real images, judged alike", f"{real['num_covered']:,}", f"{real['kl']:.4f}")
    table.add_row("sampling floor (K - 1) / 2N", "", f"{samples['sampling_floor_kl']:.4f}")
    return table


def labels_table(result: Mapping[str, Any]) -> Table:
    """The share of images that show the digits they were asked to."""
    table = Table(title=f"Labels at N = {result['num_images']:,}", title_justify="left")
    table.add_column("digit")
    table.add_column("share of images that show it as wanted", justify="right")
    for digit, accuracy in result["label_accuracy"].items():
        table.add_row(digit.replace("_", " "), f"{accuracy:.1%}")
    return table


def time_table(result: Mapping[str, Any]) -> Table:
    """Milliseconds an image, by batch size; median and quartiles over batches."""
    machine = result["time"][0]["conditions"]
    title = f"Time for an image on {machine['device']}, {machine['num_threads']} threads, {machine['precision']}"
    table = Table(title=title, title_justify="left", caption="median, and the middle half of the batches")
    for column in ("batch size", "batches", "evaluations", "sampling, ms", "decoding, ms", "both, ms"):
        table.add_column(column, justify="right")
    for timing in result["time"]:
        spreads = [milliseconds(timing[stage]) for stage in ("sampling", "decoding", "total")]
        evaluations = f"{timing['evaluations_per_image']:g}"
        table.add_row(f"{timing['batch_size']:,}", f"{timing['num_batches']}", evaluations, *spreads)
    return table


def milliseconds(spread: Mapping[str, float]) -> str:
    """Median and quartiles of seconds, in milliseconds."""
    median, lower, upper = (f"{1000 * spread[key]:,.2f}" for key in ("median", "lower", "upper"))
    return f"{median} ({lower} - {upper})"


def stages_table(result: Mapping[str, Any]) -> Table:
    """How long the model took to train, and this evaluation."""
    table = Table(title="Seconds for each stage", title_justify="left")
    table.add_column("stage")
    table.add_column("s", justify="right")
    seconds = dict(result["stage_seconds"])
    if "classifier" in result:
        seconds["digit classifier"] = result["classifier"]["seconds"]
    if "seconds" in result:
        seconds["sampling and looking at images"] = result["seconds"]
    for stage, number in seconds.items():
        table.add_row(stage, f"{number:,.0f}")
    table.add_row("together", f"{sum(seconds.values()):,.0f}", style="bold")
    return table


TABLES = {
    "metrics": metrics_table,
    "copying": copying_table,
    "text": text_table,
    "modes": modes_table,
    "label_accuracy": labels_table,
    "time": time_table,
    "stage_seconds": stages_table,
}
