"""The model card: what a model is, how to use it, how good it is, how it was made, and what it is not for.

The head of the card is for programs: the Hub's own classes write it. What a recipe cannot know stays open there, and is asked
for when the model is uploaded: its licence, and where its base model lies on the Hub.
"""

import platform
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import yaml
from accelerate import Accelerator
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_scratchgpt.lora import trainable_parameters
from training.data.sources import is_hub_id, short_name
from training.engine.pretrained import ADAPTER, LoraArguments
from training.engine.report import CURVE
from training.engine.train import TrainResult
from training.results.markdown import block, code, plain

CARD, SCORES = "README.md", "metrics.json"
BAR = r"\|"  # in a cell of a table
HERE, BASE = "PATH_OR_HUB_ID", "PATH_OR_HUB_ID_OF_THE_BASE"  # in snippets, until the model has a place on the Hub

CAUSAL_ADAPTER = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{BASE}", trust_remote_code=True)
model.resize_token_embeddings({{vocab_size}})
model = PeftModel.from_pretrained(model, "{HERE}")"""

LIMITS = (
    "It has read little and knows less: what it says or decides can be wrong however sure it is. It repeats what stands in its "
    "data, prejudices and private details included; nothing was filtered out. It was measured on held-out data of the same "
    "kind alone, and not for safety. Do not let it decide about people."
)


def hardware(num_processes: int) -> str:
    """What the run was made on, as on a label."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return f"{device}, processes: {num_processes}, threads in each: {torch.get_num_threads()}"


def origin(base_model: str) -> str:
    """Where a model comes from, in words."""
    if not base_model:
        return "trained from scratch with ScratchGPT"
    base = (
        f"[{base_model}](https://huggingface.co/{base_model})" if is_hub_id(base_model) else plain(Path(base_model).name, 100)
    )
    return f"trained further from {base} with ScratchGPT"


def dataset_name(dataset: list[str]) -> str:
    """What was learned from, for others: without the folders above it."""
    return ", ".join(
        "the docstrings of Python and its libraries" if it == "docs" else plain(short_name(it), 100) for it in dataset
    )


def write_card(
    folder: Path,
    arguments: Any,
    accelerator: Accelerator,
    model: Any,
    outcome: TrainResult,
    *,
    introduction: str,
    usage: str,
    adapter_usage: str,
    results: str,
    examples: str,
    task: str,
    metrics: dict[str, float],
    data: dict[str, str],
    settings: dict[str, Any],
) -> None:
    """The card of a model that was trained, and that of its adapter if it was trained by one.

    Args:
        folder: where it goes, beside the curve.
        arguments, accelerator, model, outcome: of the run.
        introduction: what the model is, for people.
        usage, adapter_usage: Python that uses it, with `HERE` and `BASE` for where it lies.
        results: how good it is, as Markdown.
        examples: sections that show what it does, as Markdown.
        task: the pipeline that runs it.
        metrics: numbers on held-out data, by their names.
        data: what it was trained on: a row of the table "How it was trained".
        settings: what else was decided, the model's fields among them.
    """
    base_model, dataset = arguments.base_model, arguments.dataset
    facts = {
        **data,
        "Parameters": trainable_parameters(model),
        "Training": str(outcome),
        "Hardware": hardware(accelerator.num_processes),
        "Versions": f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}",
        "Command": code(
            f"accelerate launch training/{shlex.join([Path(sys.argv[0]).name, *map(without_folders, sys.argv[1:])])}", 2000
        ),
    }
    name = plain(Path(arguments.output_dir).resolve().name, 100)
    head: dict[str, Any] = {
        "license": arguments.license or None,
        "language": arguments.language or ("en" if dataset == ["docs"] else None),
        "pipeline_tag": task,
        "datasets": [it.partition(":")[0] for it in dataset if it != "docs" and is_hub_id(it)] or None,
        "base_model": (base_model if not base_model or is_hub_id(base_model) else Path(base_model).resolve().name) or None,
        "model_name": name,
        "eval_results": [
            EvalResult(
                task_type=task,
                dataset_type="text",
                dataset_name=f"{dataset_name(dataset)} (held out)",
                metric_type=metric,
                metric_value=round(value, 4),
            )
            for metric, value in metrics.items()
        ],
    }
    rows = "\n".join(f"| {key} | {str(value).replace('|', BAR)} |" for key, value in facts.items())
    unused = set() if arguments.lora_r else {field.name for field in fields(LoraArguments)}
    chosen = {key: value for key, value in asdict(arguments).items() if key not in unused} | settings
    settings_file = yaml.safe_dump(without_folders(chosen), sort_keys=False, allow_unicode=True)
    for place, library, program in ((folder, "transformers", usage), (folder / ADAPTER, "peft", adapter_usage)):
        if not place.is_dir():
            continue
        tags = ["scratchgpt", "lora"] if library == "peft" else ["scratchgpt"]
        parts = [
            f"---\n{ModelCardData(library_name=library, tags=tags, **head).to_yaml()}\n---",
            f"# {name}",
            introduction,
            block(program, "python"),
            "## How good it is",
            results,
            *([f"![Loss over steps]({CURVE})", examples] if place == folder else []),
            "## Limits and risks",
            LIMITS,
            "## How it was trained",
            f"| | |\n|---|---|\n{rows}",
            f"<details><summary>All settings</summary>\n\n{block(settings_file, 'yaml')}\n\n</details>",
        ]
        ModelCard("\n\n".join(parts) + "\n").save(place / CARD)


def without_folders(value: Any) -> Any:
    """A path says where things lie on the author's machine, an address where they were asked for; a card is for others."""
    if isinstance(value, str):
        if "://" in value:
            return f"{value.partition('://')[0]}://..."  # an address can hold a key
        option, equals, given = value.partition("=")
        if equals and option.startswith("--"):
            return f"{option}={without_folders(given)}"
        path = Path(value)
        return path.name if path.is_absolute() or value.startswith("~") or ".." in path.parts else value
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return {name: without_folders(item) for name, item in value.items()} if isinstance(value, dict) else value
