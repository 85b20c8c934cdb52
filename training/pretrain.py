"""Pretrain a GPT: from a corpus to a model directory that transformers loads.

    accelerate launch training/pretrain.py
    accelerate launch training/pretrain.py --dataset book.txt --output_dir outputs/book
    accelerate launch training/pretrain.py --model hidden_size=256 num_hidden_layers=4 --max_steps 200
    accelerate launch training/pretrain.py --base_model outputs/gpt2 --lora_r 16 --dataset book.txt --output_dir outputs/lora

By default it reads training/configs/pretrain.yaml and trains a small GPT on the docstrings of Python and of the installed
libraries, in 4 to 12 minutes on two CPU cores. Command-line flags override the YAML file.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import concatenate_datasets
from torch import nn
from torch.utils.data import DataLoader

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from modeling_scratchgpt.tokenization_scratchgpt import MAX_VOCAB_SIZE, TOKENIZERS, min_vocab_size, tokenizer_report
from training.cli import model_config, model_option, option, run_main
from training.data.corpora import CorpusArguments, check_corpora, read_corpora, split_documents
from training.data.datasets import PackedExamples, Windows, evaluation_dataloader, evaluation_rows, train_dataloader
from training.data.samplers import MixtureBatchSampler
from training.data.splits import SPLITS
from training.data.tokens import first_tokens, tokenize_documents, train_tokenizer
from training.engine.arguments import EngineArguments
from training.engine.flops import flops_per_token
from training.engine.metrics import LMMetrics, evaluate
from training.engine.optimizers import muon_initialization
from training.engine.pretrained import LoraArguments, load_config_and_tokenizer, load_pretrained, lora_config
from training.engine.report import describe_sampling, make_prompts, sample
from training.engine.train import TrainResult
from training.errors import UserError
from training.recipe import Recipe, run_recipe
from training.results import cards
from training.results.markdown import block

NUM_SAMPLES, SAMPLE_TOKENS = 3, 96
BEGINNING = "the beginning of the validation text"
FEW_EPOCHS = 3  # after which the held-out loss of a short text rises
FEW_TOKENS = 256  # held out: their loss is not reliable
MIN_PROBABILITY = 1e-6  # of a source

USAGE = f"""from transformers import pipeline

generate = pipeline("text-generation", model="{cards.MODEL_PLACEHOLDER}", trust_remote_code=True)
print(generate({{prompt}}, max_new_tokens={{max_new_tokens}})[0]["generated_text"])"""


@dataclass
class PretrainArguments(LoraArguments, EngineArguments, CorpusArguments):
    config: str = option("training/configs/pretrain.yaml", "YAML file with values for any of these arguments")
    dataset_weights: list[float] = option([], "weights of the sources; default: their numbers of tokens")
    mixing_alpha: float = option(1.0, "sources are sampled with probability proportional to weight^alpha", minimum=0)
    tokenizer: str = option("bpe", "kind of tokenizer to train on the corpus", choices=TOKENIZERS)
    vocab_size: int = option(4096, "maximum size of the vocabulary", maximum=MAX_VOCAB_SIZE)
    model: list[str] = model_option()
    base_model: str = option(
        "",
        "directory or Hub id of a pretrained model (ScratchGPT, GPT-2 or Qwen3) to continue from, with its config and its "
        "tokenizer; --model, --tokenizer and --vocab_size are then ignored",
    )
    context_length: int = option(256, "tokens per window", minimum=2)
    windows: str = option(
        "ordered",
        "ordered: every window once per epoch; random: at random offsets; packed: whole documents that do not see each other",
        choices=["ordered", "random", "packed"],
    )
    stride: int = option(0, "stride of ordered windows; 0: --context_length, no overlap", minimum=0)
    eval_tokens: int = option(
        10_000_000, "evaluate on this many held-out tokens during training, on all of them at the end; 0: always all", minimum=0
    )
    output_dir: str = option("outputs/pretrain", "new directory for the model")


class PretrainRecipe(Recipe[LMMetrics]):
    """Language modeling on a corpus."""

    arguments_class = PretrainArguments
    num_graphs = 1
    usage = "AutoModelForCausalLM.from_pretrained({path}, trust_remote_code=True)"

    def __init__(self, arguments: PretrainArguments, accelerator: Accelerator):
        super().__init__(arguments, accelerator)
        length = arguments.context_length
        self.config, tokenizer = starting_point(arguments)
        if arguments.context_length < length:
            positions = f"the {arguments.context_length} positions of {arguments.base_model}"
            accelerator.print(f"--context_length: {positions}, instead of {length}")
        accelerator.print(f"Reading {cards.dataset_name(arguments.dataset)}")
        with accelerator.local_main_process_first():  # the first process of each machine fills the cache
            self._read_and_tokenize(tokenizer)
        self._make_windows()
        self.probabilities = mixture(arguments, [len(examples.ids) for examples in self.train_examples])
        self._report_data()
        if not arguments.base_model:
            self.config.vocab_size = len(self.tokenizer)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(self.config, name, getattr(self.tokenizer, name))
        self.prompts = make_prompts(self.texts["validation"][:NUM_SAMPLES]["text"], self.tokenizer)
        self.data_digest = " ".join(tokens.digest for tokens in (*self.train_examples, self.held_out["validation"]))
        self.flops_per_token = flops_per_token(self.config, arguments.context_length, frozen=bool(arguments.lora_r))
        self.test: LMMetrics | None = None

    @staticmethod
    def check(arguments: PretrainArguments) -> None:
        if lora_config(arguments) and not arguments.base_model:
            raise UserError(f"--lora_r {arguments.lora_r} adapts a pretrained model: pass it as --base_model.")
        if arguments.stride > arguments.context_length:
            raise UserError(f"--stride must be at most --context_length {arguments.context_length}, got {arguments.stride}.")
        if arguments.stride and arguments.windows != "ordered":
            raise UserError(f"--stride {arguments.stride} is for --windows ordered: omit it with {arguments.windows}.")
        if arguments.eval_tokens == 1:
            raise UserError("--eval_tokens must be 0 or at least 2, got 1: the first token is not predicted.")
        if arguments.vocab_size < (smallest := min_vocab_size(arguments.tokenizer)):
            kind = arguments.tokenizer
            raise UserError(f"--vocab_size must be at least {smallest} for --tokenizer {kind}, got {arguments.vocab_size}.")
        if arguments.dataset_weights and len(arguments.dataset_weights) != len(arguments.dataset):
            counts = f"{len(arguments.dataset_weights)} weights for {len(arguments.dataset)} sources"
            raise UserError(f"--dataset_weights has {counts}: pass one per source.")
        if not all(0 < weight < float("inf") for weight in arguments.dataset_weights):
            weights = " ".join(map(str, arguments.dataset_weights))
            raise UserError(f"--dataset_weights must be positive numbers, got {weights}.")
        check_corpora(arguments)

    def _read_and_tokenize(self, tokenizer: Any) -> None:
        """Corpora -> splits -> tokenizer -> token files."""
        arguments = self.arguments
        corpora = read_corpora(arguments)
        splits = [split_documents(corpus.documents, arguments) for corpus in corpora]
        self.texts = {name: concatenate_datasets([split[name] for split in splits]) for name in SPLITS}
        self.num_duplicates = sum(corpus.duplicates + corpus.near_duplicates for corpus in corpora)
        size, length = arguments.vocab_size, arguments.context_length
        self.tokenizer = tokenizer or train_tokenizer(self.texts["train"], size, arguments.tokenizer, length)
        pairs = zip(splits, corpora, strict=True)
        self.train_examples = [tokenize_documents(split["train"], self.tokenizer, corpus.name) for split, corpus in pairs]
        held_out = {name: self.texts[name] for name in SPLITS[1:] if len(self.texts[name])}
        self.held_out = {name: tokenize_documents(held_out[name], self.tokenizer, f"the {name} text") for name in held_out}

    def _make_windows(self) -> None:
        """Training windows of each source, and rows and dataloaders of the held-out text, which is scored as it is trained."""
        arguments, accelerator, length = self.arguments, self.accelerator, self.arguments.context_length
        shortest = min(len(examples.ids) for examples in self.train_examples)
        if shortest <= length and arguments.windows != "packed":
            few = f"{shortest} tokens, fewer than one window of --context_length {length} and the token after it"
            raise UserError(f"the training text has {few}: {self._more_windows()}.")
        pad_token_id = self.tokenizer.pad_token_id or 0  # padding is neither seen nor scored
        stride = 1 if arguments.windows == "random" else arguments.stride
        self.sources: list[Windows | PackedExamples] = [
            PackedExamples(examples, length, pad_token_id)
            if arguments.windows == "packed"
            else Windows(examples, length, pad_token_id, "training", stride)
            for examples in self.train_examples
        ]
        if arguments.batch_size > (num_windows := sum(map(len, self.sources))):
            problem = f"--batch_size {arguments.batch_size} is more than the {num_windows:,} windows of the training text"
            raise UserError(f"{problem}: {self._more_windows()}.")
        self.rows, self.dataloaders, held_out = {}, {}, dict(self.held_out)
        if 0 < arguments.eval_tokens < len(held_out["validation"].ids):
            held_out[BEGINNING] = first_tokens(held_out["validation"], self.tokenizer, arguments.eval_tokens)
            self.eval_split = BEGINNING
            accelerator.print(f"Evaluation on the first {arguments.eval_tokens:,} held-out tokens, at the end on all of them")
        for split, examples in held_out.items():
            self.rows[split] = evaluation_rows(examples, arguments.windows, length, pad_token_id)
            dataloader = evaluation_dataloader(self.rows[split], arguments.batch_size, accelerator.num_processes)
            self.dataloaders[split] = accelerator.prepare(dataloader)

    def _more_windows(self) -> str:
        """The remedy for too few training windows: the longest context, a power of two, with which they fill a batch."""
        for length in (2**power for power in range(16, 2, -1)):
            num_windows = sum((len(examples.ids) - len(examples)) // length for examples in self.train_examples)
            if num_windows >= self.arguments.batch_size and all(len(examples.ids) > length for examples in self.train_examples):
                return f"pass --context_length {length}"
        return "lower it, or use more text"

    def _report_data(self) -> None:
        """Print the sizes of the data, and how often the run reads it."""
        arguments, print_ = self.arguments, self.accelerator.print
        self.num_tokens = sum(len(examples.ids) for examples in self.train_examples)
        validation = self.texts["validation"]
        training = f"{len(self.texts['train']):,} ({self.num_tokens:,} tokens), duplicates dropped: {self.num_duplicates:,}"
        held_out = f"{len(validation):,} ({len(self.held_out['validation'].ids):,} tokens)"
        print_(f"Training documents: {training}; held out: {held_out}")
        passages = (text for batch in validation.iter(batch_size=100) for text in batch["text"])
        report = tokenizer_report(self.tokenizer, passages)
        self.tokenizer_facts = f"{len(self.tokenizer):,} tokens; on the held-out text {report}"
        if self.held_out["validation"].num_bytes is None:
            self.tokenizer_facts += "; it loses some of the text, so bits per byte are not reported"
        print_(f"Tokenizer: {self.tokenizer_facts}")
        if (scored := self.rows["validation"].num_labels) < FEW_TOKENS:
            print_(f"Only {scored:,} tokens are held out: a larger --validation_fraction makes the held-out loss more reliable")
        num_windows = sum(map(len, self.sources))
        if arguments.windows != "random" and not self.probabilities:
            epochs = arguments.max_steps * arguments.gradient_accumulation_steps * arguments.batch_size / num_windows
            print_(f"{arguments.max_steps:,} steps are {epochs:,.1f} epochs of {num_windows:,} windows")
            if epochs > FEW_EPOCHS + 1:
                fewer = math.ceil(arguments.max_steps * FEW_EPOCHS / epochs)
                print_(f"A text that is read many times is memorized: for {FEW_EPOCHS} epochs, pass --max_steps {fewer:,}")
        for source in self.sources:
            if isinstance(source, PackedExamples):
                print_(f"Packed into {len(source):,} rows: {source.efficiency:.1%} of the positions hold a token")

    def build_model(self) -> ScratchGPTForCausalLM:
        arguments = self.arguments
        set_seed(arguments.seed)
        if arguments.base_model:
            model: Any = load_pretrained(ScratchGPTForCausalLM, arguments.base_model, lora_config(arguments))
        else:
            model = ScratchGPTForCausalLM(self.config)
            if arguments.optimizer == "muon":
                muon_initialization(model)
            model.generation_config.update(do_sample=True, temperature=0.8, top_k=50)
        self.sampling = describe_sampling(model.generation_config)
        return model

    def train_dataloader(self) -> DataLoader:
        arguments = self.arguments
        num_batches = arguments.max_steps * arguments.gradient_accumulation_steps
        options = {"probabilities": self.probabilities, "with_replacement": arguments.windows == "random"}
        sizes = [len(source) for source in self.sources]
        sampler = MixtureBatchSampler(sizes, arguments.batch_size, num_batches, arguments.seed, **options)
        return train_dataloader(self.sources, sampler)

    def evaluate(self, model: nn.Module, split: str = "validation") -> LMMetrics:
        return evaluate(self.accelerator, model, self.dataloaders[split], self.rows[split].num_bytes)

    def preview(self, model: Any) -> list[str]:
        return sample(model, self.prompts, SAMPLE_TOKENS, self.tokenizer)

    def evaluate_test(self, model: Any) -> None:
        if "test" in self.dataloaders:
            self.test = self.evaluate(model, "test")
            self.accelerator.print(f"Test text, evaluated once, at the end: {self.test}\n")

    def held_out_rows(self) -> Iterable[dict[str, Any]]:
        return ({"text": text} for batch in self.texts["validation"].iter(batch_size=100) for text in batch["text"])

    def card(self, result: TrainResult[LMMetrics]) -> cards.CardContent:
        arguments = self.arguments
        part = f", on the first {arguments.eval_tokens:,} tokens" if self.eval_split == BEGINNING else ""
        metrics = {f"before training{part}": vars(result.before), "after training": vars(result.after)}
        if self.test:
            metrics["after training, on the test text"] = vars(self.test)
        fields = [name for name in ScratchGPTConfig.__annotations__ if hasattr(self.config, name)]
        corpus = f"documents: {len(self.texts['train']):,}, tokens: {self.num_tokens:,}"
        prompt = self.tokenizer.decode(self.prompts[0], skip_special_tokens=True)
        before, after = (block("\n\n".join(samples)) for samples in (result.preview_before, result.preview_after))
        return cards.CardContent(
            introduction=f"A small GPT, {cards.describe_base(arguments.base_model)}. It continues text in the style of its "
            "training data; it knows nothing else, and its statements are not reliable.",
            usage=USAGE.format(prompt=repr(prompt), max_new_tokens=min(64, arguments.context_length // 2)),
            adapter_usage=cards.CAUSAL_ADAPTER.format(vocab_size=self.config.vocab_size),
            results=f"On held-out text, {self.rows['validation'].scores}:\n\n{cards.losses_table(metrics)}",
            examples=f"## Samples\n\nPrompts in brackets: the beginnings of held-out texts. {self.sampling}.\n\n"
            f"Before training:\n\n{before}\n\nAfter training:\n\n{after}",
            task="text-generation",
            metrics=vars(self.test or result.after),
            data={"Corpus": f"{cards.dataset_name(arguments.dataset)}: {corpus}", "Tokenizer": self.tokenizer_facts},
            settings={"model": {name: getattr(self.config, name) for name in fields}},
        )


def starting_point(arguments: PretrainArguments) -> tuple[ScratchGPTConfig, Any]:
    """The model's config, and its tokenizer if it is pretrained; then its positions may lower the file's `context_length`."""
    if arguments.base_model:
        length = arguments.context_length if "context_length" in arguments.typed else max(arguments.stride, 2)
        config, tokenizer = load_config_and_tokenizer(arguments.base_model, length)
        arguments.context_length = min(arguments.context_length, config.max_position_embeddings)
        return config, tokenizer
    return model_config(arguments.model, arguments.vocab_size, arguments.context_length), None


def mixture(arguments: PretrainArguments, num_tokens: list[int]) -> list[float] | None:
    """The probability of each source, proportional to weight^alpha; None to draw every window once per epoch."""
    if not arguments.dataset_weights and arguments.mixing_alpha == 1:
        return None
    logarithms = arguments.mixing_alpha * np.log(arguments.dataset_weights or num_tokens)
    probabilities = np.exp(logarithms - logarithms.max())
    probabilities /= probabilities.sum()
    if probabilities.min() < MIN_PROBABILITY:
        rarest = arguments.dataset[int(probabilities.argmin())]
        raise UserError(f"{rarest} would almost never be read (probability {probabilities.min():.1g}): lower --mixing_alpha.")
    return probabilities.tolist()


def main(argv: list[str] | None = None) -> None:
    run_recipe(PretrainRecipe, __doc__, argv)


if __name__ == "__main__":
    run_main(main)
