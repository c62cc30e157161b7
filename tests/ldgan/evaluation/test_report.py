"""Tables: every number of a result is on the page, under its name, with what readers should know of it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ldgan.evaluation.report import headline, milliseconds, print_result, significant, size_of, warnings

IMAGES = {"path": "samples/png", "size": [32, 48], "resize": None, "formats": {"png": 100}, "lossy": False}
REFERENCE = {
    **{"path": "data/train", "num_images": 12345, "size": [32, 48], "resize": None},
    **{"formats": {"png": 12345}, "lossy": False, "notes": {"grey": 0, "num_unreadable": 0, "unreadable": []}},
}
SPREAD = {"median": 0.0125, "lower": 0.0115, "upper": 0.0147}


def metric(name: str, value: float, std: float | None = None, better: str = "higher", **details: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "std": std, "better": better, "details": details}


def result_of(**changes: Any) -> dict[str, Any]:
    return {"checkpoint": None, "images": IMAGES, "num_images": 5000, "notes": {}, **changes}


def printed(capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    print_result(result_of(**changes))
    return capsys.readouterr().out


def rows(text: str) -> list[list[str]]:
    """Cells of all rows of tables."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_the_first_line_says_which_images_and_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert headline(result_of()) == "5,000 images of samples/png, 32x48 px"
    beside = result_of(checkpoint="runs/a/checkpoints/step_000000100", reference=REFERENCE)
    text = "5,000 images of runs/a/checkpoints/step_000000100, 32x48 px, beside 12,345 of data/train"
    assert headline(beside) == text
    npz = result_of(reference={"path": "cifar10.npz", "num_images": None})
    assert headline(npz).endswith("beside an unknown number of cifar10.npz")
    timed = result_of(checkpoint="runs/a")
    del timed["num_images"]  # nothing but the time was measured
    assert headline(timed) == "runs/a, 32x48 px"
    assert printed(capsys, reference=REFERENCE).splitlines()[0] == headline(result_of(reference=REFERENCE))


def test_a_size_tells_how_images_came_to_it() -> None:
    assert size_of({"size": [32, 48], "resize": None}) == "32x48 px"
    assert size_of({"size": [64, 64], "resize": {"resolution": 64, "filter": "box"}}) == "64x64 px (resized, box)"


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    path = "a/[bold]/[/x]:smile:/" + "long" * 40
    name = "Frechet distance (timm:x:key:@[red])"
    text = printed(capsys, images=IMAGES | {"path": path}, metrics=[metric(name, 1.0)])
    assert text.splitlines()[0] == f"5,000 images of {path}, 32x48 px"
    assert rows(text)[0][0] == f"{name} ↑"


def test_metrics_have_a_row_each_with_their_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = [
        metric("FID", 1234.56789, None, "lower", num_images=5000, num_reference_images=12345),
        metric("KID", -0.00012345678, 0.001, "lower", num_images=4000, num_reference_images=3000, subset_size=1000),
        metric("Inception score", 9.87654, 0.12345, num_images=5000),
        metric("recall (inception)", 0.0, num_images=5000, num_reference_images=12345, k=3),
        metric("Frechet distance (alexnet)", 3.0, None, "lower", num_images=5000, num_reference_images=None),
    ]
    assert rows(printed(capsys, metrics=metrics)) == [
        ["FID ↓", "1,234.5679", "", "5,000", "12,345"],
        ["KID ↓", "-0.0001235", "0.001", "4,000", "3,000"],
        ["Inception score ↑", "9.8765", "0.1235", "5,000", ""],
        ["recall (inception) ↑", "0.0000", "", "5,000", "12,345"],
        ["Frechet distance (alexnet) ↓", "3.0000", "", "5,000", ""],
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0000"),
        (0.01, "0.0100"),
        (0.0099996, "0.01"),
        (-3.14159, "-3.1416"),
        (2e-7, "2e-07"),
        (1e6, "1,000,000.0000"),
    ],
)
def test_small_numbers_keep_their_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_copying_stands_beside_what_new_images_would_score(capsys: pytest.CaptureFixture[str]) -> None:
    copying = {
        **{"nearer_than_heldout": 0.8765, "very_near_share": 0.123},
        **{"median_distance_samples": 1.25, "median_distance_heldout": 2.5, "heldout": {"path": "data/test"}},
    }
    assert rows(printed(capsys, copying=copying)) == [
        ["a sample is nearer than a held-out image", "87.6%", "50 %"],
        ["samples nearer than 99 % of held-out images", "12.3%", "1 %"],
        ["median distance", "1.2500", "2.5000"],
    ]


def test_modes_stand_beside_real_images_and_the_floor(capsys: pytest.CaptureFixture[str]) -> None:
    samples = {"num_covered": 987, "kl": 0.12345, "num_images": 26000, "sampling_floor_kl": 0.01921}
    real = {"num_covered": 1000, "kl": 0.0206, "num_images": 26000, "sampling_floor_kl": 0.01921}
    text = printed(capsys, modes={"samples": samples, "real_images": real})
    assert "StackedMNIST at N = 26,000" in text
    assert rows(text) == [
        ["images", "987", "0.1235"],
        ["real images, judged alike", "1,000", "0.0206"],
        ["sampling floor (K - 1) / 2N", "", "0.0192"],
    ]


def test_labels_have_a_row_for_each_digit_and_all(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, label_accuracy={"red": 0.5, "green": 0.25, "blue": 1.0, "all_three": 0.0625})
    assert "Labels at N = 5,000" in text
    assert rows(text) == [["red", "50.0%"], ["green", "25.0%"], ["blue", "100.0%"], ["all three", "6.2%"]]


def test_times_are_milliseconds_for_each_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    conditions = {"device": "cpu", "num_threads": 3, "precision": "bf16"}
    spreads = {
        "sampling": SPREAD,
        "decoding": {key: value / 10 for key, value in SPREAD.items()},
        "total": {key: value * 10 for key, value in SPREAD.items()},
    }
    timing = {"batch_size": 1, "num_batches": 10, "evaluations_per_image": 4.0, "conditions": conditions, **spreads}
    text = printed(capsys, time=[timing, timing | {"batch_size": 2000, "evaluations_per_image": 7.5}])
    assert "Time for an image on cpu, 3 threads, bf16" in text
    cells = ["12.50 (11.50 - 14.70)", "1.25 (1.15 - 1.47)", "125.00 (115.00 - 147.00)"]
    assert rows(text) == [["1", "10", "4", *cells], ["2,000", "10", "7.5", *cells]]
    assert milliseconds(SPREAD) == cells[0]


def test_seconds_of_all_stages_are_added_up(capsys: pytest.CaptureFixture[str]) -> None:
    stages = {"images to shards": 10.4, "diffusion GAN training": 3600.0}
    alone = rows(printed(capsys, stage_seconds=stages))
    assert alone == [["images to shards", "10"], ["diffusion GAN training", "3,600"], ["together", "3,610"]]
    text = printed(capsys, stage_seconds=stages, classifier={"seconds": 55.0}, seconds=7.0)
    assert rows(text)[2:] == [
        ["digit classifier", "55"],
        ["sampling and looking at images", "7"],
        ["together", "3,672"],
    ]


def test_what_was_not_measured_has_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, metrics=[]) == "5,000 images of samples/png, 32x48 px\n"


def test_what_makes_numbers_differ_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert warnings(result_of(reference=REFERENCE)) == []
    images = IMAGES | {"formats": {"jpg": 90, "png": 10}, "lossy": True, "num_left_out": 2, "left_out": ["a", "b"]}
    notes = {"grey": 1200, "alpha": 0, "16-bit": 3, "resized": 7, "unreadable": ["x.png"], "num_unreadable": 1}
    heldout = REFERENCE | {"notes": {"alpha": 4}}
    copying = {
        **{"nearer_than_heldout": 0.5, "very_near_share": 0, "median_distance_samples": 1},
        **{"median_distance_heldout": 1, "heldout": heldout},
    }
    reference = REFERENCE | {"lossy": True, "formats": {"webp": 3}, "notes": notes}
    lines = [
        "images: stored with loss (jpg, png), which shifts distances",
        "images: beside the numbered ones, 2 pictures are left out",
        "images: 1,200 grey, 3 16-bit, 7 resized, 1 unreadable",
        "reference: stored with loss (webp), which shifts distances",
        "reference: 1,200 grey, 3 16-bit, 7 resized, 1 unreadable",
        "held-out images: 4 alpha",
    ]
    changes = {"images": images, "notes": notes, "reference": reference, "copying": copying}
    assert warnings(result_of(**changes)) == lines
    text = printed(capsys, **changes)
    assert re.findall(r"^note: (.*)$", text, re.MULTILINE) == lines
