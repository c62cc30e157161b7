"""The page to play with: what its buttons show, what they refuse, and the page itself in a browser."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldgan import demo
from ldgan.engine.checkpoint import save_checkpoint
from ldgan.engine.cli import UserError
from ldgan.engine.config import to_dict
from ldgan.inference.trained_model import DDPM, GAN, NETWORK, WEIGHTS, build_unet
from ldgan.models.unet import UNetConfig
from ldgan.pipeline import LatentDDGAN

gr = pytest.importorskip("gradio", reason="the page is served by gradio, extra `demo`")
from gradio.components.image_editor import AcceptBlobs, BlobData, EditorData, EditorDataBlobs  # noqa: E402
from gradio.data_classes import FileData  # noqa: E402

from ldgan.reports import demo_page  # noqa: E402
from ldgan.reports.demo_page import ANY_CLASS, Studio, build_page, make_editor, serve  # noqa: E402

CHROMIUM = Path("/usr/bin/chromium")
SIDE, CLASSES = 8, ["cat", "dog", "<emu>"]
NO_WISHES = (ANY_CLASS, "", 1.0)


def save_run(run: Path, kind: str = GAN, class_names: list[str] | None = None, **config: Any) -> Path:
    """A run of stage 2 on pixels, T = 4; the model is random."""
    network = UNetConfig(base_channels=8, channel_multipliers=[1], num_res_blocks=1, z_dim=0, embedding_dim=8)
    if kind == GAN:
        network.z_dim = 3
    unet = build_unet(network, (3, SIDE, SIDE), len(class_names or []))
    random = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.3, generator=random)
    config = {NETWORK[kind]: to_dict(network), "num_timesteps": 4, "latent": False, **config}
    description = {"kind": kind, "config": config, "data_shape": [3, SIDE, SIDE], "resolution": SIDE}
    description |= {"class_names": class_names, "autoencoder": None}
    save_checkpoint(run / "checkpoints" / "step_000000001", {WEIGHTS[kind]: unet}, description)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with classes, one without, and a DDPM."""
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "classes", class_names=CLASSES, label_dropout=0.1)
    save_run(folder / "plain")
    save_run(folder / "ddpm", DDPM, predicts="noise", variance="beta", schedule="linear")
    return folder


@pytest.fixture(scope="module")
def studio(runs: Path) -> Studio:
    return Studio(LatentDDGAN.from_pretrained(runs / "classes"), max_images=4, can_guide=True)


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def drawn(value: dict[str, Any], painted: np.ndarray | None = None, colour: tuple[int, int, int] = (255, 0, 0)) -> Any:
    """What the editor gives after a browser showed ``value`` and somebody painted where ``painted`` is True."""
    background = value["background"].convert("RGBA")
    opacity = np.zeros((SIDE, SIDE), np.uint8) if painted is None else painted.astype(np.uint8) * 255
    layer = Image.new("RGBA", background.size, (*colour, 255))
    layer.putalpha(Image.fromarray(opacity).resize(background.size, Image.Resampling.NEAREST))
    editor = make_editor(gr.Brush())
    parts = EditorDataBlobs(
        background=png(background), layers=[png(layer)], composite=png(Image.alpha_composite(background, layer))
    )
    editor.blob_storage["x"] = parts
    return editor.preprocess(EditorData(id="x"))


@pytest.fixture
def hole() -> np.ndarray:
    """The right half."""
    return np.arange(SIDE)[None].repeat(SIDE, axis=0) >= SIDE // 2


def test_samples_are_those_of_the_pipeline(studio: Studio) -> None:
    shown = studio.sample(5, 3, 1, "", 2.0)
    expected = studio.pipeline.sample(3, seed=5, labels=[1], guidance=2.0, output="numpy")
    np.testing.assert_array_equal(pixels(image for image, _ in shown), expected)
    assert [caption for _, caption in shown] == ["seed 5", "seed 6", "seed 7"]
    other = studio.sample(5, 3, *NO_WISHES)
    np.testing.assert_array_equal(
        pixels(image for image, _ in other), studio.pipeline.sample(3, seed=5, output="numpy")
    )


def test_a_ddpm_is_sampled_as_the_command_says(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["demo.py", "--checkpoint", str(runs / "ddpm"), "--sampler", "ddim", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    studio = demo.open_studio(demo.parse_flags())
    assert (studio.can_guide, studio.num_steps, studio.max_images) == (False, 2, 16)
    ((image, _),) = studio.sample(5, 1, *NO_WISHES)
    (expected,) = studio.pipeline.sample(1, seed=5, sampler="ddim", steps=2, output="numpy")
    np.testing.assert_array_equal(np.asarray(image), expected)
    assert [caption for _, caption in studio.estimates(5, *NO_WISHES)] == ["t = 2", "t = 1"]
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], "9"])
    with pytest.raises(UserError, match="has 4 steps, and 9 are asked"):
        demo.open_studio(demo.parse_flags())
    monkeypatch.setattr(sys, "argv", [*arguments, "--device", "abacus"])
    with pytest.raises(UserError, match=r"^device: abacus cannot be used"):
        demo.open_studio(demo.parse_flags())


def test_estimates_end_in_the_sample(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = studio.estimates(5, *NO_WISHES)
    assert [caption for _, caption in shown] == ["t = 4", "t = 3", "t = 2", "t = 1"]
    images = pixels(image for image, _ in shown).astype(int)
    np.testing.assert_array_equal(images[-1], studio.pipeline.sample(1, seed=5, output="numpy")[0])
    assert all(np.abs(image - images[-1]).max() > 1 for image in images[:-1])
    monkeypatch.setattr(demo_page, "MAX_SHOWN_STEPS", 2)
    few = studio.estimates(5, *NO_WISHES)
    assert [caption for _, caption in few] == ["t = 4", "t = 1"]
    np.testing.assert_array_equal(pixels(image for image, _ in few), images[[0, -1]])


def test_inpainting_leaves_alone_what_is_not_painted_over(studio: Studio, hole: np.ndarray) -> None:
    drawing = drawn(studio.take(3, *NO_WISHES), hole)
    shown = pixels(image for image, _ in studio.inpaint(drawing, 2, 9, 4, *NO_WISHES))
    (before,) = studio.pipeline.sample(1, seed=3, output="numpy")
    assert (shown[:, ~hole] == before[~hole]).all()
    assert (shown[:, hole] != before[hole]).mean() > 0.5
    assert len(np.unique(shown, axis=0)) == 4
    expected = studio.pipeline.inpaint(before, hole, num_resamples=2, num_images=4, seed=9, output="numpy")
    np.testing.assert_array_equal(shown, expected)


def test_a_painting_is_edited_with_its_paint(studio: Studio, hole: np.ndarray) -> None:
    drawing = drawn(studio.blank("white"), hole, colour=(10, 20, 30))
    painting = np.where(hole[:, :, None], (10, 20, 30), 255).astype(np.uint8)
    shown = studio.stroke(drawing, 2, 9, 2, *NO_WISHES)
    expected = studio.pipeline.edit(painting, step=2, num_images=2, seed=9, output="numpy")
    np.testing.assert_array_equal(pixels(image for image, _ in shown), expected)


def test_the_ends_of_a_strip_are_the_samples_of_both_seeds(studio: Studio) -> None:
    shown = studio.interpolate(3, 8, 4, "both", 1, "", 1.0)
    assert [caption for _, caption in shown] == ["0%", "33%", "67%", "100%"]
    ends = [studio.pipeline.sample(1, seed=seed, labels=[1], output="numpy")[0] for seed in (3, 8)]
    difference = pixels([shown[0][0], shown[-1][0]]).astype(int) - np.stack(ends)
    assert np.abs(difference).max() <= 1  # another batch size


def test_what_is_missing_is_said(studio: Studio) -> None:
    with pytest.raises(UserError, match="there is no picture yet"):
        studio.stroke(None, 2, 0, 1, *NO_WISHES)
    with pytest.raises(UserError, match="nothing is painted over"):
        studio.inpaint(drawn(studio.blank("black")), 2, 0, 1, *NO_WISHES)
    with pytest.raises(UserError, match="there is no seed"):
        studio.sample(None, 1, *NO_WISHES)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="trained without captions"):
        studio.sample(0, 1, ANY_CLASS, "a heart", 1.0)
    with pytest.raises(UserError, match="has 301 characters; give at most 300"):
        studio.sample(0, 1, ANY_CLASS, "x" * 301, 1.0)


def test_errors_are_one_line_without_markup(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(name: str) -> None:
        raise UserError(f"no class {name}")

    def fail() -> None:
        raise ZeroDivisionError("secret")

    with pytest.raises(gr.Error) as refused:
        demo_page._answering(refuse)("<b>")
    assert (refused.value.message, refused.value.print_exception) == ("no class &lt;b&gt;", False)
    with pytest.raises(gr.Error, match=r"the terminal of ldgan/demo\.py says what") as failed:
        demo_page._answering(fail)()
    assert "secret" not in failed.value.message
    assert failed.value.print_exception


def test_uploads_are_bounded(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(content: bytes) -> Any:
        (tmp_path / "upload.png").write_bytes(content)
        return make_editor(gr.Brush()).preprocess(EditorData(background=FileData(path=str(tmp_path / "upload.png"))))

    picture = Image.new("RGB", (20, 10), "red")
    assert read(png(picture))["background"].size == (20, 10)
    for damaged in (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", png(picture)[:45]):
        with pytest.raises(gr.Error, match="the picture cannot be read"):
            read(damaged)
    monkeypatch.setattr(demo_page, "MAX_UPLOAD_PIXELS", 199)
    with pytest.raises(gr.Error, match="20 x 10 pixels; at most 199 are decoded"):
        read(png(picture))
    with pytest.raises(gr.Error, match="at most 199"):
        drawn(studio.blank("white"))  # the layer of paint too


def test_what_browsers_send_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_page, "MAX_WAITING_DRAWINGS", 3)
    editor = make_editor(gr.Brush())

    def send(number: int, index: int) -> None:
        data = BlobData(type="layer", index=index, file=b"", id=str(number))
        editor.accept_blobs(AcceptBlobs(data=data, files=[("blob", b"x")]))

    for number in range(5):
        send(number, 0)
    send(2, 0)
    assert list(editor.blob_storage) == ["2", "3", "4"]
    with pytest.raises(gr.Error, match="one layer"):
        send(5, 1_000_000_000)


def visible(page: Any) -> set[str]:
    """Labels of the controls that are shown."""
    blocks = page.blocks.values()
    return {block.label for block in blocks if getattr(block, "label", None) and block.visible and block.is_rendered}


def test_only_what_the_model_can_do_is_shown(runs: Path, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    with_classes = visible(build_page(studio, "x", 1))
    assert {"Class", "Guidance", "Seed", "Images"} <= with_classes
    assert "Prompt" not in with_classes
    without = visible(build_page(Studio(LatentDDGAN.from_pretrained(runs / "plain"), 4, can_guide=False), "x", 1))
    assert with_classes - without == {"Class", "Guidance"}
    monkeypatch.setattr(LatentDDGAN, "has_text", True)
    assert visible(build_page(studio, "x", 1)) - with_classes == {"Prompt"}


def test_requests_are_bounded(studio: Studio) -> None:
    page = build_page(studio, "x", max_waiting=3)
    bounds = {block.label: block.maximum for block in page.blocks.values() if isinstance(block, gr.Slider)}
    assert bounds == {"Images": 4, "Frames": 4, "Guidance": 8, "Resamples": 20, "Step t": 4}
    assert page._queue.max_size == 3
    limits = {(function.concurrency_id, function.concurrency_limit) for function in page.fns.values() if function.queue}
    assert limits == {("model", 1)}


def test_gradio_writes_nothing_beside_the_source() -> None:
    assert not Path(demo_page.__file__).with_suffix(".pyi").exists()


def test_without_gradio_the_extra_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "ldgan.reports.demo_page")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--checkpoint", str(runs / "plain")])
    with pytest.raises(UserError, match=r"pip install 'ldgan\[demo\]'"):
        demo.main()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_the_command_serves_here_alone_until_ctrl_c(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    answers = []

    def interrupt(seconds: float) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as response:
            answers.append(json.load(response))
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["demo.py", "--checkpoint", str(runs / "plain"), "--port", str(port)])
    monkeypatch.setattr(demo, "sleep", interrupt)
    demo.main()
    (config,) = answers
    assert config["analytics_enabled"] is False
    assert capsys.readouterr().out == f"{runs / 'plain'} at http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        pass
    assert not Path(os.environ["GRADIO_TEMP_DIR"]).exists()


def test_a_port_in_use_is_one_line(studio: Studio) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"^--host 127\.0\.0\.1 --port \d+: in use"):
            serve(build_page(studio, "x", 1), "127.0.0.1", taken.getsockname()[1])


class Served(NamedTuple):
    """A page that is served, and what stands behind it."""

    address: str
    studio: Studio


@pytest.fixture
def served(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The page of a tiny model or, for a picture to show, of the run with classes that LDGAN_DEMO_RUN names."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    if run := os.environ.get("LDGAN_DEMO_RUN"):
        studio = Studio(LatentDDGAN.from_pretrained(run), max_images=16, can_guide=True)
    page = build_page(studio, "runs/mnist/gan", 4)
    yield Served(serve(page, "127.0.0.1", free_port()), studio)
    page.close(verbose=False)


@pytest.fixture
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}")
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


def seen(tab: Any, number: int) -> np.ndarray:
    """The first images in the gallery of a tab, (number, H, W, 3), as the browser got them."""
    images = tab.locator(".grid-wrap:visible img")
    images.nth(number - 1).wait_for()
    sources = images.evaluate_all("images => images.map(image => image.src)")[:number]
    return pixels(Image.open(io.BytesIO(tab.request.get(source).body())) for source in sources)


def paint_right_half(tab: Any) -> None:
    """Draw a vertical line through the middle of the right half of the picture."""
    box = tab.locator("canvas:visible").first.bounding_box()
    x, y = box["x"] + box["width"] / 2 + 100, box["y"] + box["height"] / 2
    tab.mouse.move(x, y - 80)
    tab.mouse.down()
    tab.mouse.move(x, y + 80, steps=3)
    tab.mouse.up()


def test_in_a_browser(browser: Any, served: Served) -> None:
    address, studio = served
    tab = browser.new_page(viewport={"width": 1280, "height": 880})
    tab.set_default_timeout(120_000)  # ms; a busy machine
    requests: list[str] = []
    errors: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(address)

    tab.get_by_label("Seed", exact=True).fill("6")
    tab.get_by_role("button", name="Sample", exact=True).click()
    samples = seen(tab, 4)
    np.testing.assert_array_equal(samples, pixels(image for image, _ in studio.sample(6, 4, *NO_WISHES)))

    tab.get_by_role("tab", name="Inpaint").click()
    inpaint = tab.get_by_role("button", name="Inpaint", exact=True)
    inpaint.click()
    tab.get_by_text("there is no picture yet").wait_for()
    with tab.expect_response(lambda response: "/file=" in response.url):
        tab.get_by_role("button", name="Take this seed's image").click()
    tab.wait_for_timeout(500)  # until the editor has drawn it
    paint_right_half(tab)
    inpaint.click()
    changed = (seen(tab, 4) != samples[0]).any(axis=(0, 3))
    half = studio.pipeline.resolution // 2
    assert not changed[:, :half].any()
    assert changed[half, half:].any()

    assert errors == []
    hosts = {urllib.parse.urlsplit(url).netloc for url in requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {urllib.parse.urlsplit(address).netloc}
    if "LDGAN_SCREENSHOT" in os.environ:
        tab.get_by_test_id("toast-body").wait_for(state="detached")
        tab.screenshot(path=os.environ["LDGAN_SCREENSHOT"])
