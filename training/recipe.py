"""The interface of a recipe, and the one program that runs all three.

Read `run_recipe` first: every run is these steps. pretrain.py, classify.py and instruct.py fill in the methods of `Recipe`.
"""

import hashlib
import inspect
import json
import os
import platform
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_scratchgpt.convert.web import HELD_OUT
from modeling_scratchgpt.lora import lora_layers, merge_and_unload, save_adapter, trainable_parameters
from training.cli import parse_arguments
from training.engine.arguments import check_engine
from training.engine.checkpoints import full_state_dict, latest_state
from training.engine.consistency import Start, check_processes, find_start, launcher_settings, weights_digest
from training.engine.launch import PRECISIONS, choose_attention, choose_compiler, start_accelerator, start_trackers
from training.engine.machine import float32_name, has_fast_bfloat16
from training.engine.report import draw_loss
from training.engine.run_folder import ADAPTER, CHECKPOINTS, CURVE, RunFolder
from training.engine.train import Metrics, Task, TrainResult, train
from training.errors import explain_out_of_memory, quiet
from training.results.cards import CardContent, format_command, write_card

HELD_OUT_BYTES = 500_000


class Recipe(Task[Metrics]):
    """One kind of training run: a `Task`, which `train` uses, and what is done before and after it.

    The constructor reads, splits and tokenizes the data, and prints what it found, without depending on random state.
    """

    arguments_class: ClassVar[type]
    loss_unit: str = "nats per token"
    num_graphs: int = 3  # that are compiled for batches of many lengths
    usage: ClassVar[str]  # how to load the result; `{path}` is its directory
    tokenizer: PreTrainedTokenizerBase  # saved with the model

    def __init__(self, arguments: Any, accelerator: Accelerator):
        self.arguments, self.accelerator = arguments, accelerator

    @staticmethod
    def check(arguments: Any) -> None:
        """Validate combinations of arguments, and that all files are readable, before any data is read."""

    @abstractmethod
    def build_model(self) -> PreTrainedModel:
        """The model before the first step; the same at every call."""

    def save_model(self, model: PreTrainedModel, directory: Path, weights: dict[str, Any]) -> None:
        """Save model and tokenizer as transformers does. LoRA is merged into the model, and also saved alone, in `adapter/`."""
        with quiet():
            if lora_layers(model):
                full_model = self.build_model()
                full_model.load_state_dict(weights)
                save_adapter(full_model, directory / ADAPTER)
                self.tokenizer.save_pretrained(directory / ADAPTER)
                merge_and_unload(full_model)
                full_model.save_pretrained(directory)
            else:
                model.save_pretrained(directory, state_dict=weights)
            self.tokenizer.save_pretrained(directory)

    def digests(self, model: PreTrainedModel) -> dict[str, str]:
        """Digests of data, tokenizer and weights, which must be the same on all processes."""
        tokenizer: Any = self.tokenizer
        vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        return {"data": self.data_digest, "tokenizer": vocabulary, "initial weights": weights_digest(model)}

    @abstractmethod
    def evaluate_test(self, model: Any) -> None:
        """Evaluate the final model on the test split, if there is one, and print and keep the metrics."""

    @abstractmethod
    def held_out_rows(self) -> Iterable[dict[str, Any]]:
        """The validation split as rows with `text` or `messages`, and `label`: the ONNX export measures its 8 bits on them."""

    def write_results(self, directory: Path, result: TrainResult[Metrics]) -> None:
        """Write metrics, pictures and examples that the card does not hold. Only the main process calls it."""

    @abstractmethod
    def card(self, result: TrainResult[Metrics]) -> CardContent:
        """The recipe's part of the model card."""


def run_recipe(recipe_class: type[Recipe], description: str, argv: Sequence[str] | None = None) -> None:
    """Train a model as the command line says, and publish it in the output directory."""
    argv = sys.argv[1:] if argv is None else argv
    arguments: Any = parse_arguments(recipe_class.arguments_class, description, argv)
    accelerator, run_folder, start = setup(arguments, recipe_class.check)
    if start.is_finished:
        longer = "raise its number of steps or epochs"
        if not start.checkpoint:
            longer = f"pass --base_model {run_folder.path} and another --output_dir, since it has no checkpoints"
        accelerator.print(f"The run in {run_folder.path} is finished. To train longer, {longer}.")
        return
    recipe = recipe_class(arguments, accelerator)
    if arguments.prepare_only:
        accelerator.print("The data is ready: to train on it, run the same command without --prepare_only.")
        return
    model = recipe.build_model()
    check_processes(accelerator, recipe.digests(model))
    batch = next(iter(recipe.train_dataloader()))
    choose_compiler(accelerator, arguments.torch_compile, run_flops(recipe, batch), start.chosen)
    choose_attention(accelerator, model, batch)
    accelerator.print(f"Model: {parameters(model)}, on {hardware(accelerator, arguments.precision)}")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        accelerator.print("The first evaluations and steps compile the model, which takes minutes")
    with explain_out_of_memory():
        result = train(accelerator, recipe, model, run_folder, start)
        recipe.evaluate_test(model)
    publish(recipe, model, result, run_folder, format_command(Path(inspect.getfile(recipe_class)).name, argv))
    accelerator.end_training()


def setup(arguments: Any, check: Callable[[Any], None]) -> tuple[Accelerator, RunFolder, Start]:
    """Start Accelerate, check arguments and output directory, and find the checkpoint to resume, before any data is read."""
    output_dir = Path(os.path.expanduser(arguments.output_dir))
    earlier = latest_state(output_dir / CHECKPOINTS).get("chosen") if arguments.resume else None
    accelerator = start_accelerator(arguments.report_to, output_dir, arguments.precision, earlier)
    run_folder = RunFolder(output_dir, accelerator)
    check_engine(arguments, accelerator.num_processes)
    check(arguments)
    if accelerator.is_main_process:
        run_folder.check(arguments.resume)
    accelerator.wait_for_everyone()
    start = find_start(accelerator, arguments, run_folder)
    if not start.is_finished and not arguments.prepare_only:
        start_trackers(accelerator, arguments.resume, before_data=True)
    return accelerator, run_folder, start


def publish(recipe: Recipe, model: PreTrainedModel, result: TrainResult, run_folder: RunFolder, command: str) -> None:
    """Write the model, its tokenizer, results, curve and card, all at once."""
    accelerator = recipe.accelerator
    weights = full_state_dict(model)
    if accelerator.is_main_process:
        facts = {
            "Parameters": parameters(model),
            "Training": str(result),
            "Hardware": hardware(accelerator, recipe.arguments.precision),
            **({"Notes": "; ".join(result.notes)} if result.notes else {}),
            "Versions": ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, accelerate)),
            "Command": command,
        }
        with run_folder.publish() as directory:
            recipe.save_model(model, directory, weights)
            draw_loss(run_folder.history, directory / CURVE, recipe.loss_unit)
            recipe.write_results(directory, result)
            write_held_out(directory, recipe.held_out_rows())
            write_card(directory, recipe.arguments, recipe.card(result), facts)
    path = str(run_folder.path)
    usage = recipe.usage.format(path=repr(path))
    accelerator.print(f"Trained for {result}. The model and its card are in {path}/:\n    {usage}")


def write_held_out(directory: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the first rows, for use on this machine: they are not uploaded."""
    with open(directory / HELD_OUT, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            if file.tell() > HELD_OUT_BYTES:
                break


def parameters(model: PreTrainedModel) -> str:
    """The number of parameters, and of those that are trained, for people."""
    is_frozen = not all(parameter.requires_grad for parameter in model.parameters())
    return trainable_parameters(model) if is_frozen else f"{model.num_parameters():,} parameters"


def run_flops(recipe: Recipe, batch: dict[str, torch.Tensor]) -> float:
    """FLOPs of the run for each graph that would be compiled, estimated from the size of the first batch."""
    num_batches = recipe.arguments.max_steps * recipe.arguments.gradient_accumulation_steps
    return recipe.flops_per_token * batch["input_ids"].numel() * num_batches / recipe.num_graphs


def hardware(accelerator: Accelerator, precision: str) -> str:
    """The device, the processes and threads, the precision and why it was chosen, and the compiler, for people."""
    kind = accelerator.device.type
    device = torch.cuda.get_device_name() if kind == "cuda" else f"{platform.machine()} {kind.upper()}"
    settings = launcher_settings(accelerator)
    mixed = settings["mixed_precision"]
    names = {value: name for name, value in PRECISIONS.items()} | {"no": float32_name(kind)}
    name = names.get(mixed, "float8")
    if precision == "auto" and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no":
        is_fast = has_fast_bfloat16(kind)
        reason = f"the device is {'' if is_fast else 'not '}fast in bfloat16" if is_fast == (mixed == "bf16") else "as before"
        name += f" (auto: {reason})"
    compiled = "" if settings["dynamo_backend"] == "no" else f", compiled by {settings['dynamo_backend']}"
    sharding = f" ({settings['distributed_type']})" if settings["distributed_type"] in ("fsdp", "deepspeed") else ""
    processes = f"processes: {settings['num_processes']}{sharding}, threads per process: {torch.get_num_threads()}"
    return f"{device}, {processes}, {name}{compiled}"
