"""The page: a form, and the answer as the gallery shows it."""

import traceback
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import gradio as gr
from fastapi import FastAPI

from dmin.attribution.features import FeatureSet
from dmin.runtime.errors import DminError
from dmin.runtime.files import machine_failure
from dmin.runtime.page import COLOURS
from dmin.serve.map import asker
from dmin.serve.question import MASK, SHOWN, SIDE_BY_SIDE, Question

_WAIT = '<div class="wait">{}</div>'
_ANSWER = """<div class="again"><code tabindex="0">{}</code>{}<button type="button">Copy</button>
<button type="button" data-open="1">Own tab</button></div><iframe title="Answer" srcdoc="{}">"""
_MASK = f'<a download="{MASK}" href="data:image/png;base64,{{}}">{MASK}</a>'

Tell = Callable[[float, str], None]
"""Called with the fraction of the work completed, and the current step."""


class Desk(Protocol):
    """The interface of the object that answers questions.

    Attributes:
        about: one line that names store and model.
        words: store, options and settings of the command line.
        k: default number of training examples in an answer.
        chosen: number of methods named on the command line.
        places: whether the command line asks for attribution maps.
    """

    about: str
    words: Sequence[str]
    k: int
    chosen: int
    places: bool

    @property
    def methods(self) -> Sequence[str]:
        """The available methods, those of the command line first."""

    def examples(self) -> FeatureSet:
        """Return the store with its examples, for which no model is needed."""

    def answer(self, question: Question, folder: Path, tell: Tell) -> str:
        """Return the page of an answer; ``folder`` is for its files, and is deleted afterwards."""


def reply(desk: Desk, upload_mb: float, sent: dict[str, Any], tell: Tell) -> str:
    """Return the answer to a browser's request as HTML, or the reason why there is none."""
    with TemporaryDirectory(prefix="dmin-serve-") as place:
        folder = Path(place).resolve()
        try:
            question = Question.read(sent, upload_mb, desk.methods)
            page = desk.answer(question, folder, tell)
        except Exception as error:
            told = str(error if isinstance(error, DminError) else machine_failure(error) or "")
            if not told:
                traceback.print_exc()
                told = f"A defect of dmin ({type(error).__name__}): the terminal has the traceback."
            told = told.replace(f"{folder}/picture/", "").replace(f"{folder}/", "")
            return f'<p class="notice" role="alert">{escape(told)}</p>'
    mask = _MASK.format(sent["mask"]) if question.mask else ""
    return _ANSWER.format(escape(question.line(desk.words)), mask, escape(page))


def build(desk: Desk, upload_mb: float, queue: int) -> gr.Blocks:
    """Return the page; it answers one question at a time. Arguments as in `mounted`."""

    def ask(pad: Any, *form: Any, progress: Any = gr.Progress()) -> str:  # noqa: B008 (its way)
        drawn = pad if isinstance(pad, dict) else {}
        if drawn and not drawn.get("picture"):
            return _WAIT.format("Drop a picture first, or generate one.")
        fields = zip(("prompt", "methods", "k", "places", "seed", "steps"), form, strict=True)
        return reply(desk, upload_mb, {**drawn, **dict(fields)}, lambda *told: progress(*told))

    template, script, limit = _read("pad.html"), _read("pad.js"), f"{upload_mb:g}"
    with gr.Blocks(title="dmin", analytics_enabled=False, fill_width=True) as page:
        about = escape(desk.about)
        gr.HTML(f"<h1>Which training examples are behind it?</h1><p>{about}</p>", elem_id="head")
        with gr.Row():
            with gr.Column(scale=0, min_width=340):
                with gr.Tab("A picture"):
                    pad = gr.HTML(html_template=template, js_on_load=script, limit=limit)
                with gr.Tab("Generate one"):
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                    steps = gr.Number(50, label="Steps", precision=0, minimum=1)
                prompt = gr.Textbox(label="Prompt", lines=2, placeholder="caption, or class")
                methods = gr.Dropdown(
                    list(desk.methods),
                    value=list(desk.methods)[: min(desk.chosen, SIDE_BY_SIDE)],
                    label="Methods, side by side",
                    multiselect=True,
                    max_choices=SIDE_BY_SIDE,
                )
                k = gr.Slider(1, max(60, desk.k), desk.k, step=1, label="Training examples")
                places = gr.Checkbox(desk.places, label=f"Where: maps of the first {SHOWN}")
                go = gr.Button("Ask", variant="primary")
            with gr.Column(scale=1, min_width=320):
                with gr.Tab("Answer"):
                    empty = _WAIT.format("The training examples behind a picture are shown here.")
                    answer = gr.HTML(empty, elem_id="answer", js_on_load=_read("answer.js"))
                with gr.Tab("Map of the store"):
                    asks = [asker(desk.examples)]
                    plane, drawn = _read("map.html"), _read("map.js")
                    gr.HTML(html_template=plane, js_on_load=drawn, server_functions=asks)
        asked, own = (
            [pad, prompt, methods, k, places, seed, steps],
            "(pad, ...form) => [dminAsked(), ...form]",
        )
        go.click(ask, asked, answer, js=own, api_visibility="private")
    return page.queue(max_size=queue, default_concurrency_limit=1)


def mounted(desk: Desk, upload_mb: float, queue: int) -> FastAPI:
    """Return the page as an application, in the colours of all pages.

    Args:
        desk: answers the questions.
        upload_mb: size of the largest picture accepted, in MB.
        queue: most waiting questions.
    """
    style = COLOURS.read_text("utf-8") + _read("serve.css")
    names = ("run_history", "ssr_mode", "pwa", "mcp_server", "enable_monitoring")
    off: dict[str, Any] = {"footer_links": [], **dict.fromkeys(names, False)}
    theme = gr.themes.Base(font="system-ui", font_mono="monospace")  # no font is downloaded
    blocks, head = build(desk, upload_mb, queue), f"<style>{style}</style>"
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    return gr.mount_gradio_app(app, blocks, "/", theme=theme, head=head, **off)


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8")
