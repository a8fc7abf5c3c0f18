"""A page on this machine: reconstruct a picture, steer it along a concept, interpolate between two."""

from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from socket import gethostname
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from featinv_pl.errors import UserError
from featinv_pl.explore.concepts import Concepts
from featinv_pl.explore.exploration import classify, reconstruct_maps, refuse_other_backbone, tile
from featinv_pl.explore.pairs import Mode, interpolate
from featinv_pl.explore.steering import steer
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.pages.page import Tile, open_picture

try:
    import gradio as gr
    from starlette.datastructures import Headers
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    raise UserError(
        "app: the page needs gradio, which is not installed. Install it with: pip install 'featinv-pl[app]'."
    ) from error

LARGEST = "50mb"  # of a picture; how many pixels it may have is checked when it is opened
KEPT_S = 3600  # for which uploads and reconstructions stay; nothing stays when the server ends


class OwnPages:
    """Answers only requests of pages that this server has served, under an address or name of this machine.

    Any page in a browser can send requests to this machine, also under a name that its owner lets point here (DNS
    rebinding). `host` is the address that the server listens at.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.names = app, {host.lower(), "localhost", gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse a request."""
        answer = self.app
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if not self._is_own(host) or (origin is not None and origin.partition("://")[2] != host):
                answer = PlainTextResponse("This page is for this machine's own address.", 403)
        await answer(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        name = host
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return bool(ip_address(name))  # an address, which no name server chooses
        except ValueError:  # a name, or an unmatched bracket
            return name in self.names


def serve(pipeline: FeatInvPipeline, concepts: Concepts | None, host: str, port: int) -> None:
    """Serve the page until the process is interrupted."""
    page = build(pipeline, concepts)
    print(f"Open http://{host}:{port}. Ctrl+C ends it.")
    # Fonts of the system: gradio's own theme would fetch its from the network.
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    own: Any = {"middleware": [Middleware(OwnPages, host=host)]}
    look: Any = {"theme": theme, "footer_links": [], "quiet": True, "ssr_mode": False, "share": False}
    try:
        page.launch(server_name=host, server_port=port, max_file_size=LARGEST, app_kwargs=own, **look)
    except OSError as error:
        raise UserError(f"`port`: cannot listen at {host}:{port} ({error}). Give another `port` or `host`.") from error


def build(pipeline: FeatInvPipeline, concepts: Concepts | None) -> Any:
    """The page, as gradio's `Blocks`; see `serve`."""
    if concepts is not None:
        refuse_other_backbone(concepts.origin, pipeline, "`concepts`")
    with gr.Blocks(title="featinv-pl", analytics_enabled=False, delete_cache=(60, KEPT_S)) as page:
        with gr.Tab("Reconstruct"):
            samples, seed = gr.Slider(1, 16, 4, step=1, label="Samples"), gr.Number(0, precision=0, label="Seed")
            _form("Reconstruct", partial(_reconstruct, pipeline), ["Picture"], [samples, seed])
        if concepts is not None:
            with gr.Tab("Steer"):
                concept = gr.Dropdown(concepts.names, value=concepts.names[0], label="Concept")
                strength = gr.Slider(-3, 3, 1, step=0.1, label="Strength")
                _form("Steer", partial(_steer, pipeline, concepts), ["Picture"], [concept, strength])
        with gr.Tab("Interpolate"):
            steps = gr.Slider(2, 21, 7, step=1, label="Steps")
            mode = gr.Radio(["linear", "slerp"], value="linear", label="Mode")
            _form("Interpolate", partial(_interpolate, pipeline), ["First picture", "Second picture"], [steps, mode])
    return page


def _form(label: str, compute: Callable[..., Sequence[Tile]], pictures: list[str], inputs: list[Any]) -> None:
    """Fields for pictures, a button, and the gallery that it fills with what `compute` makes of pictures and inputs."""

    def answer(*values: Any) -> list[tuple[Image.Image, str]]:
        if any(value is None for value in values):
            raise gr.Error("Upload a picture first, and leave no field empty.", print_exception=False)
        try:
            opened = [open_picture(Path(path)) for path in values[: len(pictures)]]
            return [(one.picture, one.caption) for one in compute(*opened, *values[len(pictures) :])]
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Row():
        uploads = [_upload(name) for name in pictures]
    button = gr.Button(label, variant="primary")
    gallery = gr.Gallery(label="Reconstructions", columns=2)
    # One at a time, whatever was asked for: they share a model.
    button.click(answer, [*uploads, *inputs], gallery, concurrency_id="model", concurrency_limit=1)


def _upload(label: str) -> Any:
    # Of no mode, so that gradio hands over the file as it is, and pictures are read as everywhere.
    return gr.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], label=label)


def _reconstruct(pipeline: FeatInvPipeline, picture: Image.Image, samples: int, seed: int) -> list[Tile]:
    original = classify(pipeline, [picture])
    found = reconstruct_maps(pipeline, original["features"], samples, seed)
    reconstructions = zip(found["images"][0], found["logits"][0], strict=True)
    return [tile(original["images"][0], original["logits"][0], "the picture"), *(tile(*one) for one in reconstructions)]


def _steer(
    pipeline: FeatInvPipeline, concepts: Concepts, picture: Image.Image, concept: str, strength: float
) -> Sequence[Tile]:
    # Strength 0 beside it: what steering changed is what differs between the two.
    return steer(pipeline, picture, concepts, concepts.number(concept), [0, strength]).sections()[0].rows[0]


def _interpolate(
    pipeline: FeatInvPipeline, first: Image.Image, second: Image.Image, steps: int, mode: Mode
) -> Sequence[Tile]:
    return interpolate(pipeline, first, second, steps, mode).sections()[1].rows[0]
