"""The page of ldgan/demo.py: what its buttons do, and how it is laid out.

Gradio is told to ask nobody else for anything: no analytics, no fonts or scripts from other hosts. What a visitor sends
is bounded in size and number before it is looked at.
"""

from __future__ import annotations

import functools
import html
import io
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_prep.images import read_picture, resize_and_crop
from ldgan.engine.cli import UserError
from ldgan.inference.editing import DEFAULT_RESAMPLES, Along
from ldgan.pipeline import LatentDDGAN

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: it asks for its newest version otherwise
import gradio as gr
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs
from gradio.data_classes import FileData

MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS = 20 * 2**20, 25_000_000
MAX_WAITING_DRAWINGS = 64  # pictures that browsers have sent and no button has used yet
MAX_PROMPT_LENGTH = 300  # characters
MAX_SEED = 2**31 - 1
MAX_GUIDANCE, MAX_RESAMPLES, MAX_SHOWN_STEPS = 8, 20, 10
ANY_CLASS = -1
CANVAS_SIDE = 512  # pixels; smaller images are enlarged by a whole factor to be painted on
MASK_COLOUR = "rgba(255, 0, 102, 0.6)"
PAINT_COLOURS: list[str | tuple[str, float]] = [
    *("#e53935", "#ffffff", "#000000", "#fb8c00", "#fdd835", "#43a047", "#1e88e5", "#8e24aa")
]
PIXELATED_BELOW = 128  # pixels; smaller images are shown with square pixels instead of smoothed

CSS = """
.gradio-container { max-width: 1280px !important; }
.pixelated img { image-rendering: pixelated; }
.grid-wrap { min-height: 0 !important; }
"""

Shown = list[tuple[Image.Image, str]]
"""Pictures of a gallery and their captions."""


class Drawing(TypedDict):
    """What an editor shows and gives: a picture, RGB, the opacity of paint on it, "L", and both together, RGB."""

    background: Image.Image | None
    layers: list[Image.Image]
    composite: Image.Image | None


@dataclass(frozen=True)
class Studio:
    """What the buttons of the page do.

    ``seed`` is that of the first image, the next ones have the seeds after it. ``label`` is a class or `ANY_CLASS`,
    ``prompt`` may be empty. Errors are `UserError`.
    """

    pipeline: LatentDDGAN
    max_images: int
    can_guide: bool  # whether the model takes classifier-free guidance
    steps: int | None = None  # of the sampler, as `LatentDDGAN.sample` takes them
    sampler: Literal["ancestral", "ddim"] = "ancestral"

    @property
    def num_steps(self) -> int:
        """Steps of the sampler."""
        return self.steps or self.pipeline.num_steps

    def sample(self, seed: int, num_images: int, label: int, prompt: str, guidance: float) -> Shown:
        """New images."""
        images = self.pipeline.sample(num_images, **self._wishes(seed, label, prompt, guidance))
        return _with_seeds(images, seed)

    def estimates(self, seed: int, label: int, prompt: str, guidance: float) -> Shown:
        """How one image comes about: the estimates of x_0 from t = T to t = 1; of very many steps some, evenly."""
        shown = np.linspace(self.num_steps, 1, min(self.num_steps, MAX_SHOWN_STEPS)).round()
        estimates: dict[int, Tensor] = {}

        def keep(t: int, x_0: Tensor, x_previous: Tensor) -> None:
            if t in shown:
                estimates[t] = x_0

        self.pipeline.sample(1, callback=keep, **self._wishes(seed, label, prompt, guidance))
        images = self.pipeline.decode(torch.cat(list(estimates.values())))
        return [(image, f"t = {t}") for t, image in zip(estimates, images)]

    def take(self, seed: int, label: int, prompt: str, guidance: float) -> Drawing:
        """The image of a seed, to be painted on."""
        (image,) = self.pipeline.sample(1, **self._wishes(seed, label, prompt, guidance))
        return self._to_paint_on(image)

    def blank(self, colour: str) -> Drawing:
        """An empty canvas."""
        return self._to_paint_on(Image.new("RGB", (self.pipeline.resolution, self.pipeline.resolution), colour))

    def inpaint(
        self,
        drawing: Drawing | None,
        num_resamples: int,
        seed: int,
        num_images: int,
        label: int,
        prompt: str,
        guidance: float,
    ) -> Shown:
        """The picture with what is painted over made anew; all other pixels as they are."""
        picture, mask = self._picture(drawing, "background"), self._mask(drawing)
        images = self.pipeline.inpaint(
            picture,
            mask,
            num_resamples=num_resamples,
            num_images=num_images,
            **self._wishes(seed, label, prompt, guidance),
        )
        return _with_seeds(images, seed)

    def stroke(
        self,
        drawing: Drawing | None,
        step: int,
        seed: int,
        num_images: int,
        label: int,
        prompt: str,
        guidance: float,
    ) -> Shown:
        """Images after a painting: it is diffused to ``step`` and denoised from there."""
        picture = self._picture(drawing, "composite")
        wishes = self._wishes(seed, label, prompt, guidance)
        images = self.pipeline.edit(picture, step=step, num_images=num_images, **wishes)
        return _with_seeds(images, seed)

    def interpolate(
        self, seed: int, seed_b: int, num_frames: int, along: Along, label: int, prompt: str, guidance: float
    ) -> Shown:
        """A strip of frames from the image of one seed to that of another."""
        wishes = self._wishes(seed, label, prompt, guidance)
        frames = self.pipeline.interpolate(wishes.pop("seed"), _given(seed_b), num_frames, along=along, **wishes)
        return [(frame, f"{number / (num_frames - 1):.0%}") for number, frame in enumerate(frames)]

    def _wishes(self, seed: int, label: int, prompt: str, guidance: float) -> dict[str, Any]:
        """The arguments that all of the pipeline's functions take."""
        if len(prompt) > MAX_PROMPT_LENGTH:
            raise UserError(f"the prompt has {len(prompt):,} characters; give at most {MAX_PROMPT_LENGTH}")
        return {
            "seed": _given(seed),
            "labels": None if label == ANY_CLASS else [label],
            "prompts": [prompt] if prompt.strip() else None,
            "guidance": guidance,
            "steps": self.steps,
            "sampler": self.sampler,
        }

    def _picture(self, drawing: Drawing | None, part: Literal["background", "composite"]) -> Image.Image:
        """The picture at the model's resolution, as it was before it was painted on, or with the paint."""
        picture = drawing and drawing[part]
        if picture is None:
            raise UserError("there is no picture yet; upload one or take a sample")
        # Averages of whole areas: an enlarged sample comes back as it was.
        return resize_and_crop(picture, self.pipeline.resolution, "box")

    def _mask(self, drawing: Drawing | None) -> Image.Image:
        """Where there is paint, at the model's resolution: white."""
        resolution = self.pipeline.resolution
        layers = [resize_and_crop(layer, resolution, "box") for layer in drawing["layers"]] if drawing else []
        painted = np.any([np.asarray(layer) > 0 for layer in layers], axis=0)
        if not painted.any():
            raise UserError("nothing is painted over; brush over what is to be made anew")
        return Image.fromarray(painted.astype(np.uint8) * 255)

    def _to_paint_on(self, image: Image.Image) -> Drawing:
        side = image.width * max(1, CANVAS_SIDE // image.width)
        return {"background": image.resize((side, side), Image.Resampling.NEAREST), "layers": [], "composite": None}


def _given(seed: int | None) -> int:
    """The seed, which is None where the field is empty."""
    if seed is None:
        raise UserError("there is no seed; give a whole number")
    return seed


def _with_seeds(images: Sequence[Image.Image], first_seed: int) -> Shown:
    return [(image, f"seed {first_seed + number}") for number, image in enumerate(images)]


def make_editor(brush: gr.Brush) -> gr.ImageEditor:
    """Gradio's image editor; what browsers send is decoded by `read_picture`, and bounded. It gives a `Drawing`."""
    editor = gr.ImageEditor(
        show_label=False,
        type="pil",
        format="png",  # without loss, so that known pixels stay what they are
        sources=("upload", "clipboard"),
        transforms=(),
        layers=False,
        brush=brush,
        canvas_size=(CANVAS_SIDE, CANVAS_SIDE),
        height=CANVAS_SIDE + 40,
        buttons=[],
    )
    accept = editor.accept_blobs

    @server
    def accept_few(data: AcceptBlobs) -> None:
        """Keep a part of a drawing until a button uses it, of at most `MAX_WAITING_DRAWINGS`."""
        index, waiting = data.data["index"], editor.blob_storage
        if index and index != "null" and int(index) > 0:
            raise gr.Error("a drawing has one layer here", print_exception=False)
        while data.data["id"] not in waiting and len(waiting) >= MAX_WAITING_DRAWINGS:
            waiting.pop(next(iter(waiting)))
        accept(data)

    # Not by a subclass: Gradio writes a .pyi file beside the source of each.
    vars(editor).update(convert_and_format_image=_decode, accept_blobs=accept_few)
    return editor


def _decode(file: FileData | bytes | None, flatten_on_white: bool = False) -> Image.Image | None:
    """Decode a picture or, with ``flatten_on_white`` False, a layer; Gradio calls it for each part of a drawing."""
    if file is None:
        return None
    source = Path(file.path) if isinstance(file, FileData) else io.BytesIO(file)
    try:
        return read_picture(source, MAX_UPLOAD_PIXELS).image if flatten_on_white else _opacity(source)
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise gr.Error(html.escape(f"the picture cannot be read: {error}"), print_exception=False) from None


def _opacity(source: Path | io.BytesIO) -> Image.Image:
    """The opacity, "L", of a layer of paint, as browsers draw it."""
    with Image.open(source, formats=("PNG", "WEBP")) as layer:
        if layer.width * layer.height > MAX_UPLOAD_PIXELS:
            raise ValueError(f"{layer.width} x {layer.height} pixels; at most {MAX_UPLOAD_PIXELS:,} are decoded")
        return layer.convert("RGBA").getchannel("A")


class Wishes(NamedTuple):
    """The components that all tabs share."""

    seed: gr.Number
    num_images: gr.Slider
    label: gr.Dropdown
    prompt: gr.Textbox
    guidance: gr.Slider

    @property
    def of_one(self) -> list[gr.Component]:
        """What the functions of a single image take."""
        return [self.seed, *self[2:]]


def build_page(studio: Studio, name: str, max_waiting: int) -> gr.Blocks:
    """Lay the page out for a model called ``name``; at most ``max_waiting`` requests wait, one is worked on."""
    # Files that are shown or sent are removed after an hour.
    with gr.Blocks(title=f"ldgan: {name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# ldgan\n{_facts(studio, name)}")
        with gr.Row():
            with gr.Column(scale=1, min_width=240):
                wishes = _shared_controls(studio)
            with gr.Column(scale=4), gr.Tabs():
                _sample_tab(studio, wishes)
                _steps_tab(studio, wishes)
                _inpaint_tab(studio, wishes)
                _stroke_tab(studio, wishes)
                _interpolate_tab(studio, wishes)
    return page.queue(max_size=max_waiting, api_open=False)


def serve(page: gr.Blocks, host: str, port: int) -> str:
    """Serve the page in the background until ``page.close()``; its address.

    Raises:
        UserError: the port is in use, or cannot be had, or does not answer.
    """
    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # of the visitor's own machine
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=MAX_UPLOAD_BYTES,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts[0], font_mono=fonts[1]),
            css=CSS,
        )
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: in use, or not to be had; choose others") from error
    except ValueError as error:  # Gradio has asked for the page, in vain
        raise UserError(f"{host}:{port} does not answer; if there is a proxy, let no_proxy name {host}") from error
    return address


def _facts(studio: Studio, name: str) -> str:
    pipeline, num_steps, side = studio.pipeline, studio.num_steps, studio.pipeline.resolution
    facts = [name, f"{num_steps:,} step{'s' if num_steps > 1 else ''}", f"{side} × {side} pixels"]
    if pipeline.class_names:
        facts.append(f"{len(pipeline.class_names):,} classes")
    if pipeline.has_text:
        facts.append("takes prompts")
    return " · ".join(html.escape(fact) for fact in facts)


def _shared_controls(studio: Studio) -> Wishes:
    """The controls beside the tabs; what the model cannot do is not shown."""
    pipeline = studio.pipeline
    prompt = gr.Textbox(label="Prompt", max_length=MAX_PROMPT_LENGTH, value="", visible=pipeline.has_text)
    label = gr.Dropdown(
        [("any", ANY_CLASS), *((name, number) for number, name in enumerate(pipeline.class_names))],
        value=ANY_CLASS,
        label="Class",
        visible=bool(pipeline.class_names),
    )
    guidance = gr.Slider(
        0, MAX_GUIDANCE, value=1, step=0.5, label="Guidance", info="1: the plain model", visible=studio.can_guide
    )
    num_images = _slider(1, studio.max_images, min(8, studio.max_images), "Images")
    seed = _seed("Seed")
    another = gr.Button("Another seed", size="sm")
    another.click(lambda: random.randint(0, MAX_SEED), None, seed, queue=False, api_visibility="private")
    return Wishes(seed, num_images, label, prompt, guidance)


def _sample_tab(studio: Studio, wishes: Wishes) -> None:
    with gr.Tab("Sample"):
        button = gr.Button("Sample", variant="primary")
        gallery = _gallery(studio, columns=4)
    _on_click(button, studio.sample, wishes, gallery)


def _steps_tab(studio: Studio, wishes: Wishes) -> None:
    with gr.Tab("Step by step"):
        gr.Markdown("What the model takes the image of this seed to be, at each of its steps.")
        button = gr.Button("Show the steps", variant="primary")
        gallery = _gallery(studio, columns=min(studio.num_steps, MAX_SHOWN_STEPS // 2))
    _on_click(button, studio.estimates, wishes.of_one, gallery)


def _inpaint_tab(studio: Studio, wishes: Wishes) -> None:
    with gr.Tab("Inpaint"), gr.Row():
        with gr.Column():
            gr.Markdown(
                "Take a sample or upload a picture, of which the central square is used. Brush over what is to be made"
                " anew."
            )
            editor = make_editor(gr.Brush(default_size=48, colors=[MASK_COLOUR], color_mode="fixed"))
            take = gr.Button("Take this seed's image", size="sm")
        with gr.Column():
            num_resamples = _slider(
                1, MAX_RESAMPLES, DEFAULT_RESAMPLES, "Resamples", "more fit the seam better and take longer"
            )
            button = gr.Button("Inpaint", variant="primary")
            gallery = _gallery(studio, columns=3)
    _on_click(take, studio.take, wishes.of_one, editor)
    _on_click(button, studio.inpaint, [editor, num_resamples, *wishes], gallery)


def _stroke_tab(studio: Studio, wishes: Wishes) -> None:
    num_steps = studio.num_steps
    with gr.Tab("Stroke"), gr.Row():
        with gr.Column():
            gr.Markdown("Paint what you want roughly, or upload a picture to be changed.")
            editor = make_editor(gr.Brush(default_size=24, colors=PAINT_COLOURS))
            with gr.Row():
                white, black, take = (
                    gr.Button(name, size="sm", min_width=120)
                    for name in ("White canvas", "Black canvas", "This seed's image")
                )
        with gr.Column():
            step = _slider(1, num_steps, (num_steps + 1) // 2, "Step t", "from 1, close to the painting, to T, far off")
            button = gr.Button("Make images", variant="primary")
            gallery = _gallery(studio, columns=3)
    _on_click(white, functools.partial(studio.blank, "white"), [], editor)
    _on_click(black, functools.partial(studio.blank, "black"), [], editor)
    _on_click(take, studio.take, wishes.of_one, editor)
    _on_click(button, studio.stroke, [editor, step, *wishes], gallery)


def _interpolate_tab(studio: Studio, wishes: Wishes) -> None:
    with gr.Tab("Interpolate"):
        with gr.Row():
            seed_b = _seed("Second seed", value=1)
            most = max(2, studio.max_images)
            num_frames = _slider(2, most, min(8, most), "Frames")
            along = gr.Radio(
                [("both", "both"), ("z alone", "z"), ("x_T alone", "x_T")],
                value="both",
                label="Noise that changes",
                visible=studio.pipeline.model.network.z_dim > 0,
            )
        button = gr.Button("Interpolate", variant="primary")
        gallery = _gallery(studio, columns=8)
    _on_click(button, studio.interpolate, [wishes.seed, seed_b, num_frames, along, *wishes[2:]], gallery)


def _seed(label: str, value: int = 0) -> gr.Number:
    return gr.Number(value, precision=0, minimum=0, maximum=MAX_SEED, label=label)


def _slider(lowest: int, highest: int, value: int, label: str, info: str | None = None) -> gr.Slider:
    return gr.Slider(lowest, highest, value=value, step=1, precision=0, label=label, info=info)


def _gallery(studio: Studio, columns: int) -> gr.Gallery:
    small = studio.pipeline.resolution < PIXELATED_BELOW
    return gr.Gallery(
        show_label=False,
        columns=columns,
        fit_columns=False,
        object_fit="contain",
        height="auto",
        format="png",  # the images as they are
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes=["pixelated"] if small else [],
    )


def _on_click(
    button: gr.Button, function: Callable[..., Any], inputs: Sequence[gr.Component], output: gr.Component
) -> None:
    """Let a button work with the model; over all buttons and visitors one at a time does."""
    button.click(
        _answering(function),
        list(inputs),
        output,
        concurrency_limit=1,
        concurrency_id="model",
        api_visibility="private",
        show_progress_on=output,
    )


def _answering(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; the page shows its errors, in one line."""

    @functools.wraps(function)
    def answer(*inputs: Any) -> Any:
        try:
            return function(*inputs)
        except UserError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None  # the page takes it for HTML
        except Exception as error:
            raise gr.Error("something went wrong here; the terminal of ldgan/demo.py says what") from error

    return answer
