"""What stands on the page: Gradio's components, in their places; what they do, `page` says."""

from __future__ import annotations

import html
from importlib.resources import files
from typing import Any

import gradio as gr

from ddengine.config import DirectDragConfig
from ddengine.ui import settings, words
from ddengine.ui.editor import Editor
from ddengine.ui.session import Session
from ddengine.ui.settings import Field
from ddengine.ui.view import data_url

THUMBNAIL = 88

_CANVAS = """
<div class="dd-frame dd-empty" tabindex="0" role="application" aria-describedby="dd-help"
  aria-label="Picture to edit: click what should move, then where it should go. Arrow keys move a cross, Enter clicks.">
  <img hidden alt="">
  <svg aria-hidden="true"><line visibility="hidden"></line></svg>
  <svg aria-hidden="true" viewBox="0 0 1000 1000" preserveAspectRatio="none"><path visibility="hidden"></path></svg>
  <p class="dd-wanted">No picture is open yet.<span class="dd-mouse">You can also drop one here.</span></p>
</div>
"""
_EXAMPLES_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-name]');
  if (button) trigger('choose', { name: button.dataset.name });
});
"""
# A result is what the user waits for: brought into view where it is not, once its pictures are there.
_SHOW_RESULT_JS = """
function show(tries) {
  const place = document.querySelector('#dd-result');
  const pictures = place ? [...place.querySelectorAll('#dd-slider img')] : [];
  if (!pictures.length || !pictures.every((one) => one.complete && one.naturalWidth)) {
    if (tries) setTimeout(show, 100, tries - 1);
    return;
  }
  const box = place.getBoundingClientRect();
  const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
  if (box.top < 0 || box.bottom > innerHeight) place.scrollIntoView({ behavior: calm ? 'auto' : 'smooth' });
}
watch('value', () => { if (String(props.value).includes('dd-done')) setTimeout(show, 100, 100); });
"""


def _read(name: str) -> str:
    return (files("ddengine.ui") / name).read_text(encoding="utf-8")


def style() -> str:
    """The page's own style sheet."""
    return _read("style.css")


class Layout:
    """The components of one page, to be made within a `gr.Blocks`; `fields` has those of the settings by name."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.fields: dict[str, Any] = {}
        self._lay_out()

    def _lay_out(self) -> None:
        _html(
            '<header class="dd-head"><h1>ddengine</h1><p>Drag a point of a picture to where it should be.</p>'
            f'<p class="dd-about">{words.about(self.editor)}</p></header>'
        )
        with gr.Row(elem_id="dd-pictures"):
            self.choices = _html(self._examples(), js_on_load=_EXAMPLES_JS, elem_id="dd-choices")
            self.upload = gr.UploadButton("Open a picture…", file_types=["image"], elem_id="dd-open", size="md")
        self.notice = _html("", elem_id="dd-notice")
        with gr.Row(elem_id="dd-desk"):
            with gr.Column(scale=11, min_width=320):
                self._lay_out_picture()
            with gr.Column(scale=8, min_width=320):
                self._lay_out_settings()
        self._lay_out_advanced()
        with gr.Column(visible=False, elem_id="dd-result") as self.result, gr.Row():
            with gr.Column(scale=11, min_width=320):
                self.slider = gr.ImageSlider(
                    label="Before (left) and after (right): move the line", buttons=[], interactive=False,
                    format="png", max_height=720, elem_id="dd-slider",
                )  # fmt: skip
            with gr.Column(scale=8, min_width=320):
                self._lay_out_result()

    def _lay_out_picture(self) -> None:
        self.hint = _html(words.hint(Session("")), elem_id="dd-help")
        self.canvas = _html({}, html_template=_CANVAS, js_on_load=_read("canvas.js"), elem_id="dd-canvas")
        with gr.Row(elem_id="dd-tools"):
            self.undo = gr.Button("Undo", size="sm", min_width=60)
            self.clear = gr.Button("Clear arrows", size="sm", min_width=60)
            self.suggest = gr.Button("Example's arrow", size="sm", min_width=60, visible=False)
            self.masked = gr.Checkbox(
                True, label="Show where it may change", container=False, min_width=60, elem_id="dd-masked"
            )
        self.listed = _html("", elem_id="dd-list")

    def _lay_out_settings(self) -> None:
        self.base = gr.Radio([], label="Picture to edit", visible=False, elem_id="dd-base")
        self.preset = gr.Radio(
            [(label, name) for name, label in settings.PRESET_WORDS.items()],
            value="default", label="Quality", elem_id="dd-preset",
        )  # fmt: skip
        with gr.Row(elem_id="dd-go"):
            self.run = gr.Button("Run", variant="primary", size="lg", scale=3, min_width=140, elem_id="dd-run")
            self.cancel = gr.Button("Cancel", size="lg", interactive=False, scale=1, min_width=90, elem_id="dd-cancel")
        self.status = _html("", js_on_load=_SHOW_RESULT_JS, elem_id="dd-status")
        with gr.Group():
            for name in settings.FRONT:
                self.fields[name] = _component(settings.field_of(name))
            self.prompt = gr.Textbox(
                label="What the picture shows (never needed)", visible=self.editor.takes_prompts(), max_length=500
            )

    def _lay_out_advanced(self) -> None:
        with gr.Accordion("Advanced", open=False, elem_id="dd-advanced"):
            self.others = gr.Dropdown(
                [(label, name) for name, label in settings.OTHER_PRESETS.items()],
                value=None, label="Take over a published configuration", filterable=False, elem_id="dd-others",
            )  # fmt: skip
            for title, group in settings.advanced().items():
                gr.Markdown(f"#### {title}")
                with gr.Row(elem_classes="dd-fields"):
                    for field in group:
                        self.fields[field.name] = _component(field)

    def _lay_out_result(self) -> None:
        self.facts = _html("", elem_id="dd-facts")
        self.get_result = gr.DownloadButton("Download the result", variant="primary", size="md")
        with gr.Row():
            self.get_recipe = gr.DownloadButton("Edit (JSON)", size="md", min_width=130)
            self.get_base = gr.DownloadButton("Picture before", size="md", min_width=130)
        # No language: Gradio's colours for one are too pale to read on white.
        code: dict[str, Any] = {"interactive": False, "show_line_numbers": False, "wrap_lines": True, "lines": 3}
        with gr.Tabs(elem_id="dd-code"):
            with gr.Tab("Command"):
                self.command = gr.Code(label="The same edit", buttons=["copy"], **code)
            with gr.Tab("Python"):
                self.python = gr.Code(label="The same edit", buttons=["copy"], **code)
            with gr.Tab("Replay"):
                self.replay = gr.Code(label="The JSON, to the same pixels", buttons=["copy"], **code)

    def _examples(self) -> str:
        buttons = []
        for name, example in self.editor.examples.items():
            small = example.picture.copy()
            small.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
            shown = html.escape(name)
            buttons.append(
                f'<button type="button" data-name="{shown}" aria-label="Open the example {shown}">'
                f'<img src="{data_url(small)}" alt="" width="44" height="44"><span>{shown.capitalize()}</span></button>'
            )
        return f'<div class="dd-examples" role="group" aria-label="Examples">{"".join(buttons)}</div>'


def _component(field: Field) -> Any:
    """The Gradio component of a setting, with the default's value."""
    value = settings.shown(DirectDragConfig.preset())[[one.name for one in settings.fields()].index(field.name)]
    shared: dict[str, Any] = {"label": field.label, "info": field.info, "elem_id": f"dd-set-{field.name}"}
    if field.name in settings.SLIDERS:
        low, high, step = settings.SLIDERS[field.name]
        slider = gr.Slider(low, high, value=value, step=step, **shared)
        # Its number may be anything while it is typed: the settings' own rules say what is wrong with it.
        slider.preprocess = lambda payload: payload  # type: ignore[method-assign]
        return slider
    if field.kind == "switch":
        return gr.Checkbox(value, **shared)
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), value=value, filterable=False, **shared)
    if field.kind == "words":
        return gr.Textbox(value, max_length=20, **shared)
    return gr.Number(value, precision=0 if field.kind == "whole" else None, **shared)


def _html(value: Any, **options: Any) -> Any:
    """HTML as it is, without Gradio's style for texts."""
    return gr.HTML(value, apply_default_css=False, **options)
