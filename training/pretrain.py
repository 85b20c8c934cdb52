"""Pretrain a GPT: from a corpus to a model folder that transformers loads.

    accelerate launch training/pretrain.py
    accelerate launch training/pretrain.py --dataset book.txt --output_dir outputs/book
    accelerate launch training/pretrain.py --model hidden_size=256 num_hidden_layers=4 --max_steps 200
    accelerate launch training/pretrain.py --base_model outputs/gpt2 --lora_r 16 --dataset book.txt --output_dir outputs/lora

With nothing given it reads training/configs/pretrain.yaml: a small GPT on the docstrings of Python and of the libraries
installed beside it, in five and a half minutes of training on two CPU cores. Whatever is typed overrides the file.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from accelerate.utils import set_seed
from datasets import concatenate_datasets
from torch import nn
from torch.utils.data import DataLoader

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from modeling_scratchgpt.lora import trainable_parameters
from modeling_scratchgpt.tokenization_scratchgpt import MAX_VOCAB_SIZE, TOKENIZERS, min_vocab_size, tokenizer_report
from training.cli import model_config, model_option, option, own_fields, parse_arguments, run_main
from training.data.corpora import CorpusArguments, check_corpora, read_corpora, splits_of
from training.data.tokens import Tokens, tokenize, train_tokenizer
from training.data.windows import Batches, PackedDocuments, Windows, evaluation_loader, training_loader
from training.engine.checkpoints import atomic_directory, full_state_dict
from training.engine.flops import flops_per_token
from training.engine.metrics import LMMetrics, evaluate
from training.engine.optimizers import muon_initialization
from training.engine.pretrained import LoraArguments, load_config_and_tokenizer, load_pretrained, lora_config, save_trained
from training.engine.report import CURVE, draw_loss, format_samples, make_prompts, sample
from training.engine.train import EngineArguments, check_engine, start, train
from training.errors import UserError
from training.results.cards import CAUSAL_ADAPTER, HERE, dataset_name, hardware, origin, write_card
from training.results.markdown import block

NUM_SAMPLES, SAMPLE_TOKENS = 3, 96

USAGE = f"""from transformers import pipeline

generate = pipeline("text-generation", model="{HERE}", trust_remote_code=True)
print(generate({{prompt}}, max_new_tokens=64)[0]["generated_text"])"""

EXAMPLES = """## What it writes

Prompts in brackets: the make_prompts of held-out texts. Temperature 0.8, top-k 50."""


@dataclass
class PretrainArguments(EngineArguments, CorpusArguments, LoraArguments):
    config: str = option("training/configs/pretrain.yaml", "YAML file with values for any of these arguments.")
    dataset_weights: list[float] = option([], "How much each source counts; by its tokens if not given.")
    mixing_alpha: float = option(1.0, "Sources are drawn from in proportion to weight^alpha.")
    tokenizer: str = option("bpe", "Kind of the tokenizer that is trained on the corpus.", choices=TOKENIZERS)
    vocab_size: int = option(4096, "Most tokens of the tokenizer.")
    model: list[str] = model_option()
    base_model: str = option(
        "",
        "Folder or Hub id of a model to train further: ours, GPT-2's or Qwen3's. It brings its shape and its tokenizer; "
        "--model, --tokenizer and --vocab_size are then ignored.",
    )
    context_length: int = option(256, "Tokens the model sees at once.")
    windows: str = option(
        "ordered",
        "ordered: every window once an epoch; random: at random offsets; packed: whole documents, each seen by itself.",
        choices=["ordered", "random", "packed"],
    )
    stride: int = option(0, "Tokens between the make_prompts of ordered windows; 0 for --context_length: they do not overlap.")
    output_dir: str = option("outputs/pretrain", "New folder for the model.")


def check(arguments: PretrainArguments, num_processes: int) -> None:
    """Refuse nonsense before any long work."""
    check_engine(arguments, num_processes)
    if lora_config(arguments) and not arguments.base_model:
        raise UserError(f"--lora_r {arguments.lora_r} adapts a model that is there already: give it by --base_model.")
    if arguments.context_length < 2:
        raise UserError(f"--context_length must be at least 2, got {arguments.context_length}.")
    if not 0 <= arguments.stride <= arguments.context_length:
        raise UserError(f"--stride must be between 1 and --context_length {arguments.context_length}, got {arguments.stride}.")
    if arguments.stride and arguments.windows != "ordered":
        raise UserError(f"--stride {arguments.stride} is for --windows ordered: leave it out with {arguments.windows}.")
    least = min_vocab_size(arguments.tokenizer)
    if not least <= arguments.vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"--vocab_size must be at least {least} for --tokenizer {arguments.tokenizer}, and at most {MAX_VOCAB_SIZE}; "
            f"got {arguments.vocab_size}."
        )
    if arguments.dataset_weights and len(arguments.dataset_weights) != len(arguments.dataset):
        counts = f"{len(arguments.dataset_weights)} weights for {len(arguments.dataset)} sources"
        raise UserError(f"--dataset_weights gives {counts}: give one a source.")
    if not all(0 < weight < float("inf") for weight in (1, *arguments.dataset_weights)):
        raise UserError(f"--dataset_weights must be positive numbers, got {' '.join(map(str, arguments.dataset_weights))}.")
    if not 0 <= arguments.mixing_alpha < float("inf"):
        raise UserError(f"--mixing_alpha must be zero or more, got {arguments.mixing_alpha}.")
    check_corpora(arguments)


def mixture(arguments: PretrainArguments, sources: list[Tokens]) -> list[float] | None:
    """How often each source is drawn from, p_i in proportion to w_i^alpha; None where every window simply comes in its turn."""
    if not arguments.dataset_weights and arguments.mixing_alpha == 1:
        return None
    weights = [
        weight**arguments.mixing_alpha for weight in arguments.dataset_weights or [len(tokens.ids) for tokens in sources]
    ]
    return [weight / sum(weights) for weight in weights]


def make_windows(arguments: PretrainArguments, tokens: Tokens, pad_token_id: int) -> Windows | PackedDocuments:
    """What is drawn from one source."""
    if arguments.windows == "packed":
        return PackedDocuments(tokens, arguments.context_length, pad_token_id)
    stride = 1 if arguments.windows == "random" else arguments.stride
    return Windows(tokens, arguments.context_length, pad_token_id, "training", stride)


def starting_point(arguments: PretrainArguments) -> tuple[ScratchGPTConfig, Any]:
    """The shape of the model that is trained, and its tokenizer if it has one already."""
    if arguments.base_model:
        return load_config_and_tokenizer(arguments.base_model, arguments.context_length)
    return model_config(arguments.model, arguments.vocab_size, arguments.context_length), None


def first_model(arguments: PretrainArguments, config: ScratchGPTConfig) -> ScratchGPTForCausalLM:
    """The model as it is before the first step; the same whenever it is asked for."""
    set_seed(arguments.seed)
    if arguments.base_model:
        return load_pretrained(ScratchGPTForCausalLM, arguments.base_model, lora_config(arguments))
    model = ScratchGPTForCausalLM(config)
    if arguments.optimizer == "muon":
        muon_initialization(model)
    model.generation_config.update(do_sample=True, temperature=0.8, top_k=50)
    return model


def table_of(evaluations: dict[str, LMMetrics]) -> str:
    """Evaluations on held-out text, each under what it is called, for the card."""
    lines = [f"| {when} | {it.loss:.3f} | {it.perplexity:,.1f} | {it.bits_per_byte:.3f} |" for when, it in evaluations.items()]
    head = ["| | loss (nats per token) | perplexity | bits per byte |", "|---|---|---|---|"]
    return "\n".join(["On held-out text, of which nothing was seen in training:", "", *head, *lines])


def main() -> None:
    arguments = parse_arguments(PretrainArguments, __doc__)
    accelerator, output_dir = start(arguments, check)
    config, tokenizer = starting_point(arguments)

    # Corpora -> tokenizer -> token files -> windows. The first process of a machine makes them, the others read its cache.
    accelerator.print(f"Reading {dataset_name(arguments.dataset)}")
    with accelerator.local_main_process_first():
        corpora = read_corpora(arguments)
        splits = splits_of(arguments, corpora, arguments.seed)
        training_texts, validation_texts, test_texts = (
            concatenate_datasets([getattr(split, name) for split in splits]) for name in ("train", "validation", "test")
        )
        if tokenizer is None:
            tokenizer = train_tokenizer(training_texts, arguments.vocab_size, arguments.tokenizer, arguments.context_length)
        training_tokens = [tokenize(split.train, tokenizer, corpus.name) for split, corpus in zip(splits, corpora, strict=True)]
        validation_tokens = tokenize(validation_texts, tokenizer, "the validation text")
        test_tokens = tokenize(test_texts, tokenizer, "the test text")
    filler = tokenizer.pad_token_id or 0  # at the end of a row; it is neither seen nor scored
    sources = [make_windows(arguments, tokens, filler) for tokens in training_tokens]
    if arguments.batch_size > (num_windows := sum(len(source) for source in sources)):
        raise UserError(
            f"--batch_size {arguments.batch_size} is more than the {num_windows:,} windows of the training text: lower it, or "
            "give more text or a shorter --context_length."
        )
    validation_batches = evaluation_loader(
        Windows(validation_tokens, arguments.context_length, filler, "validation"),
        arguments.batch_size,
        accelerator.num_processes,
    )
    copies = sum(corpus.copies + corpus.near_copies for corpus in corpora)
    num_tokens = sum(len(tokens.ids) for tokens in training_tokens)
    accelerator.print(
        f"Documents to train on: {len(training_texts):,} ({num_tokens:,} tokens), copies dropped: {copies:,}; held out: "
        f"{len(validation_texts):,} ({len(validation_tokens.ids):,} tokens)"
    )
    passages = (text for batch in validation_texts.iter(batch_size=100) for text in batch["text"])
    accelerator.print(f"Tokenizer: {len(tokenizer):,} tokens; of the held-out text {tokenizer_report(tokenizer, passages)}")
    for source in sources:
        if isinstance(source, PackedDocuments):
            accelerator.print(
                f"Packed into {len(source):,} rows: {source.efficiency:.1%} of the places hold a token, none is lost"
            )

    if not arguments.base_model:
        config.vocab_size = len(tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    first = partial(first_model, arguments, config)
    model = first()
    accelerator.print(f"A GPT of {model.num_parameters():,} parameters, on {hardware(accelerator.num_processes)}")
    if arguments.lora_r:
        accelerator.print(f"LoRA: {trainable_parameters(model)}")
    prompts = make_prompts(validation_texts[:NUM_SAMPLES]["text"], tokenizer)
    samples: list[list[tuple[str, str]]] = []  # of each look at the model

    def score(prepared_model: nn.Module) -> LMMetrics:
        return evaluate(accelerator, prepared_model, prepared_batches, validation_tokens.num_bytes)

    def show() -> str:
        samples.append(sample(model, prompts, SAMPLE_TOKENS, tokenizer))
        return format_samples(samples[-1] if len(samples) == 1 else samples[-1][:1])

    def batches_from(start: int) -> DataLoader:
        num_batches = arguments.max_steps * arguments.gradient_accumulation_steps
        sizes = [len(source) for source in sources]
        probabilities = mixture(arguments, training_tokens)
        is_random = arguments.windows == "random"
        return training_loader(
            sources, Batches(sizes, arguments.batch_size, num_batches, arguments.seed, probabilities, is_random, start)
        )

    prepared_batches = accelerator.prepare(validation_batches)
    flops = flops_per_token(config, arguments.context_length, frozen=bool(arguments.lora_r))
    data = " ".join(tokens.digest for tokens in (*training_tokens, validation_tokens))
    outcome = train(accelerator, arguments, model, batches_from, data, score, show, flops)
    accelerator.print(f"\nAfter training: {outcome.after}. The same prompts:\n\n{format_samples(samples[-1])}")
    evaluations, result = {"before training": outcome.before, "after training": outcome.after}, outcome.after
    if arguments.test_fraction:
        test_batches = accelerator.prepare(
            evaluation_loader(
                Windows(test_tokens, arguments.context_length, filler, "test"),
                arguments.batch_size,
                accelerator.num_processes,
            )
        )
        result = evaluate(accelerator, model, test_batches, test_tokens.num_bytes)
        evaluations["after training, on the test text"] = result
        accelerator.print(f"On the test text, used only now: {result}\n")

    weights = full_state_dict(model)
    if accelerator.is_main_process:
        with atomic_directory(output_dir) as folder:
            save_trained(folder, model, weights, tokenizer, first)
            draw_loss(outcome.metrics.rows, folder / CURVE, "nats per token")
            write_card(
                folder,
                arguments,
                accelerator,
                model,
                outcome,
                introduction=f"A small GPT, {origin(arguments.base_model)}. It continues text in the manner of its corpus; it "
                "knows nothing else, and what it says is not to be relied on.",
                usage=USAGE.format(prompt=repr(samples[0][0][0])),
                adapter_usage=CAUSAL_ADAPTER.format(vocab_size=config.vocab_size),
                results=table_of(evaluations),
                examples=f"{EXAMPLES}\n\nBefore training:\n\n{block(format_samples(samples[0]))}\n\n"
                f"After training:\n\n{block(format_samples(samples[-1]))}",
                task="text-generation",
                metrics=asdict(result),
                data={
                    "Corpus": f"{dataset_name(arguments.dataset)}: documents: {len(training_texts):,}, tokens: {num_tokens:,}"
                },
                settings={"model": own_fields(config)},
            )
    accelerator.print(
        f"Trained for {outcome}. The model, its card and its curve are in {output_dir}/:\n"
        f"    AutoModelForCausalLM.from_pretrained({str(output_dir)!r}, trust_remote_code=True)"
    )
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
