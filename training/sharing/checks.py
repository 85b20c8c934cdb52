"""Select the files of a model directory that are uploaded, and check that they work for others.

Notable:
- Only files with known names are uploaded: no checkpoints, optimizer states, logs, hidden files or subdirectories.
- The model's code is run only if it equals this package's, byte for byte, or if it is trusted. It runs in a process that cannot
  import this package: a model that loads there loads for others.
- Secrets and local paths (leaks.py) stop the upload.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from filecmp import cmpfiles
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

import modeling_scratchgpt
from training.engine.run_folder import CARD, CURVE, METRICS, MISTAKES, PREDICTIONS, RESPONSES, RESPONSES_PAGE, SCORES
from training.errors import UserError, explain_errors
from training.results.cards import BASE_PLACEHOLDER, MODEL_PLACEHOLDER
from training.sharing.leaks import SECRET_NAMES, Files

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS = {
    CONFIG: ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    ADAPTER_CONFIG: ("adapter_model.safetensors",),
}
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)
RESULTS = (CURVE, METRICS, SCORES, PREDICTIONS, MISTAKES, RESPONSES, RESPONSES_PAGE)
FILES = (CARD, "generation_config.json", *TOKENIZER, *RESULTS)  # of a model or an adapter
CODE = [path.name for path in Path(modeling_scratchgpt.__file__).parent.glob("[a-z]*.py")]
UPLOADED = (*CODE, *FILES, *WEIGHTS, *sum(WEIGHTS.values(), ()))  # what an earlier upload may have left
SET_BY_UPLOAD = ("model-index", "base_model", "library_name", "pipeline_tag", "sdk", "sdk_version", "app_file", "models")
# What --space adds to a card, between comments.
PAGE_TAG, PAGE_START, PAGE_END = "transformers.js", "<!-- about the page: -->", "<!-- end of what is about the page -->"
PAGE = re.compile(rf"\s*{PAGE_START}((?!{PAGE_START}).)*?{PAGE_END}\s*", re.DOTALL)
LOAD_SECONDS = 1800

# Run in a process of its own. The last line of its output is the problem found, or empty.
LOAD_PROGRAM = """
import sys

sys.modules["modeling_scratchgpt"] = sys.modules["training"] = None  # importing them raises ModuleNotFoundError
import torch
import transformers

def find_problem(directory):
    options = {"trust_remote_code": True, "local_files_only": True}
    config = transformers.AutoConfig.from_pretrained(directory, **options)
    architecture = ", ".join(config.architectures or [])
    auto_classes = {path.rpartition(".")[2]: name for name, path in getattr(config, "auto_map", {}).items()}
    auto_class = getattr(transformers, auto_classes.get(architecture, architecture), None)
    if auto_class is None:
        return f"architectures in config.json is {config.architectures}, not a class of its auto_map or of transformers"
    model, report = auto_class.from_pretrained(directory, output_loading_info=True, **(options if auto_classes else {}))
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            return f"{problem.replace('_', ' ')} in its weights: {', '.join(map(str, sorted(report[problem])[:3]))}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **options)
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        return "its tokenizer has only special tokens"
    if max(tokenizer.get_vocab().values()) >= config.vocab_size:
        return f"its tokenizer has {len(tokenizer):,} tokens, but its vocab_size is {config.vocab_size:,}"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        of_config, of_tokenizer = getattr(config, name, None), getattr(tokenizer, name)
        if of_config is not None and of_tokenizer is not None and of_config != of_tokenizer:
            return f"{name} is {of_config} in config.json and {of_tokenizer} in the tokenizer"
    if tokenizer.chat_template:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    with torch.no_grad():
        output = model.eval()(**tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False))
    return "" if torch.isfinite(output[0]).all() else "its logits are not finite"

print("\\n" + find_problem(sys.argv[1]))
"""


def check_repo_id(name: Any, source: str, remedy: str = "pass USER/NAME") -> None:
    """Refuse a name that is not a Hub id with a user.

    Raises:
        UserError: `source`, which gives the name, needs another one.
    """
    with explain_errors(f"{source} {name!r:.80} is not a Hub id", HFValidationError, f": {remedy}"):
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("the user is missing")


def model_files(directory: Path, trust_remote_code: bool, config: str = CONFIG) -> dict[str, Path]:
    """Select the files to upload, by name: those of a model, or with `config=ADAPTER_CONFIG` those of an adapter.

    Raises:
        UserError: the run has not finished, a file is missing or invalid, or the model's code is not trusted.
    """
    if not (directory / config).is_file():
        needed = "a finished model" if config == CONFIG else "an adapter, or of a run with --lora_r"
        is_unfinished = config == CONFIG and (directory / METRICS).is_file()
        problem = "holds an unfinished run" if is_unfinished else f"has no {config}"
        raise UserError(f"{directory} {problem}: pass the directory of {needed}.")
    known = (config, *WEIGHTS[config], "LICENSE", *FILES)
    files = {path.name: path for path in sorted(directory.iterdir()) if any(fnmatch(path.name, it) for it in known)}
    for path in files.values():
        _check_regular_file(path)
        if path.suffix == ".json":
            _read_json(path)
    return files | _code_files(directory, trust_remote_code, config)


def prepare_card(directory: Path, repository: str, base_model: str, license: str) -> bytes:
    """Fill in the Hub ids of the model and of its base, and the license if one is given.

    Raises:
        UserError: the card is missing, its metadata is invalid, or it names no license or no base on the Hub.
    """
    path = directory / CARD
    if not path.is_file():
        raise UserError(f"{path} is missing: write a model card that says what the model is and how it was trained.")
    invalid = (ValueError, TypeError, RecursionError, yaml.YAMLError)
    with explain_errors(f"{path}: its metadata is not that of a model card", invalid):
        text = _read_text(path).removeprefix("\ufeff").replace(BASE_PLACEHOLDER, base_model or BASE_PLACEHOLDER)
        card = ModelCard(text.replace(MODEL_PLACEHOLDER, repository))  # after the other, which contains it
        if license:
            card.data["license"] = license
        if not card.data.get("license"):
            raise UserError(f"{path} names no license: pass --license apache-2.0, or another.")
        if base := base_model or card.data.get("base_model"):
            check_repo_id(base, f"{path}: base_model", "upload the base model and pass --base_model USER/NAME")
            card.data["base_model"] = base
        return str(card).encode()


def add_page(card: Any, usage: str, repository: str, directory: str) -> bytes:
    """Add a link to the page below the title of the card, and how to use the export in a directory, whose card is `usage`."""
    snippet = usage.partition("```js\n")[2].replace("PATH_OR_HUB_ID", repository).replace("## Size", "### Size")
    model_card = ModelCard(card.decode())
    model_card.data["tags"] = [*(model_card.data.get("tags") or []), PAGE_TAG]
    link = f"[Try it in your browser.](https://huggingface.co/spaces/{repository})"
    model_card.text = re.sub("^# .+$", lambda title: f"{title[0]}\n\n{link}", model_card.text, count=1, flags=re.M) + (
        f"\n\n{PAGE_START}\n\n## In a browser\n\n{link}\n\nWith [transformers.js](https://huggingface.co/docs/transformers.js):\n\n```js\n"
        'import { env } from "@huggingface/transformers";\n\n'
        f'env.remotePathTemplate = "{{model}}/resolve/{{revision}}/{directory}/";\n\n{snippet}\n\n{PAGE_END}\n'
    )
    return str(model_card).encode()


def merge_card(new: bytes, edited: bytes, license: str) -> bytes:
    """The edited card on the Hub, but with the new card's metrics, base and, if given, license, and its part about the page."""
    with explain_errors("the card on the Hub cannot be read", remedy=": correct it there, or replace it with --overwrite"):
        card, old = (ModelCard(text.decode("utf-8-sig"), ignore_metadata_errors=True) for text in (new, edited))
        for name, value in old.data.to_dict().items():
            if name not in SET_BY_UPLOAD and not (license and name == "license"):
                card.data[name] = value
        page = PAGE.search(card.text)
        tags = card.data.get("tags") or []
        if page or PAGE_TAG in tags:
            card.data["tags"] = [tag for tag in tags if tag != PAGE_TAG] + [PAGE_TAG] * bool(page)
        if old.text.strip():
            text = PAGE.sub("\n\n", old.text)
            card.text = f"{text.rstrip()}\n\n{page[0].strip()}\n" if page else text
        return str(card).encode()


def prepare_adapter_config(directory: Path, base_model: str) -> bytes:
    """Name the base model on the Hub in the adapter's config; a revision of another repository, or a local one, is dropped."""
    config = _read_json(directory / ADAPTER_CONFIG)
    if config.get("base_model_name_or_path") != base_model:
        config["revision"] = None
    return json.dumps({**config, "base_model_name_or_path": base_model}, indent=2).encode()


def check_weights(directory: Path, files: Files) -> None:
    """Check that there are weights and that all their values are finite.

    Raises:
        UserError: weights are missing, unreadable or not finite.
    """
    weights = [directory / name for name in files if name.endswith(".safetensors")]
    if not weights and (directory / "onnx").is_dir():
        raise UserError(f"{directory} is an ONNX export: pass the directory of its model, with --space to upload both.")
    if not weights:
        raise UserError(f"{directory} has no safetensors weights: save the model again, with `save_pretrained`.")
    for path in weights:
        with _reading(path), safe_open(path, framework="pt") as tensors:
            for name in tensors.offset_keys():
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise UserError(f"{path}: {name} has values that are not finite: this model is broken.")


def check_loads(directory: Path, files: Files) -> None:
    """Load and run the model as others would: from the files to upload only, without this package.

    Raises:
        UserError: it does not load, its tokenizer does not fit, or its logits are not finite.
    """
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as copy:
        for name, file in files.items():
            if isinstance(file, Path):
                try:
                    Path(copy, name).symlink_to(file.resolve())
                except OSError:  # on Windows, most users may not create symlinks
                    shutil.copy(file, Path(copy, name))
        environment = {name: value for name, value in os.environ.items() if not SECRET_NAMES.search(name)}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": cache}
        command = [sys.executable, "-c", LOAD_PROGRAM, copy]
        try:
            process = subprocess.run(
                command, env=environment, cwd=cache, capture_output=True, text=True, errors="replace", timeout=LOAD_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{directory} would not work for others: it loads for {LOAD_SECONDS // 60} minutes.") from error
    output = process.stderr if process.returncode else process.stdout
    problem = output.rstrip(".\n").rpartition("\n")[2].replace(copy, str(directory))
    if problem or process.returncode:
        raise UserError(f"{directory} would not work for others: {problem or f'exit code {process.returncode} on loading'}.")


def _check_regular_file(path: Path) -> None:
    """Refuse links out of the directory, except those into the blobs of the Hub's cache, and whatever is not a file."""
    directory = path.parent.resolve()
    if path.resolve().parent not in (directory, directory.parent.parent / "blobs"):
        raise UserError(f"{path} is a link out of its directory: replace it by the file, or remove it.")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file: replace or remove it.")


def _read_json(path: Path) -> dict[str, Any]:
    with explain_errors(f"{path} is not JSON", (ValueError, RecursionError), ": save the model again"):
        content = json.loads(_read_text(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: save the model again.")
    return content


def _read_text(path: Path) -> str:
    with _reading(path):
        return path.read_text(encoding="utf-8")


def _reading(path: Path) -> AbstractContextManager[None]:
    return explain_errors(f"{path} cannot be read", (OSError, ValueError, SafetensorError))


def _code_files(directory: Path, trust_remote_code: bool, config: str) -> dict[str, Path]:
    """Collect the modules that `auto_map` names in the configs, and the modules that these import."""
    pending = set[str]()
    for name in (config, "tokenizer_config.json"):
        auto_map = _read_json(directory / name).get("auto_map") if (directory / name).exists() else None
        for entry in (auto_map or {}).values() if isinstance(auto_map or {}, dict) else [auto_map]:
            classes = entry if isinstance(entry, list) else [entry]  # a tokenizer lists its slow and its fast class
            pending |= {str(name).partition(".")[0] for name in classes if name}
    found = set[Path]()
    while pending:
        module = pending.pop()
        path = directory / f"{module}.py"
        if path in found:
            continue
        if not re.fullmatch(r"\w{1,100}", module) or not path.exists():
            raise UserError(f"{path} is missing, although the config of the model names it: save the model again.")
        _check_regular_file(path)
        with _reading(path):
            pending |= set(get_relative_imports(path))
        found.add(path)
    package = Path(modeling_scratchgpt.__file__).parent
    _, differing, unknown = cmpfiles(directory, package, [path.name for path in found], shallow=False)
    changed = sorted(differing + unknown)
    if changed and not trust_remote_code:
        raise UserError(
            f"{directory}: not the code of this package, but of another version, or changed: {', '.join(changed)}. Load model "
            "and tokenizer without trust_remote_code and save both again or, if you have read the code and trust it, pass "
            "--trust_remote_code."
        )
    return {path.name: path for path in found}
