"""What of a folder may be shared: the files that belong to the model, and what must be true of them before they leave.

Notable:
- Only files of known names are sent: no checkpoint, no optimizer state, no log, nothing hidden, no folder inside.
- The model's code is run only if it is this package's, byte for byte, or if it is trusted; in a process of its own, in which
  this package cannot be imported: what loads there loads for others.
- A secret, or a path of this machine, stops everything and is not repeated.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, get_token
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_scratchgpt
from training.arguments import UserError, one_line
from training.cards import BASE, CARD, HERE

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER = ("tokenizer*.json", "*tokens*.json", "vocab.json", "merges.txt", "chat_template.jinja")
RESULTS = ("loss.png", "predictions.png", "mistakes.md", "metrics.json", "metrics.jsonl", "responses.jsonl", "responses.md")
FILES = (CARD, "LICENSE", CONFIG, "generation_config.json", ADAPTER_CONFIG, *WEIGHTS, *TOKENIZER, *RESULTS)
SECRET = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\bsk-[\w-]{20,}|\bgh[pousr]_\w{30,}|\bgithub_pat_\w{30,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abpr]-[\w-]{10,}"
    rb"|\bAIza[\w-]{35}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
SECRET_NAMES = re.compile("(TOKEN|KEY|SECRET|PASSWORD)$")

Files = Mapping[str, Path | bytes]  # what is sent: files, or what stands in them

# Run where neither of our packages can be imported. Says on its last line what is wrong, or nothing.
LOADS = """
import importlib.abc, json, sys

class NotHere(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_scratchgpt", "training"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotHere())
import torch
import transformers

def problem(folder):
    how = {"trust_remote_code": True, "local_files_only": True}
    config = transformers.AutoConfig.from_pretrained(folder, **how)
    (architecture,) = config.architectures
    kinds = {it.rpartition(".")[2]: name for name, it in getattr(config, "auto_map", {}).items()}
    auto = getattr(transformers, kinds[architecture] if kinds else architecture)
    model, report = auto.from_pretrained(folder, output_loading_info=True, **({} if not kinds else how))
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            return f"{what.replace('_', ' ')} in its weights: {', '.join(map(str, sorted(report[what])[:3]))}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **how)
    if max(tokenizer.get_vocab().values()) >= config.vocab_size:
        return f"its tokenizer has {len(tokenizer):,} tokens, the model rows for {config.vocab_size:,}"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ours, theirs = getattr(config, name, None), getattr(tokenizer, name)
        if ours is not None and theirs is not None and ours != theirs:
            return f"{name} is {ours} in config.json and {theirs} in the tokenizer"
    batch = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    return "" if torch.isfinite(logits).all() else "what it says of a text is not finite"

print("\\n" + problem(sys.argv[1]))
"""


def model_files(folder: Path, trust_remote_code: bool) -> dict[str, Path]:
    """The files of a model that may be sent, by name.

    Raises:
        UserError: it is no finished model, or its code is not all there, or not to be trusted.
    """
    if not (folder / CONFIG).is_file():
        what = "holds a run that did not finish" if (folder / "metrics.jsonl").is_file() else f"holds no {CONFIG}"
        raise UserError(f"{folder} {what}: give the folder of a finished model.")
    return _known_files(folder) | _code_of(folder, trust_remote_code)


def adapter_files(folder: Path, trust_remote_code: bool) -> dict[str, Path]:
    """The same of an adapter, its tokenizer's code included."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder} holds no {ADAPTER_CONFIG}: give the folder of a run with --lora_r, or that of an adapter.")
    return _known_files(folder) | _code_of(folder, trust_remote_code)


def prepared_card(folder: Path, repository: str, base_model: str, license: str) -> bytes:
    """The card as it is sent: with the places of the model and of its base filled in, and its licence if one is given.

    Raises:
        UserError: there is none, its head cannot be read, or it does not name the licence, or the base on the Hub.
    """
    path = folder / CARD
    try:
        card = ModelCard(path.read_text(encoding="utf-8").replace(BASE, base_model or BASE).replace(HERE, repository))
        if license:
            card.data["license"] = license
        head = card.data.to_dict()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: a model is shared with a card, and there is none to read ({one_line(error)}).") from error
    if not head.get("license"):
        raise UserError(f"{path} names no licence: pass --license apache-2.0, or another.")
    if named := base_model or head.get("base_model"):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(named)):
            raise UserError(
                f"{path} names {named!r:.80} as the base of this model, which is no place on the Hub: upload that, and pass "
                "--base_model USER/NAME."
            )
        card.data["base_model"] = named
    return str(card).encode()


def prepared_adapter_config(folder: Path, base_model: str) -> bytes:
    """The adapter's config as it is sent: with its base on the Hub instead of a folder here."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return json.dumps({**config, "base_model_name_or_path": base_model}, indent=2).encode()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / ADAPTER_CONFIG} cannot be read ({one_line(error)}).") from error


def check_secrets(files: Files) -> None:
    """Refuse what holds a token, a key, or a path of this machine.

    Raises:
        UserError: one does; it is named, and what it holds is not repeated.
    """
    own = {value.encode() for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) >= 8}
    own |= {token.encode()} if (token := get_token()) else set()
    places = {Path.home(), Path.cwd(), *(it.resolve().parents[1] for it in files.values() if isinstance(it, Path))}
    folders = {f"{place}/".encode() for place in places} - {b"//", b"/root/", b"/home/", b"/tmp/"}
    for name, file in files.items():
        content = file if isinstance(file, bytes) else _text_of(file)
        if SECRET.search(content) or any(secret in content for secret in own):
            raise UserError(f"{name} holds what looks like a token or a key, so nothing was sent: take it out, and renew it.")
        if any(folder in content for folder in folders):
            raise UserError(f"{name} holds a path of this machine, so nothing was sent: take it out.")


def check_weights(folder: Path, files: Files) -> None:
    """Refuse weights that are not there, cannot be read, or hold numbers that are not finite."""
    weights = [folder / name for name in files if name.endswith(".safetensors")]
    if not weights:
        raise UserError(f"{folder} holds no weights as safetensors: save the model again, with `save_pretrained`.")
    for path in weights:
        try:
            with safe_open(path, framework="pt") as tensors:
                names = tensors.keys()
                for name in names:
                    tensor = tensors.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        raise UserError(f"{path}: {name} holds numbers that are not finite: this model is broken.")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}).") from error


def check_loads(folder: Path, files: Files) -> None:
    """Refuse a model that somebody else could not load and use. Loaded is what is sent, and no other code of the folder.

    Raises:
        UserError: it does not load, its tokenizer is another model's, or what it says is not finite.
    """
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as sent:
        for name, file in files.items():
            if isinstance(file, Path):
                Path(sent, name).symlink_to(file.resolve())
        environment = {name: value for name, value in os.environ.items() if not SECRET_NAMES.search(name)}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": cache}
        process = subprocess.run(
            [sys.executable, "-c", LOADS, sent], env=environment, cwd=cache, capture_output=True, text=True
        )
    wrong = (
        (process.stderr if process.returncode else process.stdout).rstrip("\n").rpartition("\n")[2].replace(sent, str(folder))
    )
    if wrong or process.returncode:
        raise UserError(f"{folder} would not work for others: {wrong or f'loading it ends with code {process.returncode}'}.")


def _known_files(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.iterdir() if path.is_file() and any(fnmatch(path.name, it) for it in FILES))
    return {path.name: path for path in paths}


def _code_of(folder: Path, trust_remote_code: bool) -> dict[str, Path]:
    """The files of the model's own code: those that its configs name, and what these import of their neighbours."""
    named = set()
    for name in (CONFIG, "tokenizer_config.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
            for places in content.get("auto_map", {}).values():
                named |= {place.partition(".")[0] for place in (places if isinstance(places, list) else [places]) if place}
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / name} cannot be read ({one_line(error)}).") from error
    found = set()
    for module in named:
        path = folder / f"{module}.py"
        try:
            found |= {path, *map(Path, get_relative_import_files(path))}
        except OSError as error:
            raise UserError(f"{error.filename} is missing, which the model's config asks for: save the model again.") from error
    own = Path(modeling_scratchgpt.__file__).parent
    changed = sorted(path.name for path in found if not _same(path, own / path.name))
    if changed and not trust_remote_code:
        raise UserError(
            f"{folder}: {', '.join(changed)} is not the code of this package: load the model and save it again, or, if you "
            "have read it and trust it, pass --trust_remote_code."
        )
    return {path.name: path for path in found}


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _text_of(path: Path) -> bytes:
    """What a file says in words: all of it, of weights the header."""
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            return file.read(min(100_000_000, int.from_bytes(file.read(8), "little")))
        return file.read()
