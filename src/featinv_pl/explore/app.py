"""A page on this machine: reconstruct, steer, interpolate, compose and audit pictures, without a command line."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from zipfile import ZipFile

from markupsafe import escape
from PIL import Image

from featinv_pl.errors import UserError
from featinv_pl.explore.audit import audit
from featinv_pl.explore.concepts import Concepts
from featinv_pl.explore.exploration import refuse_other_backbone
from featinv_pl.explore.pairs import compose, interpolate
from featinv_pl.explore.reconstructions import reconstructions
from featinv_pl.explore.steering import steer
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.pages.page import Report, open_picture, png

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
PURPOSE = "See what a classifier's features keep of a picture: images are drawn from its feature map alone."
EXAMPLES = Path(__file__).with_name("examples")
CREDIT = '<a href="{page}">{author}</a> (<a href="{license}">CC BY</a>)'
CSS = """
.image-frame img { width: 100%; height: 100%; object-fit: contain; }
iframe { width: 100%; height: 85vh; border: 0; background: white; }
"""
Compute = Callable[..., Report]
"""Of pictures, of what the form's fields say, and of the seed."""


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


def serve(pipeline: FeatInvPipeline, name: str, concepts: Concepts | None, host: str, port: int) -> None:
    """Serve the page of a model, which has a name, until the process is interrupted."""
    page = build(pipeline, name, concepts)
    print(f"Open http://{host}:{port}. Ctrl+C ends it.", flush=True)
    # Fonts of the system: gradio's own theme would fetch its from the network.
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    own: Any = {"middleware": [Middleware(OwnPages, host=host)]}
    look: Any = {"theme": theme, "css": CSS, "footer_links": [], "quiet": True, "ssr_mode": False, "share": False}
    try:
        page.launch(server_name=host, server_port=port, max_file_size=LARGEST, app_kwargs=own, **look)
    except OSError as error:
        raise UserError(f"`port`: cannot listen at {host}:{port} ({error}). Give another `port` or `host`.") from error


def build(pipeline: FeatInvPipeline, name: str, concepts: Concepts | None) -> Any:
    """The page, as gradio's `Blocks`; see `serve`."""
    if concepts is not None:
        refuse_other_backbone(concepts.origin, pipeline, "`concepts`")
    gr.set_static_paths([EXAMPLES])  # served as they are; gradio would leave copies of them
    classifier, size = pipeline.inverter.classifier, pipeline.inverter.image_size
    height, width = classifier.input_size
    shape = "x".join(map(str, classifier.feature_shape))
    form = partial(_form, name)
    with gr.Blocks(title=f"featinv-pl: {name}", analytics_enabled=False, delete_cache=(60, KEPT_S)) as page:
        gr.Markdown(f"# featinv-pl\n{PURPOSE}")
        # Not as Markdown, which would read names.
        gr.HTML(
            f"Model <b>{escape(name)}</b>: classifier {escape(classifier.title)}, maps of {shape}; images of "
            f"{size}x{size} pixels, sampled on {pipeline.device}."
        )
        with gr.Tab("Reconstruct"):
            what = "Images that have the picture's feature map: what they share was kept, what differs was not."
            with form("Reconstruct", what, partial(reconstructions, pipeline), ["Picture"]) as fields:
                fields.append(_slider("Samples", 1, 16, 4))
        with gr.Tab("Steer"):
            if concepts is None:
                gr.Markdown(
                    "Steering moves a picture's feature map along a concept. Find concepts with `featinv-pl concepts`, "
                    "and start this page with `--concepts FOLDER`."
                )
            else:
                what = "The picture's feature map, moved along a concept in steps up to the strength."
                with form("Steer", what, partial(_steer, pipeline, concepts), ["Picture"]) as fields:
                    fields.append(gr.Dropdown(concepts.names, value=concepts.names[0], label="Concept", min_width=140))
                    fields.append(_slider("Strength", -3, 3, 1, 0.1))
        with gr.Tab("Interpolate"):
            what = "Images of the feature maps between those of two pictures."
            two = ["First picture", "Second picture"]
            with form("Interpolate", what, partial(interpolate, pipeline), two) as fields:
                fields.append(_slider("Steps", 2, 21, 7))
                fields.append(gr.Radio(["linear", "slerp"], value="linear", label="Mode"))
        with gr.Tab("Compose"):
            what = f"A box of the second picture's map, pasted into the first one's: in pixels, of {height}x{width}."
            with form("Compose", what, partial(_compose, pipeline), two) as fields:
                for label, low, high, value in (
                    *(("Top", 0, height - 1, height // 2), ("Left", 0, width - 1, 0)),
                    *(("Height", 1, height, height - height // 2), ("Width", 1, width, width)),
                ):
                    fields.append(_slider(label, low, high, value))
        with gr.Tab("Audit"):
            what = "What stays open in images whose feature map is as close to the picture's as asked for."
            with form("Audit", what, partial(_audit, pipeline), ["Picture"]) as fields:
                fields.append(_slider("Samples", 4, 64, 16))
                fields.append(
                    gr.CheckboxGroup(["inverter", "refined", "training-free"], value=["inverter"], label="Methods")
                )
                fields.append(_slider("Least cosine (0: the autoencoder's)", 0, 1, 0, 0.01))
    return page


@contextmanager
def _form(model: str, label: str, what: str, compute: Compute, pictures: list[str]) -> Iterator[list[Any]]:
    """Pictures, the fields that the caller makes and a button; beside them the page of what `compute` returns."""
    fields: list[Any] = []

    def answer(progress: Any = gr.Progress(track_tqdm=True), *values: Any) -> Iterator[tuple[str, Any]]:  # noqa: B008
        if any(value is None for value in values):
            raise gr.Error("Choose a picture first, and leave no field empty.", print_exception=False)
        try:
            opened = [open_picture(Path(path)) for path in values[: len(pictures)]]
            *asked, seed = values[len(pictures) :]
            report = compute(*opened, *asked, seed=seed)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        with TemporaryDirectory() as folder:  # gradio copies the file before it goes on
            yield (
                _shown(report, {"model": model, "seed": str(seed)}),
                gr.DownloadButton(value=_packed(report, Path(folder)), visible=True),
            )

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                uploads = [_upload(name) for name in pictures]
            with gr.Row():
                yield fields
                fields.append(gr.Number(0, precision=0, minimum=0, label="Seed", min_width=140))
            button = gr.Button(label, variant="primary")
            _examples(uploads)
        with gr.Column(scale=5, min_width=300):
            packed = gr.DownloadButton("Download the page, its pictures and JSON", visible=False)
            shown = gr.HTML(f"<p>{what}</p>", min_height=300)
    # One at a time, whatever was asked for: they share a model.
    button.click(
        answer,
        [*uploads, *fields],
        [shown, packed],
        show_progress_on=shown,
        concurrency_id="model",
        concurrency_limit=1,
    )


def _slider(label: str, low: float, high: float, value: float, step: float = 1) -> Any:
    return gr.Slider(low, high, value, step=step, label=label, min_width=140)


def _upload(label: str) -> Any:
    # Of no mode, so that gradio hands over the file as it is, and pictures are read as everywhere.
    sources: Any = ["upload", "webcam", "clipboard"]
    return gr.Image(type="filepath", image_mode=None, sources=sources, label=label, height=220)


def _examples(uploads: list[Any]) -> None:
    """Pictures to begin with, and whose they are."""
    credited = list(csv.DictReader(io.StringIO((EXAMPLES / "credits.csv").read_text())))
    names = [str(EXAMPLES / one["file"]) for one in credited]
    rows = [names[start : start + len(uploads)] for start in range(0, len(names), len(uploads))]
    gr.Examples(rows, uploads, label="Examples", api_visibility="undocumented")
    people = dict.fromkeys(CREDIT.format(**{key: escape(value) for key, value in one.items()}) for one in credited)
    gr.HTML(f"<small>By {', '.join(people)}; photos are cropped.</small>")


def _shown(report: Report, about: dict[str, str]) -> str:
    """The page of a report, and what it was made from, within another."""
    return f'<iframe title="Results" srcdoc="{escape(report.page(about))}"></iframe>'


def _packed(report: Report, folder: Path) -> str:
    """An archive of a report's files and of each of its pictures."""
    report.save(folder)
    found = sorted(folder.iterdir())
    tiles = [one for section in report.sections() for row in section.rows for one in row]
    with ZipFile(folder / f"{report.name}.zip", "w") as archive:
        for path in found:
            archive.write(path, path.name)
        for number, one in enumerate(tiles):
            archive.writestr(f"pictures/{number:02}.png", png(one.picture))
    return str(folder / f"{report.name}.zip")


def _steer(
    pipeline: FeatInvPipeline, concepts: Concepts, picture: Image.Image, concept: str, strength: float, seed: int
) -> Report:
    # From strength 0 on: what steering changes is what differs from that.
    strengths = [strength * step / 4 for step in range(5)]
    return steer(pipeline, picture, concepts, concepts.number(concept), strengths, seed=seed)


def _compose(pipeline: FeatInvPipeline, first: Image.Image, second: Image.Image, *box: int, seed: int) -> Report:
    top, left, height, width = box
    return compose(pipeline, first, second, (top, left, height, width), seed=seed)


def _audit(
    pipeline: FeatInvPipeline, picture: Image.Image, samples: int, methods: Sequence[Any], cosine: float, seed: int
) -> Report:
    return audit(pipeline, ["the picture"], [picture], samples, methods, cosine or None, seed=seed)
