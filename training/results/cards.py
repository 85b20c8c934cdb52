"""The model card: what a model is, how to use it, its metrics, how it was trained, and its limitations.

The metadata at the top of the card is written by the Hub's own classes. What a recipe cannot know is left open there, and asked
for at the upload: the license, and the repository of the base model.
"""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_scratchgpt.hub import is_hub_id
from training.data.sources import is_dataset_id, short_name
from training.engine.pretrained import LoraArguments
from training.engine.run_folder import ADAPTER, CARD, CURVE
from training.results.markdown import block, code, plain

PIPE = r"\|"  # in a cell of a table
# In snippets, until the model has a repository on the Hub.
MODEL_PLACEHOLDER, BASE_PLACEHOLDER = "PATH_OR_HUB_ID", "PATH_OR_HUB_ID_OF_THE_BASE"

CAUSAL_ADAPTER = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{BASE_PLACEHOLDER}", trust_remote_code=True)
model.resize_token_embeddings({{vocab_size}})
model = PeftModel.from_pretrained(model, "{MODEL_PLACEHOLDER}")"""

LIMITATIONS = (
    "This is a small model trained on little data: its output can be wrong, however confident it is. It reproduces its "
    "training data, including biases and private details; nothing was filtered. It was evaluated only on held-out data of the "
    "same kind, and not for safety. Do not use it for decisions about people."
)


@dataclass(frozen=True)
class CardContent:
    """A recipe's part of a card.

    Attributes:
        introduction: what the model is and does.
        usage, adapter_usage: Python programs that use it, with placeholders for where it is.
        results: metrics, as Markdown.
        examples: sections with examples, as Markdown.
        task: the pipeline tag.
        metrics: metrics on held-out data, for the metadata.
        data: a row of the table of how it was trained.
        settings: other settings, such as the model's config.
    """

    introduction: str
    usage: str
    adapter_usage: str
    results: str
    examples: str
    task: str
    metrics: dict[str, float]
    data: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)


def write_card(directory: Path, arguments: Any, content: CardContent, facts: dict[str, str]) -> None:
    """Write the card of a model, and that of its adapter if there is one.

    Args:
        arguments: of the run.
        facts: rows of the table of how it was trained, besides the data.
    """
    facts = {**content.data, **facts}
    rows = "\n".join(f"| {name} | {value.replace('|', PIPE)} |" for name, value in facts.items())
    name = plain(Path(arguments.output_dir).resolve().name, 100)
    for location, library, program in (
        (directory, "transformers", content.usage),
        (directory / ADAPTER, "peft", content.adapter_usage),
    ):
        if location.is_dir():
            sections = [
                f"---\n{_metadata(arguments, content, library).to_yaml()}\n---",
                f"# {name}",
                content.introduction,
                block(program, "python"),
                "## Evaluation",
                content.results,
                *([f"![Loss over steps]({CURVE})", content.examples] if location == directory else []),
                "## Limitations",
                LIMITATIONS,
                "## Training",
                f"| | |\n|---|---|\n{rows}",
                f"<details><summary>All settings</summary>\n\n{block(_settings(arguments, content), 'yaml')}\n\n</details>",
            ]
            ModelCard("\n\n".join(sections) + "\n").save(location / CARD)


def _metadata(arguments: Any, content: CardContent, library: str) -> ModelCardData:
    base_model, datasets = arguments.base_model, arguments.dataset
    return ModelCardData(
        library_name=library,
        tags=["scratchgpt", "lora"] if library == "peft" else ["scratchgpt"],
        license=arguments.license or None,
        language=arguments.language or ("en" if datasets == ["docs"] else None),
        pipeline_tag=content.task,
        datasets=[name.partition(":")[0] for name in datasets if is_dataset_id(name)] or None,
        base_model=(base_model if not base_model or is_hub_id(base_model) else Path(base_model).resolve().name) or None,
        model_name=plain(Path(arguments.output_dir).resolve().name, 100),
        eval_results=[
            EvalResult(
                task_type=content.task,
                dataset_type="text",
                dataset_name=f"{dataset_name(datasets)} (held out)",
                metric_type=metric,
                metric_value=round(value, 4),
            )
            for metric, value in content.metrics.items()
        ],
    )


def format_command(program: str, argv: Sequence[str]) -> str:
    """The command line of a run as inline code, without the directories of this machine."""
    return code(f"accelerate launch training/{shlex.join([program, *map(without_directories, argv)])}", 2000)


def _settings(arguments: Any, content: CardContent) -> str:
    unused = set() if arguments.lora_r else {field.name for field in fields(LoraArguments)}
    settings = {name: value for name, value in asdict(arguments).items() if name not in unused} | content.settings
    return yaml.safe_dump(without_directories(settings), sort_keys=False, allow_unicode=True)


def describe_base(base_model: str) -> str:
    """The origin of a model: from scratch, or the base it was fine-tuned from."""
    if not base_model:
        return "trained from scratch with ScratchGPT"
    link = f"[{base_model}](https://huggingface.co/{base_model})"
    return f"fine-tuned from {link if is_hub_id(base_model) else plain(Path(base_model).name, 100)} with ScratchGPT"


def dataset_name(datasets: list[str]) -> str:
    """The names of the training data, without the directories of this machine."""
    names = (
        "the docstrings of Python and its libraries" if name == "docs" else plain(short_name(name), 100) for name in datasets
    )
    return ", ".join(names)


def without_directories(value: Any) -> Any:
    """Shorten paths and URLs, which describe the author's machine, in a setting, a list or a dictionary of them."""
    if isinstance(value, str):
        if "://" in value:
            return f"{value.partition('://')[0]}://..."  # a URL can contain a key
        option, equals, given = value.partition("=")
        if equals and option.startswith("--"):
            return f"{option}={without_directories(given)}"
        path = Path(value)
        return path.name if path.is_absolute() or value.startswith("~") or ".." in path.parts else value
    if isinstance(value, list):
        return [without_directories(item) for item in value]
    return {name: without_directories(item) for name, item in value.items()} if isinstance(value, dict) else value
