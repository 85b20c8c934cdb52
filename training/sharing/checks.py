"""What of a folder may be shared: the files that belong to the model, and what must be true of them before they leave.

Notable:
- Only files of known names are sent: no checkpoint, no optimizer state, no log, nothing hidden, no folder inside.
- The model's code is run only if it is this package's, byte for byte, or if it is trusted; in a process of its own, in which
  this package cannot be imported: what loads there loads for others.
- What leaks.py finds stops everything.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

import modeling_scratchgpt
from training.engine.checkpoints import METRICS
from training.engine.report import CURVE
from training.errors import UserError, one_line
from training.results.cards import BASE, CARD, HERE, SCORES
from training.results.classification_report import MISTAKES, PICTURE
from training.results.responses import PAGE, RESPONSES
from training.sharing.leaks import SECRET_NAMES, Files

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)
RESULTS = (CURVE, METRICS, SCORES, PICTURE, MISTAKES, RESPONSES, PAGE)
FILES = (CARD, "LICENSE", CONFIG, "generation_config.json", ADAPTER_CONFIG, *WEIGHTS, *TOKENIZER, *RESULTS)
LOADING_SECONDS = 1800

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
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        return "its tokenizer has special tokens alone"
    if max(tokenizer.get_vocab().values()) >= config.vocab_size:
        return f"its tokenizer has {len(tokenizer):,} tokens, the model rows for {config.vocab_size:,}"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ours, theirs = getattr(config, name, None), getattr(tokenizer, name)
        if ours is not None and theirs is not None and ours != theirs:
            return f"{name} is {ours} in config.json and {theirs} in the tokenizer"
    if tokenizer.chat_template:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
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
        what = "holds a run that did not finish" if (folder / METRICS).is_file() else f"holds no {CONFIG}"
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
    if not path.is_file():
        raise UserError(f"{path} is missing: a model is shared with a card. Write one, of what it is and how it was made.")
    try:
        card = ModelCard(_text(path).replace(BASE, base_model or BASE).replace(HERE, repository))
        if license:
            card.data["license"] = license
        head = card.data.to_dict()
        if not head.get("license"):
            raise UserError(f"{path} names no licence: pass --license apache-2.0, or another.")
        if named := base_model or head.get("base_model"):
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(named)):
                raise UserError(
                    f"{path} names {named!r:.80} as the base of this model, which is no place on the Hub: upload that, and "
                    "pass --base_model USER/NAME."
                )
            card.data["base_model"] = named
        return str(card).encode()
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: its head is not one that a card can have ({one_line(error)}).") from error


def prepared_adapter_config(folder: Path, base_model: str) -> bytes:
    """The adapter's config as it is sent: with its base on the Hub instead of a folder here."""
    return json.dumps({**_json(folder / ADAPTER_CONFIG), "base_model_name_or_path": base_model}, indent=2).encode()


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
                try:
                    Path(sent, name).symlink_to(file.resolve())
                except OSError:  # Windows allows links to few
                    shutil.copy(file, Path(sent, name))
        environment = {name: value for name, value in os.environ.items() if not SECRET_NAMES.search(name)}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": cache}
        command = [sys.executable, "-c", LOADS, sent]
        try:
            process = subprocess.run(
                command, env=environment, cwd=cache, capture_output=True, text=True, errors="replace", timeout=LOADING_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"{folder} would not work for others: it does not load in {LOADING_SECONDS // 60} minutes."
            ) from error
    said = process.stderr if process.returncode else process.stdout
    wrong = said.rstrip("\n").rpartition("\n")[2].replace(sent, str(folder))
    if wrong or process.returncode:
        raise UserError(f"{folder} would not work for others: {wrong or f'loading it ends with code {process.returncode}'}.")


def _known_files(folder: Path) -> dict[str, Path]:
    """Those of known names, of which the JSON is JSON, and none lies elsewhere but where the Hub's cache has it."""
    files = {path.name: path for path in sorted(folder.iterdir()) if any(fnmatch(path.name, known) for known in FILES)}
    for path in files.values():
        _refuse_elsewhere(path)
        if path.suffix == ".json":
            _json(path)
    return files


def _refuse_elsewhere(path: Path) -> None:
    """Refuse a link out of its folder, but for those of the Hub's cache, and what is no file at all."""
    folder = path.parent.resolve()
    if path.resolve().parent not in (folder, folder.parent.parent / "blobs"):
        raise UserError(f"{path} is a link to outside of the folder: put the file itself there, or take the link out.")
    if not path.is_file():
        raise UserError(f"{path} is no file: put one there, or take it out.")


def _json(path: Path) -> dict[str, Any]:
    """What a file holds as one JSON object."""
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}): save the model again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: save the model again.")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}).") from error


def _code_of(folder: Path, trust_remote_code: bool) -> dict[str, Path]:
    """The files of the model's own code: those that its configs name, and what these import of their neighbours."""
    waiting = set[str]()
    for name in (CONFIG, "tokenizer_config.json"):
        auto_map = _json(folder / name).get("auto_map") if (folder / name).exists() else None
        for places in (auto_map or {}).values() if isinstance(auto_map or {}, dict) else [auto_map]:
            named = places if isinstance(places, list) else [places]  # of a tokenizer: the slow one and the fast one
            waiting |= {str(place).partition(".")[0] for place in named if place}
    found = set[Path]()
    while waiting:
        module = waiting.pop()
        path = folder / f"{module}.py"
        if path in found:
            continue
        if not re.fullmatch(r"\w{1,100}", module) or not path.exists():
            raise UserError(f"{path} is missing, which the model's config asks for: save the model again.")
        _refuse_elsewhere(path)
        try:
            waiting |= set(get_relative_imports(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}).") from error
        found.add(path)
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
