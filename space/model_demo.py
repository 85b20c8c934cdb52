"""A model with its tokenizer, and what the page shows of it: generated text, tokens, probabilities and attention.

Notable:
- A model type that transformers does not have is run by the code in its repository (`trust_remote_code`): only name models
  that you trust.
- Two model objects share one set of weights: one generates with fast attention, the other returns attention weights. The
  inspection thus never disturbs a generation in progress.
- All HTML that is returned here is escaped.
"""

import copy
import html
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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
    TextIteratorStreamer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # the byte behind each character of byte-level BPE
VISIBLE_WHITESPACE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥"})
NUM_NEXT_TOKENS = 20  # rows of the next-token distribution
MAX_ATTENTION_TOKENS = 40  # rows and columns of the attention map
MAX_INSPECTED_TOKENS = 1024
MAX_SECONDS = 600  # a generation ends after this time even if the browser that asked for it is gone
EXAMPLE_TEXT = "It was the best of times, it was the worst of times"
Messages = list[dict[str, str]]


class ExactStreamer(TextIteratorStreamer):
    """Yield the whole generated text after each token, exactly as `decode` gives it.

    The parent class yields complete words and decodes every line by itself: text without spaces would not appear until its
    end, and SentencePiece tokenizers would lose the space before the first word.
    """

    def put(self, value: torch.Tensor) -> None:
        self.token_cache += value.flatten().tolist()
        text: Any = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt, self.print_len = False, len(text)
        else:
            self.on_finalized_text(text[self.print_len :])

    def end(self) -> None:
        self.text_queue.put(self.stop_signal)


class ModelDemo:
    """A model with its tokenizer, and the functions behind the page.

    Raises:
        ValueError: the directory does not exist, the model is of another kind, or weights are missing.
        Exception: transformers, safetensors, tokenizers and the Hub raise errors of their own for a model they cannot load.
    """

    def __init__(self, name: str, revision: str | None):
        path = Path(name)
        if not path.is_dir() and (path.is_absolute() or path.exists() or (path.parent != Path() and path.parent.is_dir())):
            raise ValueError("no such directory")
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        code = {"trust_remote_code": "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING}
        architecture = (config.get("architectures") or [""])[0]
        self.is_classifier = architecture.endswith("ForSequenceClassification")
        if not self.is_classifier and not architecture.endswith(("ForCausalLM", "LMHeadModel")):
            raise ValueError(f"{architecture or 'a config without architectures'} is no language model or text classifier")
        auto_class: Any = AutoModelForSequenceClassification if self.is_classifier else AutoModelForCausalLM
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype: Any = "auto" if device == "cuda" else torch.float32
        model, report = auto_class.from_pretrained(name, revision=revision, dtype=dtype, output_loading_info=True, **code)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"missing weights: {', '.join(missing[:3])}")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision, **code)
        self.model: Any = model.to(device).eval()
        self.eager_model: Any = copy.deepcopy(self.model, {id(weight): weight for weight in self.model.parameters()})
        self.eager_model.set_attn_implementation("eager")
        self.name = path.name if path.is_dir() else name
        positions = getattr(self.model.config, "max_position_embeddings", MAX_INSPECTED_TOKENS)
        self.context_length: int = min(positions, self.tokenizer.model_max_length)  # RoBERTa reserves two of its positions
        self.is_chat = not self.is_classifier and bool(self.tokenizer.chat_template)
        self.is_byte_level = "ByteLevel" in repr(self.tokenizer.backend_tokenizer.decoder)

    def summary(self) -> str:
        config = self.model.config
        return (
            f"{self.model.num_parameters():,} parameters · {config.num_hidden_layers} layers with {config.num_attention_heads} "
            f"heads each · context of {self.context_length:,} tokens · vocabulary of {config.vocab_size:,}"
        )

    def encode(self, text: str) -> list[int]:
        """Encode a text. The text of a chat already contains the special tokens, written by the chat template."""
        return self.tokenizer(text, add_special_tokens=not self.is_chat)["input_ids"]

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a text; an empty one becomes the BOS token, if the tokenizer has one."""
        return self.encode(text) or [token for token in (self.tokenizer.bos_token_id,) if token is not None]

    def encode_truncated(self, text: str) -> tuple[list[int], str]:
        """Encode as much of a text as the model and the page can hold, with a note on its length."""
        ids, limit = self.encode_prompt(text), min(self.context_length, MAX_INSPECTED_TOKENS)
        if len(ids) <= limit:
            return ids, f"{len(ids):,} tokens for {len(text):,} characters."
        holder = "the context of the model holds" if limit == self.context_length else "this page shows at most"
        return ids[:limit], f"The text has {len(ids):,} tokens, but {holder} {limit:,}: the rest is left out."

    def render_conversation(self, conversation: Messages) -> str:
        """Apply the chat template, without the prompt for a next answer."""
        return self.tokenizer.apply_chat_template(conversation, tokenize=False) if conversation else EXAMPLE_TEXT

    def length_error(self, length: int) -> str:
        """Explain why nothing can be generated after a prompt of this many tokens; empty if it can."""
        if not length:
            return "Type something first: this model has no BOS token to start from."
        if length < self.context_length:
            return ""
        return f"The text has {length:,} tokens, but the context of the model holds {self.context_length:,}: shorten it."

    def token_html(self, index: int) -> str:
        """A token in readable form: white space is marked, incomplete UTF-8 and control characters are escape sequences."""
        token = self.tokenizer.convert_ids_to_tokens(index)
        if token is None:  # the embedding may have more rows than the tokenizer has tokens
            return "(none)"
        if self.is_byte_level and BYTES.keys() >= set(token):
            text = bytes(BYTES[character] for character in token).decode("utf-8", "backslashreplace")
        else:
            text = token.replace("▁", " ")
        text = text.translate(VISIBLE_WHITESPACE)
        return html.escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))

    def generate(self, ids: list[int], *sampling: Any) -> Iterator[tuple[str, str]]:
        """Yield the text generated so far and a note on its length, after each token. Closing the iterator stops the model."""
        temperature, top_k, top_p, repetition_penalty, max_new_tokens = validate_numbers(*sampling)
        config = GenerationConfig(  # what is not set here is taken from the model's own
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_k": int(top_k), "top_p": top_p} if temperature else {}),
            repetition_penalty=float(repetition_penalty),
            max_new_tokens=min(int(max_new_tokens), self.context_length - len(ids)),
            max_time=MAX_SECONDS,
            num_beams=1,
        )
        inputs, stopped = torch.tensor([ids], device=self.model.device), Event()
        streamer = ExactStreamer(self.tokenizer, skip_special_tokens=True)
        stopping_criteria = [lambda ids, *_, **__: torch.full((1,), stopped.is_set(), device=ids.device)]
        options = {"generation_config": config, "streamer": streamer, "stopping_criteria": stopping_criteria}

        def run() -> None:
            try:
                self.model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
            finally:
                streamer.end()  # an error must end the iteration, too

        start, text, count = time.perf_counter(), "", 0
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(run)
            try:
                for count, text in enumerate(streamer, 1):
                    yield text.rstrip("�"), f"{count:,} tokens so far"  # the bytes of a character may be several tokens
                done.result()
                yield text, f"{count:,} tokens in {time.perf_counter() - start:.1f} seconds"
            finally:
                stopped.set()

    def complete(self, prompt: str, _: str, *sampling: Any) -> Iterator[tuple[str, str, str, str]]:
        """Yield the prompt, the prompt with its completion, the same as HTML, and a note."""
        ids = self.encode_prompt(prompt)
        prompt_html = f'<span class="prompt">{html.escape(prompt)}</span>'
        if error := self.length_error(len(ids)):
            yield prompt, prompt, preformatted(prompt_html), error
            return
        for new, note in self.generate(ids, *sampling):
            yield prompt, prompt + new, preformatted(prompt_html + html.escape(new)), note

    def chat(self, message: str, conversation: Messages, *sampling: Any) -> Iterator[tuple[str, Messages, Messages, str]]:
        """Yield the content of the message box, the conversation, the same as the Chatbot shows it, and a note."""
        extended = [*conversation, {"role": "user", "content": message}]
        ids, num_dropped = self.encode_conversation(extended, max_new_tokens=validate_numbers(*sampling)[-1])
        if error := self.length_error(len(ids)) if message.strip() else "Type something first.":
            yield message, conversation, escape_messages(conversation), error
            return
        yield "", extended, escape_messages(extended), ""
        dropped = f"; the first {num_dropped} messages no longer fit in the context" if num_dropped else ""
        for new, note in self.generate(ids, *sampling):
            answered = [*extended, {"role": "assistant", "content": new}]
            yield "", answered, escape_messages(answered), note + dropped

    def encode_conversation(self, conversation: Messages, max_new_tokens: float) -> tuple[list[int], int]:
        """Encode a conversation with room for an answer, and count the old messages that are dropped to make this room."""
        for start in range(0, len(conversation), 2):
            ids = self.tokenizer.apply_chat_template(conversation[start:], add_generation_prompt=True)["input_ids"]
            if len(ids) + max_new_tokens <= self.context_length:
                break
        return ids, start

    def tokens(self, text: str) -> str:
        ids, note = self.encode_truncated(text)
        special = set(self.tokenizer.all_special_ids)
        items = [
            f'<li class="{"special" if index in special else ""}"><b>{self.token_html(index)}</b><small>{index}</small></li>'
            for index in ids
        ]
        return f'<p class="facts">{note}</p><ol class="tokens">{"".join(items)}</ol>'

    @torch.no_grad()
    def next_tokens(self, text: str, temperature: float, top_k: float, top_p: float) -> str:
        """The next-token distribution, with the tokens that top-k and top-p exclude greyed out."""
        ids, _ = self.encode_truncated(text)
        temperature, top_k, top_p = validate_numbers(temperature, top_k, top_p)
        if not ids:
            return preformatted(self.length_error(0))
        logits = self.eager_model(torch.tensor([ids], device=self.eager_model.device), logits_to_keep=1).logits[0, -1].float()
        probabilities, order = (logits / (temperature or 1)).softmax(-1).sort(descending=True)
        top = probabilities[: int(top_k) or None]
        num_kept = int((top.cumsum(0) - top < top_p * top.sum()).sum()) if temperature else 1
        note = f"{num_kept:,} of {len(logits):,} tokens can be sampled at temperature {temperature:g}; the others are pale."
        if not temperature:
            note = "At temperature 0 the most likely token is taken; the probabilities are those at temperature 1."
        shown = order[:NUM_NEXT_TOKENS].tolist()
        names = [f'<th scope="row">{self.token_html(index)}</th><td class="number">{index}</td>' for index in shown]
        return f'<p class="facts">{note}</p>{probability_table(names, probabilities[: len(shown)].tolist(), num_kept)}'

    @torch.no_grad()
    def attention(self, text: str, layer: int, head: int) -> str:
        """The attention weights of one head as a heat map."""
        ids, _ = self.encode_truncated(text)
        if not ids:
            return preformatted(self.length_error(0))
        layer, head = map(int, validate_numbers(layer, head))
        shown = ids[:MAX_ATTENTION_TOKENS]  # in a causal model, later tokens do not change the weights of these
        outputs = self.eager_model(torch.tensor([shown], device=self.eager_model.device), output_attentions=True)
        weights = outputs.attentions[layer][0, head]
        is_causal = not weights.triu(1).any()
        names = [self.token_html(index) for index in shown]
        rows = []
        for row, (name, row_weights) in enumerate(zip(names, weights.tolist(), strict=True)):
            cells = [
                f'<td title="{name} attends to {names[column]}: {weight:.2%}" {heat_style(weight)}></td>'
                for column, weight in enumerate(row_weights[: row + 1 if is_causal else None])
            ]
            rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
        columns = "".join(f'<th scope="col">{name}</th>' for name in names)
        legend = "".join(f"<i {heat_style(weight)}></i>{weight:.0%}" for weight in (0, 0.04, 0.25, 1))
        targets = "itself and the tokens before it" if is_causal else "all tokens"
        cut = f" Only the first {len(shown)} of {len(ids):,} tokens are shown." if len(shown) < len(ids) else ""
        return (
            f'<p class="facts">Each row shows how a token divides its attention between {targets}.{cut}</p>'
            f'<div class="map" tabindex="0" role="region" aria-label="Attention"><p class="facts">{legend}</p>'
            f"<table><thead><tr><td></td>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )

    @torch.no_grad()
    def classify(self, text: str) -> str:
        """The probability of each class, or the values that a regression model predicts."""
        if not text.strip():
            return preformatted("Type something first.")
        ids, limit = self.encode(text), self.context_length
        cut = f"Only the first {limit:,} of {len(ids):,} tokens are read." if len(ids) > limit else ""
        config = self.model.config
        logits = self.model(torch.tensor([ids[:limit]], device=self.model.device)).logits[0].float()
        names = [f'<th scope="row">{html.escape(str(config.id2label[index]))}</th>' for index in range(len(logits))]
        if config.problem_type == "regression" or len(logits) == 1:
            rows = [f'<tr>{name}<td class="number">{value:.4f}</td></tr>' for name, value in zip(names, logits, strict=True)]
            return f'<p class="facts">{cut}</p><table class="bars">{"".join(rows)}</table>'
        multiple = config.problem_type == "multi_label_classification"
        values, order = (logits.sigmoid() if multiple else logits.softmax(-1)).sort(descending=True)
        return f'<p class="facts">{cut}</p>{probability_table([names[i] for i in order.tolist()], values.tolist(), len(names))}'


def preformatted(content: str) -> str:
    return f'<pre class="written">{content}</pre>'


def stopped_note(note: str | None) -> str:
    """The note after a click on Stop, whether the generation was running, had not begun or was complete."""
    return (note or "").replace(" so far", " before it was stopped")


def validate_numbers(*values: Any) -> list[float]:
    """Check the values of sliders. Values below 0.001 become 0: dividing logits by a tiny temperature would overflow.

    Raises:
        gr.Error: a field is empty or not a finite number.
    """
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise gr.Error("Each setting needs a number.", print_exception=False)
    return [value if abs(value) >= 0.001 else 0 for value in values]


def heat_style(weight: float) -> str:
    """The colour of a weight in the heat map; the square root makes small weights visible."""
    return f'style="--weight: {100 * weight**0.5:.0f}%"'


def escape_messages(conversation: Messages) -> Messages:
    """Escape a conversation for the Chatbot, which removes HTML even without `render_markdown`."""
    return [{**message, "content": html.escape(message["content"])} for message in conversation]


def probability_table(names: list[str], probabilities: list[float], num_kept: int) -> str:
    """A table with bars; rows from `num_kept` on are greyed out. `names` are HTML cells."""
    rows = [
        f'<tr class="{"" if row < num_kept else "out"}">{name}<td class="number">{probability:.2%}</td>'
        f'<td class="bar"><i style="width: {probability:.2%}"></i></td></tr>'
        for row, (name, probability) in enumerate(zip(names, probabilities, strict=True))
    ]
    return f'<table class="bars">{"".join(rows)}</table>'
