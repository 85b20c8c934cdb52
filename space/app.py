"""Try a model in the browser: `python space/app.py --model outputs/pretrain`, or as a Space whose variable MODEL names a model.

Notable:
- The model decides what the page offers: a chat if its tokenizer has a chat template, text completion if it has none, class
  probabilities if it is a classifier. Each can be inspected: the tokens of a text, the next-token distribution, attention.
- A Space holds this directory only, so nothing else of ScratchGPT is imported.
- The page loads nothing from other servers and sends no telemetry.
"""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import argparse
import html
import textwrap
from pathlib import Path
from typing import Any

import gradio as gr
from model_demo import EXAMPLE_TEXT, ModelDemo, preformatted, stopped_note
from transformers.utils import logging


def sampling_sliders(demo: ModelDemo) -> list[gr.Slider]:
    """Sliders with the defaults of the model's generation config, not yet rendered."""
    config = demo.model.generation_config
    value = {"temperature": 1.0, "top_k": 50, "top_p": 1, "repetition_penalty": 1, "max_new_tokens": 128}
    value |= {name: getattr(config, name) for name in value if getattr(config, name) is not None}
    if not config.do_sample:
        value["temperature"] = 0
    length, value["max_new_tokens"] = demo.context_length, min(value["max_new_tokens"], demo.context_length)
    fields = [
        ("Temperature", "temperature", 0, max(2, value["temperature"]), 0.05, "0: greedy"),
        ("Top-k", "top_k", 0, max(200, value["top_k"]), 1, "0: off"),
        ("Top-p", "top_p", 0.05, 1, 0.05, "1: off"),
        ("Repetition penalty", "repetition_penalty", 1, 2, 0.05, "1: off"),
        ("Max new tokens", "max_new_tokens", 1, length, 1, None),
    ]
    return [
        gr.Slider(low, high, value[name], step=step, label=label, info=info, render=False)
        for label, name, low, high, step, info in fields
    ]


def classification_tab(demo: ModelDemo, inspected: gr.Textbox) -> None:
    with gr.Tab("Classify"):
        hint = "Enter classifies, Shift+Enter starts a new line"
        box = gr.Textbox(autofocus=True, max_lines=12, label="Text", placeholder=hint)
        button = gr.Button("Classify", variant="primary")
        classes = gr.HTML(apply_default_css=False)
    run = gr.on([box.submit, button.click], demo.classify, box, classes, show_progress="hidden")
    run.then(str, box, inspected)


def generation_tab(demo: ModelDemo, sampling: list[gr.Slider], inspected: gr.Textbox) -> None:
    """Chat or completion. The conversation, or the completed text, is copied to `inspected` at the end.

    `gr.ChatInterface` would disable the message box during an answer and leave it without focus and placeholder, show HTML in
    messages as HTML, and let an answer continue after Clear.
    """
    is_chat = demo.is_chat
    hint = "Enter sends" if is_chat else "The beginning of a text, or nothing. Enter continues it"
    hint += ", Shift+Enter starts a new line"
    with gr.Tab("Chat" if is_chat else "Completion"):
        state: Any = gr.State([] if is_chat else "")
        if is_chat:
            output: Any = gr.Chatbot(label="Conversation", render_markdown=False, height="60vh", buttons=[])
        box = gr.Textbox(autofocus=True, max_lines=12, label="Message" if is_chat else "Text", placeholder=hint)
        with gr.Row():
            send = gr.Button("Send" if is_chat else "Continue", variant="primary", min_width=80)
            stop = gr.Button("Stop", min_width=80)
            clear = gr.Button("Clear", min_width=80)
        if not is_chat:
            output = gr.HTML(preformatted(""), apply_default_css=False)
        note = gr.HTML(elem_classes="facts", apply_default_css=False)
    function, to_text = (demo.chat, demo.render_conversation) if is_chat else (demo.complete, str)
    outputs = [box, state, output, note]
    run = gr.on([box.submit, send.click], function, [box, state, *sampling], outputs, show_progress="hidden")
    run.then(to_text, state, inspected)
    cancelled = stop.click(None, cancels=[run])
    # A step of its own: the last text that was generated may still be on its way to the page when Stop is clicked.
    cancelled.then(lambda state, note: (to_text(state), stopped_note(note)), [state, note], [inspected, note])
    empty = ("", [], [], "") if is_chat else ("", "", preformatted(""), "")
    clears: Any = [clear.click, output.clear] if is_chat else [clear.click]  # the Chatbot also has an icon of its own
    gr.on(clears, lambda: empty, None, outputs, cancels=[run])


def inspection_tab(demo: ModelDemo, sampling: list[gr.Slider], text: gr.Textbox) -> None:
    """Tokens, next-token distribution and attention of one text, updated whenever it or a setting changes."""
    config = demo.model.config
    with gr.Tab("Look inside"):
        text.render()
        with gr.Tabs():
            with gr.Tab("Tokens"):
                tokens = gr.HTML(apply_default_css=False)
            if sampling:
                with gr.Tab("Next token"):
                    next_tokens = gr.HTML(apply_default_css=False)
            with gr.Tab("Attention"):
                with gr.Row():
                    layer, head = (
                        gr.Slider(0, number - 1, 0, step=1, label=f"{name} (0 to {number - 1})", interactive=number > 1)
                        for name, number in (("Layer", config.num_hidden_layers), ("Head", config.num_attention_heads))
                    )
                attention = gr.HTML(apply_default_css=False)
    # Without triggers: when the page is opened, and when one of the inputs changes.
    options: Any = {"triggers": None, "trigger_mode": "always_last", "show_progress": "hidden"}
    gr.on(fn=demo.tokens, inputs=[text], outputs=tokens, **options)
    gr.on(fn=demo.attention, inputs=[text, layer, head], outputs=attention, **options)
    if sampling:
        gr.on(fn=demo.next_tokens, inputs=[text, *sampling[:3]], outputs=next_tokens, **options)


def build_page(demo: ModelDemo) -> gr.Blocks:
    sampling = [] if demo.is_classifier else sampling_sliders(demo)
    inspected = gr.Textbox(EXAMPLE_TEXT, label="Text", max_lines=8, render=False)
    with gr.Blocks(title=demo.name) as blocks:
        gr.HTML(f'<h1>{html.escape(demo.name)}</h1><p class="facts">{demo.summary()}</p>', apply_default_css=False)
        with gr.Row():
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                if demo.is_classifier:
                    classification_tab(demo, inspected)
                else:
                    generation_tab(demo, sampling, inspected)
                inspection_tab(demo, sampling, inspected)
            if sampling:
                with gr.Column(scale=1, min_width=240):
                    for slider in sampling:
                        slider.render()
    return blocks


def launch(demo: ModelDemo, port: int | None) -> tuple[gr.Blocks, str]:
    """Serve the page in the background, without a port on the first free one from 7860; return it and its address.

    Raises:
        OSError: the port is in use.
    """
    fonts, mono_fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # installed fonts: none is downloaded
    theme = gr.themes.Default(primary_hue="blue", font=fonts, font_mono=mono_fonts)
    theme.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")
    blocks = build_page(demo)
    _, address, _ = blocks.launch(
        server_port=port,
        quiet=True,
        prevent_thread_lock=True,
        theme=theme,
        css_paths=Path(__file__).with_name("style.css"),
        footer_links=[],
        ssr_mode=False,
        max_file_size=0,  # nothing can be uploaded
    )
    return blocks, address


def main() -> None:
    parser = argparse.ArgumentParser(description="Try a model in the browser.", usage=argparse.SUPPRESS)
    default = os.environ.get("MODEL")
    parser.add_argument("--model", default=default, help="directory or Hub id (default: the environment variable MODEL)")
    parser.add_argument("--port", type=int, help="port on this machine (default: the first free one from 7860)")
    arguments = parser.parse_args()
    if not arguments.model:
        parser.error("no model: pass --model with a directory or a Hub id.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        demo = ModelDemo(arguments.model, os.environ.get("REVISION"))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # each library has its own errors, and a panic in tokenizers is not an Exception
        reason = textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        parser.error(f"--model {arguments.model} cannot be loaded ({reason}).")
    try:
        blocks, address = launch(demo, arguments.port)
    except OSError:
        parser.error(f"--port {arguments.port} is in use: pass another.")
    print(f"{demo.name} is running at {address} (press Ctrl-C to stop)", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    main()
