"""A page that shows what a model does: `python space/app.py --model outputs/pretrain`, or a Space whose MODEL names one.

Notable:
- The model decides what is there: a chat where its tokenizer has a chat template, a completion where it has none, the
  probability of each class where it is a classifier. All can be looked into: the text as tokens, what comes next, attention.
- It stands alone: a Space holds this folder and nothing else of ScratchGPT. A model that transformers does not
  know is run by the code that comes with it (`trust_remote_code`), so name none that you do not trust.
- Two models share one set of weights: one writes fast, the other writes its attention out. What is asked of the one cannot
  disturb the other, which may be in the middle of a text.
- Nothing is fetched from elsewhere, and nothing is told to anyone.
"""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import argparse
import copy
import html
import math
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import gradio as gr
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    StoppingCriteriaList,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.generation import BaseStreamer
from transformers.utils import logging

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # how byte-level tokenizers spell a byte
MARKS = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥"})
NUM_NEXT = 20  # tokens in the distribution
NUM_MAPPED = 40  # tokens along each side of the heat map
NUM_LOOKED_AT = 1024  # tokens of a text, where the model has more positions
LONGEST_SECONDS = 600  # that a text may take, should nobody read it any more
SAMPLE = "It was the best of times, it was the worst of times"
FONTS = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # of the reader's own system: none is fetched


class Ids(BaseStreamer):
    """What `generate` gives out, the prompt first, for another thread to take; None is the end."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[list[int] | None] = SimpleQueue()

    def put(self, value: torch.Tensor) -> None:
        self.queue.put(value.flatten().tolist())

    def end(self) -> None:
        self.queue.put(None)


class Showcase:
    """A model with its tokenizer, and what the page asks of them; all that it returns as HTML is escaped.

    Raises:
        OSError, ValueError and others of transformers' and the Hub's: it cannot be loaded.
    """

    def __init__(self, name: str, revision: str | None):
        folder = Path(name)
        if not folder.is_dir() and (
            folder.is_absolute() or folder.exists() or (folder.parent != Path() and folder.parent.is_dir())
        ):
            raise ValueError("there is no such folder")
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        code = {"trust_remote_code": "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING}
        architecture = (config.get("architectures") or [""])[0]
        self.is_classifier = architecture.endswith("ForSequenceClassification")
        if not self.is_classifier and not architecture.endswith(("ForCausalLM", "LMHeadModel")):
            raise ValueError(f"{architecture or 'what its config describes'} is neither a language model nor a text classifier")
        auto_class: Any = AutoModelForSequenceClassification if self.is_classifier else AutoModelForCausalLM
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype: Any = "auto" if device == "cuda" else torch.float32
        model, report = auto_class.from_pretrained(name, revision=revision, dtype=dtype, output_loading_info=True, **code)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"it lacks weights: {', '.join(missing[:3])}")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision, **code)
        self.model: Any = model.to(device).eval()
        self.watched: Any = copy.deepcopy(self.model, {id(weight): weight for weight in self.model.parameters()})
        self.watched.set_attn_implementation("eager")
        self.name = Path(name).name if Path(name).is_dir() else name
        positions = getattr(self.model.config, "max_position_embeddings", NUM_LOOKED_AT)
        self.positions: int = min(positions, self.tokenizer.model_max_length)  # the latter is less where some are set aside
        self.is_chat = not self.is_classifier and bool(self.tokenizer.chat_template)
        self.spells_bytes = "ByteLevel" in repr(self.tokenizer.backend_tokenizer.decoder)

    def facts(self) -> str:
        config, size = self.model.config, self.model.num_parameters()
        return (
            f"{size:,} parameters · {config.num_hidden_layers} layers of {config.num_attention_heads} heads · "
            f"{self.positions:,} positions · {config.vocab_size:,} tokens"
        )

    def ids(self, text: str) -> list[int]:
        """The text as ids. Where a chat template writes the special tokens, the tokenizer adds none."""
        return self.tokenizer(text, add_special_tokens=not self.is_chat)["input_ids"]

    def ids_to_go_on_from(self, text: str) -> list[int]:
        """The same, and for no text the token that begins one."""
        return self.ids(text) or [token for token in (self.tokenizer.bos_token_id,) if token is not None]

    def looked_at(self, text: str) -> tuple[list[int], str]:
        """As many ids of the text as can be looked at, and what to say of it."""
        ids, most = self.ids_to_go_on_from(text), min(self.positions, NUM_LOOKED_AT)
        if len(ids) <= most:
            return ids, f"{len(ids):,} tokens for {len(text):,} characters."
        room = f"the model has {self.positions:,} positions" if most == self.positions else "the page has room for no more"
        return ids[:most], f"The text has {len(ids):,} tokens, and {room}: only the first {most:,} are looked at."

    def spelled(self, index: int) -> str:
        """A token as people can read it, escaped: white space is marked, bytes that are no whole character are numbers."""
        piece = self.tokenizer.convert_ids_to_tokens(index)
        if piece is None:  # a model may have more rows than its tokenizer has tokens
            return "(none)"
        if self.spells_bytes and BYTES.keys() >= set(piece):
            text = bytes(BYTES[character] for character in piece).decode("utf-8", "backslashreplace")
        else:
            text = piece.replace("▁", " ")
        text = text.translate(MARKS)
        return html.escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))

    def write(self, ids: list[int], settings: GenerationConfig) -> Iterator[tuple[str, str]]:
        """What the model has written after the ids so far, and how long it took. Closing the iterator stops it."""
        given, stopped = Ids(), Event()

        def generate() -> None:
            inputs = torch.tensor([ids], device=self.model.device)
            try:
                self.model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=settings,
                    streamer=given,
                    stopping_criteria=StoppingCriteriaList(
                        [lambda tokens, *_, **__: torch.full((1,), is_over(), device=tokens.device)]
                    ),
                )
            finally:
                given.end()

        def is_over() -> bool:
            return stopped.is_set() or time.perf_counter() - start > LONGEST_SECONDS

        def text(ids: list[int]) -> str:
            return self.tokenizer.decode(ids, skip_special_tokens=True)

        start, new = time.perf_counter(), list[int]()
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(generate)
            try:
                given.queue.get()  # the prompt
                while (more := given.queue.get()) is not None:
                    new += more
                    # The bytes of a character may come one by one: until the last it is none.
                    yield text(ids + new)[len(text(ids)) :].rstrip("�"), f"{len(new):,} tokens so far"
                done.result()
                seconds = time.perf_counter() - start
                yield text(ids + new)[len(text(ids)) :], f"{len(new):,} tokens in {seconds:.1f} seconds"
            finally:
                stopped.set()

    def settings(
        self, length: int, temperature: float, top_k: float, top_p: float, repetition_penalty: float, max_new_tokens: float
    ) -> GenerationConfig:
        """How to go on from so many ids; there is room for one more at least."""
        temperature, top_k, top_p, repetition_penalty, max_new_tokens = numbers(
            temperature, top_k, top_p, repetition_penalty, max_new_tokens
        )
        settings = copy.deepcopy(self.model.generation_config)
        settings.update(
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=int(top_k) if temperature else None,
            top_p=top_p if temperature else None,
            repetition_penalty=float(repetition_penalty),
            max_new_tokens=min(int(max_new_tokens), self.positions - length),
            max_length=None,
            num_beams=1,
        )
        return settings

    def complete(self, text: str, *sampling: Any) -> Iterator[tuple[str, str, str]]:
        """The text with what the model adds to it: as HTML, as it is, and what to say of it."""
        ids = self.ids_to_go_on_from(text)
        prompt = f'<span class="prompt">{html.escape(text)}</span>'
        if not 0 < len(ids) < self.positions:
            yield written(prompt), text, self.no_room(len(ids))
            return
        for new, note in self.write(ids, self.settings(len(ids), *sampling)):
            yield written(prompt + html.escape(new)), text + new, note

    def chat(self, message: str, talk: list[dict[str, str]], *sampling: Any) -> Iterator[tuple[str, Any, Any, str]]:
        """The box, emptied; the conversation with the model's answer, to keep and to show; what to say of it."""
        if not message.strip():
            yield message, talk, bubbles(talk), "Type something first."
            return
        talk = [*talk, {"role": "user", "content": message}]
        seen, (*_, max_new_tokens) = talk, numbers(*sampling)
        while len(ids := self.conversation_ids(seen)) + max_new_tokens > self.positions and len(seen) > 2:
            seen = seen[2:]
        if len(ids) >= self.positions:
            yield message, talk[:-1], bubbles(talk[:-1]), self.no_room(len(ids))
            return
        yield "", talk, bubbles(talk), ""
        forgotten = f"; the first {len(talk) - len(seen)} messages are out of its sight" if seen is not talk else ""
        for new, note in self.write(ids, self.settings(len(ids), *sampling)):
            told = [*talk, {"role": "assistant", "content": new}]
            yield "", told, bubbles(told), note + forgotten

    def conversation_ids(self, talk: list[dict[str, str]]) -> list[int]:
        return self.tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]

    def conversation_text(self, talk: list[dict[str, str]]) -> str:
        """What the model reads of a conversation."""
        return self.tokenizer.apply_chat_template(talk, tokenize=False) if talk else SAMPLE

    def no_room(self, length: int) -> str:
        if not length:
            return "Type something first: this model has no token that begins a text."
        return f"The text has {length:,} tokens, and the model has {self.positions:,} positions: shorten it."

    def tokens(self, text: str) -> str:
        ids, note = self.looked_at(text)
        special = set(self.tokenizer.all_special_ids)
        items = [
            f'<li class="{"special" if index in special else ""}"><b>{self.spelled(index)}</b><small>{index}</small></li>'
            for index in ids
        ]
        return f'<p class="facts">{note}</p><ol class="tokens">{"".join(items)}</ol>'

    @torch.no_grad()
    def next_tokens(self, text: str, temperature: float, top_k: float, top_p: float) -> str:
        ids, _ = self.looked_at(text)
        temperature, top_k, top_p = numbers(temperature, top_k, top_p)
        if not ids:
            return written(self.no_room(0))
        logits = self.watched(torch.tensor([ids], device=self.watched.device), logits_to_keep=1).logits[0, -1].float()
        shares, order = (logits / (temperature or 1)).softmax(-1).sort(descending=True)
        among = shares[: int(top_k) or None]
        can_be = int((among.cumsum(0) - among < top_p * among.sum()).sum()) if temperature else 1
        names = [f'<th scope="row">{self.spelled(i)}</th><td class="number">{i}</td>' for i in order[:NUM_NEXT].tolist()]
        how = f"{can_be:,} of {len(shares):,} tokens can come next, at temperature {temperature:g}; the others are pale."
        if not temperature:
            how = "At temperature 0 the first is taken; the probabilities are those of temperature 1."
        return f'<p class="facts">{how}</p>{bars(names, shares[:NUM_NEXT].tolist(), can_be)}'

    @torch.no_grad()
    def attention(self, text: str, layer: int, head: int) -> str:
        ids, _ = self.looked_at(text)
        if not ids:
            return written(self.no_room(0))
        layer, head = map(int, numbers(layer, head))
        mapped = ids[:NUM_MAPPED]  # where a token sees none after it, those left out change nothing
        outputs = self.watched(torch.tensor([mapped], device=self.watched.device), output_attentions=True)
        weights = outputs.attentions[layer][0, head].tolist()
        names = [self.spelled(index) for index in mapped]
        is_causal = not outputs.attentions[layer][0, head].triu(1).any()
        rows = []
        for row, name in enumerate(names):
            cells = [
                f'<td title="{name} looks at {names[column]}: {weight:.2%}" {shade(weight)}></td>'
                for column, weight in enumerate(weights[row][: row + 1 if is_causal else None])
            ]
            rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
        columns = "".join(f'<th scope="col">{name}</th>' for name in names)
        legend = "".join(f"<i {shade(weight)}></i>{weight:.0%}" for weight in (0, 0.04, 0.25, 1))
        cut = f" Mapped are the first {len(mapped)} of {len(ids):,} tokens." if len(mapped) < len(ids) else ""
        among = " among those up to itself" if is_causal else ""
        return (
            f'<p class="facts">Each row shows how a token divides its attention{among}.{cut}</p>'
            f'<div class="map" tabindex="0" role="region" aria-label="Attention"><p class="facts">{legend}</p>'
            f"<table><thead><tr><td></td>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )

    @torch.no_grad()
    def classify(self, text: str) -> str:
        if not text.strip():
            return written("Type something first.")
        ids = self.ids(text)
        cut = f"Only the first {self.positions:,} of {len(ids):,} tokens are read." if len(ids) > self.positions else ""
        config = self.model.config
        logits = self.model(torch.tensor([ids[: self.positions]], device=self.model.device)).logits[0].float()
        names = [f'<th scope="row">{html.escape(str(config.id2label[index]))}</th>' for index in range(len(logits))]
        if config.problem_type == "regression" or len(logits) == 1:
            rows = [
                f'<tr>{name}<td class="number">{value:.4f}</td></tr>'
                for name, value in zip(names, logits.tolist(), strict=True)
            ]
            return f'<p class="facts">{cut}</p><table class="bars">{"".join(rows)}</table>'
        multiple = config.problem_type == "multi_label_classification"
        shares, order = (logits.sigmoid() if multiple else logits.softmax(-1)).sort(descending=True)
        return f'<p class="facts">{cut}</p>{bars([names[index] for index in order.tolist()], shares.tolist(), len(shares))}'


def written(content: str) -> str:
    return f'<pre class="written">{content}</pre>'


def when_stopped(note: str | None) -> str:
    """What is said of a text after a click on Stop, be it on its way, not yet begun or at its end."""
    return (note or "").replace("so far", "when it was stopped")


def numbers(*values: Any) -> list[float]:
    """What sliders say; a temperature, or another number, so small that dividing by it overflows is 0.

    Raises:
        gr.Error: a field was emptied, or holds no finite number.
    """
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise gr.Error("Each setting needs a number.", print_exception=False)
    return [value if abs(value) >= 0.001 else 0 for value in values]


def shade(weight: float) -> str:
    """An attribute that colours by weight, small ones too."""
    return f'style="--weight: {100 * weight**0.5:.0f}%"'


def bubbles(talk: list[dict[str, str]]) -> list[dict[str, str]]:
    """A conversation as a Chatbot shows it: what looks like markup to it would be lost."""
    return [{**message, "content": html.escape(message["content"])} for message in talk]


def bars(names: list[str], shares: list[float], num_strong: int) -> str:
    """A table of probabilities, the first so many not pale. Names are cells of HTML."""
    rows = [
        f'<tr class="{"" if place < num_strong else "out"}">{name}<td class="number">{share:.2%}</td>'
        f'<td class="bar"><i style="width: {share:.2%}"></i></td></tr>'
        for place, (name, share) in enumerate(zip(names, shares, strict=True))
    ]
    return f'<table class="bars">{"".join(rows)}</table>'


def sampling_controls(show: Showcase) -> list[gr.Slider]:
    """As the model's generation config says, not on the page yet."""
    config = show.model.generation_config

    def default(name: str, otherwise: float) -> float:
        value = getattr(config, name)
        return otherwise if value is None else value

    temperature = default("temperature", 1.0) if config.do_sample else 0
    new_tokens = min(default("max_new_tokens", 128), show.positions)
    return [
        gr.Slider(
            0, max(2, temperature), temperature, step=0.05, label="Temperature", info="0: always the likeliest", render=False
        ),
        gr.Slider(0, max(200, default("top_k", 50)), default("top_k", 50), step=1, label="Top-k", info="0: all", render=False),
        gr.Slider(0.05, 1, default("top_p", 1), step=0.05, label="Top-p", info="1: all", render=False),
        gr.Slider(1, 2, default("repetition_penalty", 1), step=0.05, label="Repetition penalty", info="1: none", render=False),
        gr.Slider(1, show.positions, new_tokens, step=1, label="New tokens at most", render=False),
    ]


def first_tab(show: Showcase, sampling: list[gr.Slider], text: gr.Textbox) -> None:
    """Chat, completion or classes; `text` becomes what was read and written."""
    box = gr.Textbox(render=False, autofocus=True, max_lines=12, label="Message" if show.is_chat else "Text")
    if show.is_classifier:
        with gr.Tab("Classify"):
            box.render()
            box.placeholder = "Enter classifies, Shift+Enter begins a line"
            go = gr.Button("Classify", variant="primary")
            classes = gr.HTML(apply_default_css=False)
        run = gr.on([box.submit, go.click], show.classify, box, classes, show_progress="hidden")
        run.then(lambda text: text, box, text)
        return
    with gr.Tab("Chat" if show.is_chat else "Completion"):
        state: Any = gr.State([] if show.is_chat else "")
        if show.is_chat:
            shown: Any = gr.Chatbot(label="Conversation", render_markdown=False, height="60vh", buttons=[])
            box.placeholder = "Enter sends, Shift+Enter begins a line"
        box.render()
        with gr.Row():
            go = gr.Button("Send" if show.is_chat else "Continue", variant="primary", min_width=80)
            stop = gr.Button("Stop", min_width=80)
            clear = gr.Button("Clear", min_width=80)
        if not show.is_chat:
            shown = gr.HTML(written(""), apply_default_css=False)
            box.placeholder = "The beginning of a text, or nothing. Enter continues it, Shift+Enter begins a line"
        note = gr.HTML(elem_classes="facts", apply_default_css=False)
    triggers: Any = [box.submit, go.click]
    if show.is_chat:
        run = gr.on(triggers, show.chat, [box, state, *sampling], [box, state, shown, note], show_progress="hidden")
        after: Any = show.conversation_text
    else:
        run = gr.on(triggers, show.complete, [box, *sampling], [shown, state, note], show_progress="hidden")
        after = str
    run.then(after, state, text)
    cancelled = stop.click(None, cancels=[run])  # what it had yielded by then may still be on its way to the page
    cancelled.then(lambda state, note: (after(state), when_stopped(note)), [state, note], [text, note])
    empty = ("", [], [], "") if show.is_chat else ("", "", written(""), "")
    clears: Any = [clear.click, shown.clear] if show.is_chat else [clear.click]  # a Chatbot has a button of its own
    gr.on(clears, lambda: empty, None, [box, state, shown, note], cancels=[run])


def second_tab(show: Showcase, sampling: list[gr.Slider], text: gr.Textbox, blocks: Any) -> None:
    """The same text as tokens, what comes next, and attention; each follows what it depends on."""
    config = show.model.config
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

    def follow(output: gr.HTML, make: Any, *inputs: Any) -> None:
        """Made again when one of the inputs changes, and when the page is opened."""
        triggers = [blocks.load, *(it.change for it in inputs)]
        gr.on(triggers, make, list(inputs), output, trigger_mode="always_last", show_progress="hidden")

    follow(tokens, show.tokens, text)
    follow(attention, show.attention, text, layer, head)
    if sampling:
        follow(next_tokens, show.next_tokens, text, *sampling[:3])


def page(show: Showcase) -> gr.Blocks:
    sampling = [] if show.is_classifier else sampling_controls(show)
    text = gr.Textbox(SAMPLE, label="Text", max_lines=8, render=False)
    with gr.Blocks(title=show.name) as blocks:
        gr.HTML(f'<h1>{html.escape(show.name)}</h1><p class="facts">{show.facts()}</p>', apply_default_css=False)
        with gr.Row():
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                first_tab(show, sampling, text)
                second_tab(show, sampling, text, blocks)
            if sampling:
                with gr.Column(scale=1, min_width=240):
                    for slider in sampling:
                        slider.render()
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description="A page that shows what a model does.", usage=argparse.SUPPRESS)
    parser.add_argument(
        "--model", default=os.environ.get("MODEL"), help="folder or Hub id of the model; else the variable MODEL"
    )
    parser.add_argument("--port", type=int, help="of the page on this machine; else the first free one from 7860")
    arguments = parser.parse_args()
    if not arguments.model:
        parser.error("no model is named: give its folder or Hub id by --model.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        show = Showcase(arguments.model, os.environ.get("REVISION"))
        blocks = page(show)
    except BaseException as error:  # transformers, safetensors, torch and the Hub each have their own, and tokenizers can panic
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        parser.error(f"--model {arguments.model} cannot be shown ({reason}).")
    theme = gr.themes.Default(primary_hue="blue", font=FONTS[0], font_mono=FONTS[1])
    theme.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")
    try:
        _, address, _ = blocks.launch(
            server_port=arguments.port,
            quiet=True,
            prevent_thread_lock=True,
            theme=theme,
            css_paths=Path(__file__).with_name("style.css"),
            footer_links=[],
            ssr_mode=False,
            max_file_size=0,
        )
    except OSError:
        parser.error(f"--port {arguments.port} is in use: give another.")
    print(f"{show.name} is at {address} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    main()
