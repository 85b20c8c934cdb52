"""Pretrain a GPT from scratch: from a corpus to a model folder that transformers loads.

    accelerate launch training/pretrain.py
    accelerate launch training/pretrain.py --dataset book.txt --output_dir outputs/book
    accelerate launch training/pretrain.py --model hidden_size=256 num_hidden_layers=4 --max_steps 200

With nothing given it reads training/configs/pretrain.yaml: a small GPT on the docstrings of Python and of the libraries
installed beside it, in about five minutes of training on two CPU cores. Whatever is typed overrides the file.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import set_seed

from modeling_scratchgpt import ScratchGPTForCausalLM
from modeling_scratchgpt.tokenization_scratchgpt import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE
from training.arguments import UserError, model_config, model_option, option, own_fields, parse_arguments, run
from training.checkpoints import check_output_folder, written_whole
from training.corpora import check_sources, read_corpus, split_documents
from training.loop import start_accelerator, training_steps
from training.metrics import MetricsFile, evaluate
from training.optimizers import make_optimizer, make_schedule
from training.report import CURVE, ProgressBar, beginnings, draw_loss, duration, format_samples, hardware, sample, write_card
from training.windows import Windows, evaluation_loader, tokenize, train_tokenizer, training_loader

NUM_SAMPLES, SAMPLE_TOKENS = 3, 96


@dataclass
class PretrainArguments:
    config: str = option("training/configs/pretrain.yaml", "YAML file with values for any of these arguments.")
    dataset: list[str] = option(["docs"], "`docs`, .txt and .md files, folders of them, or ids of datasets on the Hub.")
    text_column: str = option("text", "Column of the text in datasets from the Hub.")
    validation_fraction: float = option(0.02, "Share held out: whole documents, or the end of each if they are few.")
    vocab_size: int = option(4096, "Most tokens of the byte-level BPE tokenizer that is trained on the corpus.")
    model: list[str] = model_option()
    context_length: int = option(256, "Tokens the model sees at once.")
    batch_size: int = option(4, "Windows in a batch, over all processes.")
    gradient_accumulation_steps: int = option(1, "Batches that make up one optimizer step.")
    max_steps: int = option(1200, "Optimizer steps.")
    learning_rate: float = option(4e-3, "Highest learning rate; a cosine takes it down to a tenth.")
    warmup_fraction: float = option(0.05, "Share of the steps over which the learning rate rises.")
    weight_decay: float = option(0.1, "AdamW's decay of the matrices.")
    max_grad_norm: float = option(1.0, "Longest gradient; a longer one is scaled down to it.")
    eval_every: int = option(300, "Steps between looks at the held-out text.")
    seed: int = option(0, "Decides weights, held-out documents and the order of the windows.")
    output_dir: str = option("outputs/pretrain", "New folder for the model.")


def check(arguments: PretrainArguments, num_processes: int) -> None:
    """Refuse nonsense before any long work."""
    for name in ("context_length", "batch_size", "gradient_accumulation_steps", "max_steps", "eval_every"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    if not 0 <= arguments.warmup_fraction <= 1:
        raise UserError(f"--warmup_fraction must be between 0 and 1, got {arguments.warmup_fraction}.")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed must be at least 0 and below 2^32, got {arguments.seed}.")
    if not MIN_VOCAB_SIZE <= arguments.vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"--vocab_size must be at least {MIN_VOCAB_SIZE}, to hold every byte, and at most {MAX_VOCAB_SIZE}; "
            f"got {arguments.vocab_size}."
        )
    if not 0 < arguments.validation_fraction < 1:
        raise UserError(f"--validation_fraction must be between 0 and 1, got {arguments.validation_fraction}.")
    for name in ("learning_rate", "max_grad_norm"):
        if not 0 < getattr(arguments, name) < float("inf"):
            raise UserError(f"--{name} must be a positive number, got {getattr(arguments, name)}.")
    if not 0 <= arguments.weight_decay < float("inf"):
        raise UserError(f"--weight_decay must be zero or more, got {arguments.weight_decay}.")
    if arguments.batch_size % num_processes:
        raise UserError(f"--batch_size {arguments.batch_size} must be a multiple of the number of processes, {num_processes}.")
    check_sources(arguments.dataset)


def main() -> None:
    arguments = parse_arguments(PretrainArguments, __doc__)
    output_dir = Path(os.path.expanduser(arguments.output_dir))
    accelerator = start_accelerator()
    check(arguments, accelerator.num_processes)
    if accelerator.is_main_process:
        check_output_folder(output_dir)
    config = model_config(arguments.model, arguments.vocab_size, arguments.context_length)
    accelerator.wait_for_everyone()

    # Corpus -> tokenizer -> token files -> windows. The first process of a machine makes them, the others read its cache.
    dataset = " ".join(Path(source).name if Path(source).exists() else source for source in arguments.dataset)
    accelerator.print(f"Reading {dataset}")
    with accelerator.local_main_process_first():
        corpus = read_corpus(arguments.dataset, arguments.text_column)
        training_texts, validation_texts = split_documents(corpus, arguments.validation_fraction, arguments.seed)
        tokenizer = train_tokenizer(training_texts, arguments.vocab_size, arguments.context_length)
        training_tokens = tokenize(training_texts, tokenizer, "the training text")
        validation_tokens = tokenize(validation_texts, tokenizer, "the validation text")
    training_windows = Windows(training_tokens, arguments.context_length, tokenizer.pad_token_id, "training")
    validation_windows = Windows(validation_tokens, arguments.context_length, tokenizer.pad_token_id, "validation")
    accelerator.print(
        f"Documents to train on: {len(training_texts):,} ({len(training_tokens.ids):,} tokens); held out: "
        f"{len(validation_texts):,} ({len(validation_tokens.ids):,} tokens of "
        f"{validation_tokens.num_bytes / len(validation_tokens.ids):.2f} bytes); vocabulary: {len(tokenizer):,}"
    )

    set_seed(arguments.seed)
    config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    model = ScratchGPTForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=0.8, top_k=50)
    accelerator.print(f"A GPT of {model.num_parameters():,} parameters, on {hardware(accelerator.num_processes)}")
    optimizer = make_optimizer(model, arguments.learning_rate, arguments.weight_decay)
    schedule = make_schedule(optimizer, arguments.warmup_fraction, arguments.max_steps)
    num_batches = arguments.max_steps * arguments.gradient_accumulation_steps
    prepared_model, optimizer, training_batches, validation_batches = accelerator.prepare(
        model,
        optimizer,
        training_loader(training_windows, arguments.batch_size, num_batches, arguments.seed),
        evaluation_loader(validation_windows, arguments.batch_size, accelerator.num_processes),
    )

    output_dir.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(output_dir / "metrics.jsonl", accelerator)
    prompts = beginnings(validation_texts[:NUM_SAMPLES]["text"], tokenizer)
    before = evaluate(accelerator, prepared_model, validation_batches, validation_tokens.num_bytes)
    metrics.write(0, before)
    samples_before = sample(model, prompts, SAMPLE_TOKENS, tokenizer)
    accelerator.print(f"\nBefore training: {before}. Samples, the prompts in brackets:\n\n{format_samples(samples_before)}")

    after, seconds, tokens_seen = before, 0.0, 0
    with ProgressBar(arguments.max_steps, accelerator) as bar:
        for step in training_steps(
            accelerator,
            prepared_model,
            optimizer,
            schedule,
            training_batches,
            arguments.gradient_accumulation_steps,
            arguments.max_grad_norm,
        ):
            bar.update(step)
            metrics.write(step.number, step)
            seconds, tokens_seen = seconds + step.seconds, tokens_seen + step.tokens
            if step.number % arguments.eval_every == 0 or step.number == arguments.max_steps:
                after = evaluate(accelerator, prepared_model, validation_batches, validation_tokens.num_bytes)
                metrics.write(step.number, after)
                bar.say(f"Step {step.number:,}: {after}")
    samples_after = sample(model, prompts, SAMPLE_TOKENS, tokenizer)
    accelerator.print(f"\nAfter training: {after}. The same prompts:\n\n{format_samples(samples_after)}")

    took = f"{arguments.max_steps:,} steps, {tokens_seen:,} tokens, {duration(seconds)}"
    if accelerator.is_main_process:
        with written_whole(output_dir) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            draw_loss(metrics.rows, folder / CURVE)
            write_card(
                folder,
                name=output_dir.name,
                dataset=dataset,
                before=before,
                after=after,
                samples_before=samples_before,
                samples_after=samples_after,
                facts={
                    "Corpus": f"{dataset}: {len(training_texts):,} documents, {len(training_tokens.ids):,} tokens",
                    "Parameters": f"{model.num_parameters():,}",
                    "Training": took,
                    "Hardware": hardware(accelerator.num_processes),
                },
                settings={**vars(arguments), "model": own_fields(config)},
            )
    accelerator.print(
        f"Trained for {took}. The model, its card and its curve are in {output_dir}/:\n"
        f"    AutoModelForCausalLM.from_pretrained({str(output_dir)!r}, trust_remote_code=True)"
    )
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
