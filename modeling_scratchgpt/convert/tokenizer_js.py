"""Tokenizers for transformers.js 4.3, which must compute the same ids there as here.

Notable:
- Some pre-tokenizers have JavaScript's idea of white space and letters there: `\\s` lacks U+0085 and has U+FEFF, and the `\\w`
  of `Whitespace` is ASCII. But the patterns of `Split` are translated: these parts are written as `Split`, with the same ids.
"""

import json
import re
import sys
import unicodedata
from functools import cache
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import TokenizersBackend

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORD = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}" + "\u200c\u200d"
FINAL_SIGMA = {"type": "Replace", "pattern": {"String": "Σ"}, "content": "σ"}  # JavaScript makes it ς at the end of a word
FLAGS = re.compile(r"\(\?[a-z-]+\)")  # of the rest of a pattern; those of a group are understood
SAME = {  # tested to compute the same, as written here
    "normalizer": {"Lowercase", "NFC", "Prepend", "Replace"},
    "pre_tokenizer": {"BertPreTokenizer", "ByteLevel", "Metaspace", "Split", "Whitespace"},
    "model": {"BPE", "Unigram", "WordLevel", "WordPiece"},
    "post_processor": {"ByteLevel", "TemplateProcessing"},
    "decoder": {"ByteLevel", "Fuse", "Metaspace", "WordPiece"},
}


def check_tokenizer_js(tokenizer: Any) -> None:
    """Check that transformers.js can compute the same ids.

    Raises:
        ValueError: it would not, or that is not known; the message names the part of `tokenizer.json`.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    found = [f"{part} {each['type']}" for part in SAME for each in _parts(content[part]) if each["type"] not in SAME[part]]
    words = _parts(content["pre_tokenizer"])
    splits = [each for each in words if each["type"] == "Split"]
    found += [f"Split {each['behavior']}" for each in splits if each["behavior"] not in ("Isolated", "Removed")]
    found += ["inverted Split" for each in splits if each["invert"] and each["behavior"] == "Isolated"]
    found += [f"flag in {pattern}" for each in splits if FLAGS.search(pattern := each["pattern"].get("Regex", ""))]
    found += ["add_prefix_space" for each in words if each.get("add_prefix_space")]
    found += [f"the model's {name}" for name in ("byte_fallback", "dropout") if content["model"].get(name)]
    flags = ("single_word", "lstrip", "rstrip")
    found += [f"{name} of {token['content']}" for token in content["added_tokens"] for name in flags if token[name]]
    found += ["split_special_tokens"] if tokenizer.split_special_tokens else []
    if found:
        raise ValueError(f"transformers.js does not compute the ids of this tokenizer as Python does: it has {found[0]}.")


def as_tokenizer_js(tokenizer: TokenizersBackend) -> TokenizersBackend:
    """Rewrite a tokenizer, which `check_tokenizer_js` has accepted, for transformers.js; its ids stay the same."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizers, words = _parts(content["normalizer"]), []
    for each in _parts(content["pre_tokenizer"]):
        match each["type"]:
            case "ByteLevel" if each["use_regex"]:
                words += [_split(GPT2_SPLIT), {**each, "use_regex": False}]
            case "Whitespace":
                words.append(_split(rf"[{WORD}]+|[^{WORD}\s]+"))
            case "BertPreTokenizer":
                words.append(_split(rf"[^{bert_punctuation()}\s]+|[{bert_punctuation()}]"))
            case _:
                words.append(each)
    normalizers = [part for each in normalizers for part in ([FINAL_SIGMA] if each["type"] == "Lowercase" else []) + [each]]
    content["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": words} if words else None
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    if tokenizer.chat_template is None:
        tokenizer.init_kwargs.pop("chat_template", None)  # onnxruntime-genai does not read null
    return tokenizer


def _parts(content: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a normalizer, a pre-tokenizer and so on, which may be a sequence of sequences."""
    if content is None or content["type"] != "Sequence":
        return [] if content is None else [content]
    return [part for value in content.values() if isinstance(value, list) for each in value for part in _parts(each)]


def _split(pattern: str) -> dict[str, Any]:
    """Keep the matches of a pattern, and drop what is between them."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}


@cache
def bert_punctuation() -> str:
    """All that `BertPreTokenizer` takes for punctuation, by an old table of Unicode: the inside of a character class."""
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    marks = [char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(char)[0] in "PS"]
    return "".join(f"\\{char}" if char.isascii() else char for char in marks if len(split(f"a{char}")) == 2)
