"""The model card: what a model is, how to use it, its metrics, how it was trained, and its limitations.

The metadata at the top of the card is written by the Hub's own classes. What a recipe cannot know is left open there, and asked
for at the upload: the license, and the repository of the base model.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from modeling_scratchgpt.hub import is_hub_id
from modeling_scratchgpt.interchange import model_type_of
from training.data.sources import is_dataset_id, short_name
from training.engine.metrics import readable
from training.engine.pretrained import LoraArguments
from training.engine.run_folder import ADAPTER, CARD, CURVE
from training.results.markdown import block, code, plain, table

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
    """A recipe's part of a card."""

    introduction: str  # what the model is and does
    usage: str  # a program that uses it, with a placeholder for where it is
    adapter_usage: str  # the same for the adapter
    results: str  # metrics, as Markdown
    examples: str  # sections with examples, as Markdown
    task: str  # the pipeline tag
    metrics: dict[str, float]  # on held-out data, for the metadata
    data: dict[str, str]  # a row of the table of how it was trained
    settings: dict[str, Any] = field(default_factory=dict)  # besides the arguments, such as the model's config


def write_card(directory: Path, arguments: Any, content: CardContent, facts: dict[str, str]) -> None:
    """Write the card of a model, and that of its adapter if there is one; `facts` are rows of its table about the training."""
    training = table("| | |", ((name, value.replace("|", r"\|")) for name, value in {**content.data, **facts}.items()))
    unused = set() if arguments.lora_r else {field.name for field in fields(LoraArguments)}
    settings = {name: value for name, value in asdict(arguments).items() if name not in unused} | content.settings
    settings_yaml = yaml.safe_dump(without_directories(settings), sort_keys=False, allow_unicode=True)
    for location, library in {directory: "transformers", directory / ADAPTER: "peft"}.items():
        if location.is_dir():
            program = content.usage if location == directory else _adapter_usage(arguments.base_model, content)
            metadata = _metadata(arguments, content, library)
            sections = [
                f"---\n{metadata.to_yaml()}\n---",
                f"# {metadata.model_name}",
                content.introduction,
                block(program, "python"),
                f"## Evaluation\n\n{content.results}",
                *([f"![Loss over steps]({CURVE})", content.examples] if location == directory else []),
                f"## Limitations\n\n{LIMITATIONS}",
                f"## Training\n\n{training}",
                f"<details><summary>All settings</summary>\n\n{block(settings_yaml, 'yaml')}\n\n</details>",
            ]
            ModelCard("\n\n".join(sections) + "\n").save(location / CARD)


def _adapter_usage(base_model: str, content: CardContent) -> str:
    """The program for an adapter, with this package where transformers has other names or another head for its base."""
    model_type = model_type_of(PreTrainedConfig.get_config_dict(base_model)[0])
    if model_type == "scratchgpt" or (model_type == "qwen3" and content.task == "text-generation"):
        return content.adapter_usage
    program = re.sub(r"from transformers import AutoModelFor\w+\n| AutoModelFor\w+,", "", content.adapter_usage)
    program = re.sub(r"AutoModel(For\w+)", r"ScratchGPT\1", program)
    reason = f"# The base is a {model_type} as the package of ScratchGPT loads it: this program needs that package."
    return f"{reason}\nfrom modeling_scratchgpt import {re.findall('ScratchGPTFor[A-Za-z]+', program)[0]}\n{program}"


def _metadata(arguments: Any, content: CardContent, library: str) -> ModelCardData:
    base_model, datasets = arguments.base_model, arguments.dataset
    scores = {name: round(value, 4) for name, value in content.metrics.items() if value is not None}
    held_out: Any = {"task_type": content.task, "dataset_type": "text", "dataset_name": f"{dataset_name(datasets)} (held out)"}
    return ModelCardData(
        library_name=library,
        tags=["scratchgpt", "lora"] if library == "peft" else ["scratchgpt"],
        license=arguments.license or None,
        language=arguments.language or ("en" if datasets == ["docs"] else None),
        pipeline_tag=content.task,
        datasets=[name.partition(":")[0] for name in datasets if is_dataset_id(name)] or None,
        base_model=(base_model if not base_model or is_hub_id(base_model) else Path(base_model).resolve().name) or None,
        model_name=plain(Path(arguments.output_dir).resolve().name, 100),
        eval_results=[EvalResult(**held_out, metric_type=name, metric_value=value) for name, value in scores.items()],
    )


def losses_table(metrics: dict[str, dict[str, float]]) -> str:
    """Metrics of a language model as Markdown, a row per name."""
    rows = (
        (name, f"{row['loss']:.3f}", readable(row["perplexity"]), "" if bits is None else f"{bits:.3f}")
        for name, row in metrics.items()
        for bits in [row["bits_per_byte"]]
    )
    return table("| | loss (nats per token) | perplexity | bits per byte |", rows)


def format_command(program: str, argv: Sequence[str]) -> str:
    """The command line of a run as inline code, without the directories of this machine."""
    return code(f"accelerate launch training/{shlex.join([program, *map(without_directories, argv)])}", 2000)


def describe_base(base_model: str) -> str:
    """The origin of a model: from scratch, or the base it was fine-tuned from."""
    if not base_model:
        return "trained from scratch with ScratchGPT"
    link = f"[{base_model}](https://huggingface.co/{base_model})"
    return f"fine-tuned from {link if is_hub_id(base_model) else plain(Path(base_model).name, 100)} with ScratchGPT"


def dataset_name(datasets: list[str]) -> str:
    """The names of the training data, without the directories of this machine."""
    docs = "the docstrings of Python and its libraries"
    return ", ".join(docs if name == "docs" else plain(short_name(name), 100) for name in datasets)


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
