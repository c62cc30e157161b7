"""What is fuzzed: each target makes a case out of random numbers, in a folder, and reads it as the commands do."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

import autoencoder.train
import ldgan.train
import ldgan.train_classifier
import ldgan.train_ddpm
from autoencoder.inference import light_decoder
from autoencoder.inference.latents import pack_moments
from autoencoder.inference.trained_autoencoder import KIND as AUTOENCODER_KIND
from autoencoder.inference.trained_autoencoder import WEIGHTS as AUTOENCODER_WEIGHTS
from autoencoder.inference.trained_autoencoder import fingerprint, load_autoencoder
from autoencoder.models.autoencoder import AutoencoderKL
from autoencoder.models.config import AutoencoderConfig
from autoencoder.models.light_decoder import LightDecoderConfig, build_light_decoder
from data_prep import remote
from data_prep.archives import ImageArchive, WebDatasetShards
from data_prep.check_shards import find_problems
from data_prep.images import IMAGE_FORMATS
from data_prep.loader import ImageDataset, LatentDataset, SampleRef, TrainingOrder
from data_prep.preparation import Preparation, prepare
from data_prep.shards import Manifest, ShardInfo, ShardSet
from data_prep.sources import ImageFolder, ListedSource
from ldgan.compare import CompareConfig
from ldgan.engine.checkpoint import DESCRIPTION_FILE, check_checkpoint, save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import load_config, to_dict
from ldgan.engine.run import RunFolder
from ldgan.engine.weights import load_weights
from ldgan.inference.trained_classifier import KIND as CLASSIFIER_KIND
from ldgan.inference.trained_classifier import WEIGHTS as CLASSIFIER_WEIGHTS
from ldgan.inference.trained_model import GAN, WEIGHTS, build_unet, load_model
from ldgan.models.classifier import ClassifierConfig, build_classifier
from ldgan.models.unet import UNetConfig
from ldgan.training.data import DataConfig, keep_autoencoder, open_source

RESOLUTION = 8
NUM_SAMPLES = 4
INTEGERS = (0, 1, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**33, 2**63 - 1, 2**64 - 1)

# What JSON and YAML can put in the place of any value.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 10**9, 10**18, 2**63, 10**30, -(10**9), 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "x", "4", "${oc.env:FUZZ_SECRET}", "???", "../../x", "/etc/passwd", "\n\x1b[31m"),
    *("\ud800", "x" * 5000, [], [[]], {}, {"a": 1}, [None], ["x"], [0], [-1], [1] * 9, [10**9], [1] * 20_000),
    *([2**62, 2**62], {"sha256": "x"}, {str(number): number for number in range(100)}),
)


class Target(Protocol):
    """One kind of hostile files."""

    def prepare(self, home: Path) -> None:
        """Make what the cases are made of, in a folder that stays."""

    def run(self, rng: random.Random, folder: Path) -> None:
        """Make a case in ``folder``, which is empty, and read it; raises `UserError` if it is refused."""


class Payload:
    """Unpickling it makes a folder where nobody may."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/executed",)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Bytes with some of them changed, lost, doubled, or made a number at the edge."""
    mutated = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(mutated) + 1)
        size = min(rng.choice((1, 2, 4, 16, 100)), len(mutated) - at)
        match rng.randrange(7):
            case 0:
                mutated[at : at + size] = rng.randbytes(size)
            case 1:
                del mutated[at : at + size]
            case 2:
                mutated[at:at] = mutated[at : at + size] * rng.choice((1, 2, 50))
            case 3:
                del mutated[at:]
            case 4:
                number = rng.choice(INTEGERS)
                width, order = rng.choice((1, 2, 4, 8)), rng.choice(("big", "little"))
                mutated[at : at + width] = (number % 256**width).to_bytes(width, order)
            case _:
                if at < len(mutated):
                    mutated[at] ^= 1 << rng.randrange(8)
    return bytes(mutated)


def mutate_json(rng: random.Random, document: Any) -> None:
    """Replace, remove or add values anywhere in nested dicts and lists."""
    places = list(_places(document))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        container, key = rng.choice(places)
        match rng.randrange(8):
            case 0 if isinstance(container, dict):
                container.pop(key, None)
            case 1 if isinstance(container, dict):
                container[rng.choice(("x", "__class__", "../x", "a.b", "\n\x1b[31m", "k" * 5000))] = rng.choice(VALUES)
            case 2 if isinstance(container, list):
                container *= rng.choice((0, 2, 100))
            case _:
                if isinstance(container, dict) or key < len(container):
                    container[key] = rng.choice(VALUES)


def _places(document: Any) -> Iterable[tuple[Any, Any]]:
    keys = document.keys() if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in list(keys):
        yield document, key
        yield from _places(document[key])


def dump(document: Any) -> bytes:
    """JSON, or something near it: half characters and numbers that are none are written too."""
    return json.dumps(document).encode()


def image_bytes(rng: random.Random, side: int = RESOLUTION, formats: Iterable[str] = ("PNG", "JPEG", "WEBP")) -> bytes:
    """An image as Pillow writes it."""
    pixels = np.frombuffer(rng.randbytes(side * side * 3), np.uint8).reshape(side, side, 3)
    buffer = io.BytesIO()
    image, name = Image.fromarray(pixels), rng.choice([*formats])
    options: dict[str, Any] = {}
    if name == "JPEG":
        exif = Image.Exif()
        exif[0x0112] = rng.randrange(1, 9)
        options = {"progressive": rng.random() < 0.5, "exif": exif, "icc_profile": rng.randbytes(50)}
    image.convert(rng.choice(("RGB", "L", "P")) if name in ("PNG", "GIF", "TIFF") else "RGB").save(
        buffer, name, **options
    )
    return buffer.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG with the right checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bomb(rng: random.Random) -> bytes:
    """A small PNG of very many pixels, or with a text that unpacks to very many bytes."""
    side = rng.choice((1, RESOLUTION, 9000, 13_000, 20_000, 2**16, 2**31 - 1))
    depth, colour = rng.choice(((8, 2), (16, 2), (8, 0), (16, 0), (8, 6), (1, 0), (8, 3)))
    header = struct.pack(">IIBBBBB", side, rng.choice((side, RESOLUTION)), depth, colour, 0, 0, 0)
    zeros = zlib.compress(bytes(rng.choice((100, 10**6, 10**8))), 1)
    text = png_chunk(b"zTXt", b"Comment\0\0" + zeros) if rng.random() < 0.3 else b""
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + text + png_chunk(b"IDAT", zeros) + png_chunk(b"IEND", b"")
    )


def npy_bytes(rng: random.Random, latent_shape: tuple[int, int, int]) -> bytes:
    """A file of `numpy.save`, or one whose header lies."""
    channels, height, width = latent_shape
    shapes = [(2 * channels, height, width), (2, 2 * channels, height, width), (3, height, width), (), (0,), (7,)]
    dtypes = ("<f4", "<f2", "<f8", "<i8", "<c8", "S3", "<M8[s]", "?", "f4,i2", ">f4", "<U2")
    buffer = io.BytesIO()
    match rng.randrange(5):
        case 0:
            np.save(buffer, np.array([Payload()], dtype=object), allow_pickle=True)
        case 1:
            return pickle.dumps(Payload())
        case 2:
            huge = rng.choice(((10**13,), (2**31, 2**31), (2**40, 0), (10**9,), (-1,), (10**30,), "x", (True, 2)))
            header = f"{{'descr': {rng.choice(dtypes)!r}, 'fortran_order': False, 'shape': {huge!r}}}\n".encode()
            version = rng.choice((b"\1\0", b"\2\0", b"\3\0", b"\7\0"))
            size = struct.pack("<H" if version == b"\1\0" else "<I", len(header))
            return b"\x93NUMPY" + version + size + header + bytes(64)
        case _:
            np.save(buffer, np.zeros(rng.choice(shapes[:2] + shapes), rng.choice(("<f4", *dtypes))), allow_pickle=False)
    return mutate(rng, buffer.getvalue()) if rng.random() < 0.5 else buffer.getvalue()


NAMES = (
    *("../000000001.png", "/etc/passwd", "000000001.pyd", "000000001.pickle", "000000001.pkl", "000000001.pth"),
    *("000000001.png\n\x1b[31m", "n" * 5000, "0.png", ".", "..", "a/../../x.jpg", "cat.jpg", "cat.JSON", "\udc80.png"),
    *("000000001.cls", "999999999.png", "000000001.npy", "x/000000001.txt", "con.jpg.txt", "000000001.pt"),
)
TYPES = (
    *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE),
    *(
        tarfile.CONTTYPE,
        tarfile.GNUTYPE_SPARSE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.XGLTYPE,
        tarfile.XHDTYPE,
        b"?",
        b"\0",
    ),
)
PAX = (
    *({"size": "-512"}, {"size": "9" * 30}, {"size": "0"}, {"path": "../../x.png"}, {"path": "000000001.pickle"}),
    *(
        {"GNU.sparse.map": "0,9"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        {"GNU.sparse.size": "99999999999"},
    ),
    *(
        {"GNU.sparse.name": "/x"},
        {"hdrcharset": "BINARY"},
        {"mtime": "nan"},
        {"x": "y" * 9000},
        {"GNU.sparse.map": "0,"},
    ),
)
FIELDS = {
    "size": (124, 12),
    "name": (0, 100),
    "type": (156, 1),
    "mode": (100, 8),
    "prefix": (345, 155),
    "magic": (257, 8),
}


def hostile_tar(rng: random.Random, samples: list[dict[str, bytes]]) -> bytes:
    """A tar of these samples, with members of other names, kinds and lengths, and damage in headers and content."""
    buffer = io.BytesIO()
    tar_format = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, errors="surrogateescape") as tar:
        for index, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"{index:09d}.{extension}")
                if rng.random() < 0.05:
                    member.name = rng.choice(NAMES)
                if rng.random() < 0.03:
                    member.type, member.linkname = rng.choice(TYPES), "/etc/passwd"
                if rng.random() < 0.03:
                    member.pax_headers = dict(rng.choice(PAX))
                if rng.random() < 0.03:
                    content = pickle.dumps(Payload())
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    data = bytearray(buffer.getvalue())
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        damage_header(rng, data)
    return mutate(rng, bytes(data)) if rng.random() < 0.2 else bytes(data)


def damage_header(rng: random.Random, tar: bytearray) -> None:
    """Put something else into a field of a header, and make its checksum right."""
    headers = [at for at in range(0, len(tar) - 512, 512) if tar[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return
    at = rng.choice(headers)
    start, width = FIELDS[rng.choice([*FIELDS, "size", "type"])]
    numbers = (b"77777777777\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\xff" * 11 + b"\0", b"-1\0", b"00000001000\0")
    value = rng.choice((*numbers, rng.randbytes(width), b"x", b"L", b"S", b"g", b"../x", b"\x80" + bytes(10) + b"\x10"))
    tar[at + start : at + start + width] = value[:width].ljust(width, b"\0")
    checksum = sum(tar[at : at + 512]) - sum(tar[at + 148 : at + 156]) + 8 * ord(" ")
    tar[at + 148 : at + 156] = b"%06o\0 " % checksum


def write_set(folder: Path, tar: bytes, kind: str, details: dict[str, Any]) -> Path:
    """A shard set of one tar, whose manifest tells its size and hash as they are."""
    folder.mkdir()
    (folder / "shard-000000.tar").write_bytes(tar)
    info = ShardInfo("shard-000000.tar", NUM_SAMPLES, len(tar), hashlib.sha256(tar).hexdigest())
    Manifest(kind, NUM_SAMPLES, (info,), ["a", "b"], True, 1.0, details).write(folder)
    return folder


def read_set(rng: random.Random, folder: Path) -> None:
    """Read a set as training does, or check it."""
    if rng.random() < 0.3:
        expect_lines(find_problems(folder, Manifest.read(folder), decode=True))
        return
    shards = ShardSet.open(folder)
    dataset = (ImageDataset if shards.manifest.kind == "images" else LatentDataset)(shards)
    flips = shards.manifest.details.get("flips") is True or shards.manifest.kind == "images"
    for index in range(NUM_SAMPLES):
        dataset[SampleRef(index, flips and rng.random() < 0.5)]


def prepare_raw(source: ListedSource) -> None:
    """Have the images of a source prepared, as make_shards does."""
    options = {"crop": "center", "min_side": 1, "max_aspect": None, "deduplicate": True, "seed": 0}
    preparation = Preparation(resolution=RESOLUTION, image_format="png", quality=95, **options)
    results = prepare(list(itertools.islice(source, 8)), preparation, num_classes=len(source.class_names or "x" * 9))
    expect_lines(getattr(result, "reason", "") for result in results)
    if all(hasattr(result, "reason") for result in results):
        raise UserError("all rejected")


def expect_lines(lines: Iterable[str]) -> None:
    """Reports are printed, a line each: they are held to what messages of errors are."""
    found = [line for line in lines if line]
    for line in found:
        if "\n" in line or "MemoryError" in line or len(line) > 10_000:
            raise ValueError(f"no line to print: {line!r:.300}")


def image_sample(rng: random.Random) -> dict[str, bytes]:
    """A sample as make_shards writes it."""
    extension = rng.choice([*IMAGE_FORMATS])
    content = image_bytes(rng, formats=[IMAGE_FORMATS[extension]])
    return {extension: content, "cls": str(rng.randrange(2)).encode(), "txt": "größer".encode()}


class Tars:
    """Tars: our own shards, those of other tools, and archives of images."""

    def prepare(self, home: Path) -> None:
        """Nothing."""

    def run(self, rng: random.Random, folder: Path) -> None:
        """See `Target`."""
        tar = hostile_tar(rng, [image_sample(rng) for _ in range(NUM_SAMPLES)])
        reader = rng.choice(("set", "set", "webdataset", "archive"))
        if reader == "set":
            read_set(rng, write_set(folder / "set", tar, "images", {"resolution": RESOLUTION}))
            return
        (folder / "images.tar").write_bytes(tar)
        prepare_raw(WebDatasetShards(folder) if reader == "webdataset" else ImageArchive(folder / "images.tar"))


class Images:
    """Images: damaged bytes of all formats, and bombs; as a sample of a shard, and as a file."""

    formats: ClassVar[tuple[str, ...]] = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "TGA", "AVIF")

    def prepare(self, home: Path) -> None:
        """Nothing."""

    def run(self, rng: random.Random, folder: Path) -> None:
        """See `Target`."""
        if rng.random() < 0.1:
            content = bomb(rng)
        else:
            content = mutate(rng, image_bytes(rng, rng.choice((RESOLUTION, 40)), self.formats))
        if rng.random() < 0.5:
            suffix = rng.choice(("jpg", "png", "webp", "gif", "tif", "bmp", "ppm", "tga", "avif"))
            (folder / f"image.{suffix}").write_bytes(content)
            prepare_raw(ImageFolder(folder))
        else:
            samples = [{rng.choice(("png", "jpg", "webp")): content} for _ in range(NUM_SAMPLES)]
            read_set(rng, write_set(folder / "set", plain_tar(samples), "images", {"resolution": RESOLUTION}))


def plain_tar(samples: list[dict[str, bytes]]) -> bytes:
    """A tar as it should be."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for index, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"{index:09d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class Arrays:
    """Arrays: the npy members of latent shards."""

    def prepare(self, home: Path) -> None:
        """Nothing."""

    def run(self, rng: random.Random, folder: Path) -> None:
        """See `Target`."""
        shape = (2, 4, 4)
        good = pack_moments(torch.zeros(2, 4, 4, 4), 1)
        samples = [good if rng.random() < 0.5 else {"npy": npy_bytes(rng, shape)} for _ in range(NUM_SAMPLES)]
        details: dict[str, Any] = {"resolution": RESOLUTION, "flips": True}
        details |= {"latent_shape": [*shape]} if rng.random() < 0.5 else {}
        read_set(rng, write_set(folder / "set", plain_tar(samples), "latents", details))


class Captions:
    """Captions and labels: text, JSON and numbers, in shards of ours and of others, and in folders."""

    def prepare(self, home: Path) -> None:
        """Nothing."""

    def run(self, rng: random.Random, folder: Path) -> None:
        """See `Target`."""
        deep = b"[" * rng.choice((10, 10_000, 1_000_000))
        texts = (b"", b"\xff\xfe", b"\0" * 9, deep, b"9" * 10_000, b"-1", b"1e9", b'{"caption": "x"}', b"[1]", b"null")
        texts += (b'{"caption": ' + deep, dump({"caption": rng.choice(VALUES)}), "\u202e\x1b[2J".encode(), b"${x}")
        samples = []
        for _ in range(NUM_SAMPLES):
            text = rng.choice(texts)
            text = mutate(rng, text) if rng.random() < 0.3 else text
            samples.append(image_sample(rng) | {rng.choice(("txt", "cls", "txt", "cls", "json")): text})
        if rng.random() < 0.4:
            for sample in samples:
                sample.pop("json", None)
            read_set(rng, write_set(folder / "set", plain_tar(samples), "images", {"resolution": RESOLUTION}))
        elif rng.random() < 0.8:
            for sample in samples:
                sample.pop("txt", None) if "json" in sample else None
            (folder / "images.tar").write_bytes(plain_tar(samples))
            prepare_raw(WebDatasetShards(folder))
        else:
            (folder / "0.png").write_bytes(image_bytes(rng))
            (folder / "0.txt").write_bytes(rng.choice(texts))
            prepare_raw(ImageFolder(folder))


class Manifests:
    """Manifests: other types, numbers and names in any field, and damaged bytes."""

    def prepare(self, home: Path) -> None:
        """A set of two shards."""
        remote.FIRST_WAIT_SECONDS = 0.0  # between attempts
        self._home = home / "set"
        self._home.mkdir()
        rng, infos = random.Random(0), []
        for number in range(2):
            # A set of each kind would do; moments are read in an images set too, as far as the kind lets them.
            tar = plain_tar([image_sample(rng) for _ in range(NUM_SAMPLES)])
            tar = tar if number == 0 else renumbered(tar)
            (self._home / f"shard-{number:06d}.tar").write_bytes(tar)
            infos.append(ShardInfo.of_file(self._home / f"shard-{number:06d}.tar", NUM_SAMPLES))
        details = {"resolution": RESOLUTION, "latent_shape": [2, 4, 4], "flips": False, "autoencoder": "x"}
        Manifest("images", 2 * NUM_SAMPLES, tuple(infos), ["a", "b"], True, 1.0, details).write(self._home)
        self._document = json.loads((self._home / "manifest.json").read_text())

    def run(self, rng: random.Random, folder: Path) -> None:
        """See `Target`."""
        data = shutil.copytree(self._home, folder / "set")
        document = json.loads(json.dumps(self._document))
        mutate_json(rng, document)
        content = dump(document)
        (data / "manifest.json").write_bytes(mutate(rng, content) if rng.random() < 0.2 else content)
        if rng.random() < 0.2:
            expect_lines(find_problems(data, Manifest.read(data)))
            return
        if rng.random() < 0.2:
            fetched = remote.RemoteFolder(f"file://{data}", remote.Cache(folder / "cache", max_bytes=10**9))
            ShardSet(fetched, Manifest.read(fetched)).read(0)
            return
        source = open_source(str(data), None)
        shards = source.dataset.shards
        batch = {"micro_batch_size": 4, "num_micro_batches": 1, "rank": 0, "world_size": 1}
        order = TrainingOrder(shards.shard_sizes, **batch, seed=0, first_step=0, flips=True)
        for refs in itertools.islice(order, 3):
            for ref in refs:
                source.dataset[ref]
        _ = shards.manifest.fingerprint, shards.manifest.num_bytes, source.description


def renumbered(tar: bytes) -> bytes:
    """The second shard, whose samples count on from the first."""
    samples: dict[str, dict[str, bytes]] = {}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(tar)) as old, tarfile.open(fileobj=buffer, mode="w") as new:
        for member in old:
            content = old.extractfile(member)
            assert content is not None
            number, _, extension = member.name.partition(".")
            member.name = f"{int(number) + NUM_SAMPLES:09d}.{extension}"
            new.addfile(member, content)
            samples.setdefault(number, {})[extension] = b""
    return buffer.getvalue()


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 30))
YAML_VALUES = (
    *("!!python/object/apply:os.system ['touch /tmp/executed']", "!!python/object/new:os.mkdir ['/tmp/executed']"),
    *("!!python/name:os.system", "!!python/module:os", "!!python/object/apply:pathlib.Path [/etc, passwd]", "!!x 1"),
    *("${oc.env:FUZZ_SECRET}", "x${oc.env:FUZZ_SECRET,y}", "${oc.decode:'[1,2]'}", "${oc.create:{a:1}}", "${run.dir}"),
    *("${oc.env:${oc.env:FUZZ_SECRET}}", "${", "${x", "\\${oc.env:FUZZ_SECRET}", "$${oc.env:FUZZ_SECRET}", "???", "@x"),
    *("2001-02-30", "9" * 5000, "1e999", ".nan", "-.inf", "0o17", "1:2:3", "!!int x", "!!float 1e", "!!binary '!'"),
    *("!!set {a, b}", "!!omap [a: 1]", "!!timestamp 2001-99-99", "{[1]: 2}", "{{a: b}: c}", "? [a]", "&x [*x]", "*y"),
    *(
        "[" * 500,
        "[" * 100_000,
        "{a: " * 500,
        "null",
        "~",
        "true",
        "[]",
        "{}",
        "[1, 2]",
        "'\\x1b[31m'",
        '"\\ud800"',
        "|",
    ),
    *("!!merge x", "{<<: 3}", "{<<: [1]}", "{=: 1}", "'\0'", "\x1b[31m", "\ufeff", "1" * 400, "[[[]]]", "x: y: z"),
)


class Configs:
    """Configs: tags, aliases, interpolations and values of other types, in files and on the command line."""

    schemas: ClassVar[tuple[type, ...]] = (
        *(ldgan.train.TrainConfig, autoencoder.train.TrainConfig, ldgan.train_ddpm.TrainConfig),
        *(ldgan.train_classifier.TrainConfig, CompareConfig),
    )

    def prepare(self, home: Path) -> None:
        """Nothing."""

    def run(self, rng: random.Random, folder: Path) -> None:
        """See `Target`."""
        path = folder / "config.yaml"
        path.write_bytes(self._text(rng).encode("utf-8", "surrogatepass"))
        if rng.random() < 0.1:
            RunFolder.create_or_resume(folder, "seed: 1\n")
            return
        overrides = [f"data={folder}", f"run.dir={folder}/run"]
        if rng.random() < 0.4:
            overrides.append(f"{self._key(rng)}={rng.choice((*YAML_VALUES, *map(str, VALUES)))}")
        config = load_config(rng.choice(self.schemas), path if rng.random() < 0.8 else None, overrides)
        if os.environ.get("FUZZ_SECRET", "no secret") in repr(config):
            raise ValueError("the config holds what was in the environment")

    def _text(self, rng: random.Random) -> str:
        lines = []
        for _ in range(rng.randrange(4)):
            value = rng.choice(YAML_VALUES) if rng.random() < 0.6 else json.dumps(rng.choice(VALUES))
            lines.append(f"{self._key(rng)}: {value}\n")
        text = "".join(lines)
        if rng.random() < 0.1:
            text += rng.choice(
                (LAUGHS, MERGES, "%YAML 9.9\n---\n", "- a\n- b\n", "--- \n--- \n", "\t", "a" * (2 << 20))
            )
        if rng.random() < 0.3:
            text = mutate(rng, text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogateescape")
        return text.encode("utf-8", "replace").decode() if rng.random() < 0.9 else text

    def _key(self, rng: random.Random) -> str:
        sections = ("run", "network", "generator", "loss", "optimizer", "evaluation", "rows", "x")
        names = ("dir", "seed", "base_channels", "channel_multipliers", "num_steps", "lr", "metrics", "precision", "x")
        keys = (rng.choice(sections), rng.choice(names), "num_timesteps", "latent", "data", "autoencoder", "schedule")
        odd = (
            "null",
            "1",
            "[1]",
            "<<",
            "a.b",
            "\\",
            "a[0]",
            "run[",
            "",
            "k" * 3000,
            "${x}",
            "__class__",
            "~",
            "run..x",
        )
        key = rng.choice((*keys, f"{rng.choice(sections)}.{rng.choice(names)}", rng.choice(odd)))
        return key


class Checkpoints:
    """Checkpoints: any value in their descriptions, lying headers of tensors, and pickles by names of weights."""

    def prepare(self, home: Path) -> None:
        """A run of each kind, tiny."""
        torch.manual_seed(0)
        stage_1 = home / "autoencoder"
        numbers = {"latent_channels": 2, "base_channels": 4, "channel_multipliers": [1, 2], "num_groups": 2}
        vae = AutoencoderKL(AutoencoderConfig(**numbers)).eval()
        description = {"config": {"network": to_dict(vae.config)}, "latent_statistics": {}, "step": 1}
        save_checkpoint(stage_1, {AUTOENCODER_WEIGHTS: vae}, {"kind": AUTOENCODER_KIND, **description})
        small = LightDecoderConfig(widths=[4], num_blocks=[1])
        light = build_light_decoder(small, vae)
        description = {"config": {"network": to_dict(small)}, "autoencoder": fingerprint(vae)}
        folder = light_decoder.light_decoder_folder(stage_1)
        save_checkpoint(folder, {light_decoder.WEIGHTS: light}, {"kind": light_decoder.KIND, **description})
        vae.save_diffusers(home / "diffusers")
        self._save_stage_2(home, stage_1, fingerprint(vae))
        self._home = home

    def _save_stage_2(self, home: Path, stage_1: Path, autoencoder: str) -> None:
        unet = UNetConfig(base_channels=4, channel_multipliers=[1], num_res_blocks=1, z_dim=4, embedding_dim=8)
        process = {"num_timesteps": 2, "schedule": "vp", "beta_max": 20.0, "predicts": "x_0", "objective": "denoising"}
        for name, shape, latent in (("latents", (2, 4, 4), True), ("pixels", (3, 8, 8), False)):
            config = {"generator": to_dict(unet), "latent": latent, **process}
            data = {"data_shape": [*shape], "resolution": RESOLUTION, "class_names": ["a", "b"]}
            data |= {"autoencoder": autoencoder if latent else None, "step": 1, "seconds": 1.0}
            checkpoint = home / name / "checkpoints" / "step_000000001"
            save_checkpoint(
                checkpoint, {WEIGHTS[GAN]: build_unet(unet, shape, 2)}, {"kind": GAN, "config": config, **data}
            )
            if latent:
                keep_autoencoder(DataConfig(latent=True, autoencoder=str(stage_1)), home / name, Accelerator(cpu=True))
        numbers = ClassifierConfig(base_channels=4, channel_multipliers=[1], num_res_blocks=1, embedding_dim=8)
        things = {CLASSIFIER_WEIGHTS: build_classifier(numbers, (2, 4, 4), ["a", "b"])}
        description = {"kind": CLASSIFIER_KIND, "config": {"network": to_dict(numbers), **process}}
        description |= {"data_shape": [2, 4, 4], "class_names": ["a", "b"], "autoencoder": autoencoder}
        description |= {"resolution": RESOLUTION}
        save_checkpoint(home / "classifier", things, description)

    def run(self, rng: random.Random, folder: Path) -> None:
        """See `Target`."""
        readers: dict[str, Callable[[Path], object]] = {
            "autoencoder": load_autoencoder,
            "diffusers": load_autoencoder,
            "pixels": lambda run: self._sample(run, rng),
            "latents": lambda run: self._sample(run, rng),
            "classifier": lambda run: load_model(self._home / "latents", classifier=run),
            "light": lambda run: load_model(run, decoder="light"),
            "weights": load_weights,
        }
        name = rng.choice([*readers])
        if name == "weights":
            readers[name](self._weights(rng, folder))
            return
        copy = shutil.copytree(self._home / {"light": "latents"}.get(name, name), folder / "run")
        descriptions = sorted(path for path in copy.rglob("*.json") if path.name in (DESCRIPTION_FILE, "config.json"))
        path = rng.choice(descriptions)
        if rng.random() < 0.7:
            self._change_description(rng, path)
        else:
            self._change_tensors(rng, path.parent)
        if rng.random() < 0.1 and path.name == DESCRIPTION_FILE:
            check_checkpoint(path.parent)
        readers[name](copy)

    def _sample(self, run: Path, rng: random.Random) -> None:
        model = load_model(run)
        if model.diffusion.num_steps <= 8:
            model.decode(model.sample([rng.randrange(9)]))

    def _change_description(self, rng: random.Random, path: Path) -> None:
        document = json.loads(path.read_text())
        document.pop("sha256", None)  # older checkpoints have none
        config = document.get("config", document)
        mutate_json(rng, rng.choice((document, config, config.get("network", config.get("generator", config)))))
        content = dump(document)
        path.write_bytes(mutate(rng, content) if rng.random() < 0.1 else content)

    def _change_tensors(self, rng: random.Random, folder: Path) -> None:
        path = rng.choice(sorted(folder.glob("*.safetensors")))
        path.write_bytes(hostile_tensors(rng, path.read_bytes()))
        if (folder / DESCRIPTION_FILE).exists():
            document = json.loads((folder / DESCRIPTION_FILE).read_text())
            document.pop("sha256")
            record = document["things"][path.stem]
            record |= {"num_bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            (folder / DESCRIPTION_FILE).write_bytes(dump(document))

    def _weights(self, rng: random.Random, folder: Path) -> Path:
        path = folder / f"weights{rng.choice(('.safetensors', '.pth', '.pt'))}"
        contents: tuple[object, ...] = ({"a": torch.ones(2)}, {"a": Payload()}, Payload(), [torch.ones(1)], {1: 2})
        if rng.random() < 0.4:
            path.write_bytes(
                hostile_tensors(rng, (self._home / "autoencoder" / f"{AUTOENCODER_WEIGHTS}.safetensors").read_bytes())
            )
        else:
            buffer = io.BytesIO()
            torch.save(rng.choice(contents), buffer, _use_new_zipfile_serialization=rng.random() < 0.7)
            path.write_bytes(mutate(rng, buffer.getvalue()) if rng.random() < 0.5 else buffer.getvalue())
        return path


def hostile_tensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with something else in its header, whose length is right, or with damaged bytes."""
    if rng.random() < 0.3:
        return mutate(rng, data)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    mutate_json(rng, header)
    if rng.random() < 0.3:
        first = next(iter(header))
        header[first] = {
            "dtype": rng.choice(("F32", "F64", "BOOL", "I8", "F8_E4M3", "C64")),
            "shape": [1],
            "data_offsets": [0, 4],
        }
    text = dump(header)
    return struct.pack("<Q", rng.choice((len(text), len(text), len(text), 2**40))) + text + data[8 + length :]


TARGETS: dict[str, type[Target]] = {
    "tars": Tars,
    "jpeg": Images,
    "npy": Arrays,
    "captions": Captions,
    "manifests": Manifests,
    "configs": Configs,
    "checkpoints": Checkpoints,
}
