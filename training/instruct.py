"""Instruction tuning: from a pretrained GPT and conversations to a model that answers, and stops.

    accelerate launch training/instruct.py
    accelerate launch training/instruct.py --dataset alpaca.json --base_model outputs/pretrain --output_dir outputs/alpaca
    accelerate launch training/instruct.py --dataset alpaca.json --lora_r 16 --output_dir outputs/lora

By default it reads training/configs/instruct.yaml, and fine-tunes the model of `training/pretrain.py` to describe a Python
function from its signature. training/judge.py has the answers of a finished run graded by another language model.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from transformers import GenerationConfig

from modeling_scratchgpt import ScratchGPTForCausalLM
from training.cli import option, run_main
from training.data import prompts
from training.data.conversations import ConversationArguments, check_conversations, read_conversations
from training.data.datasets import PackedExamples, PaddedExamples, padded_dataloader, sort_by_length, train_dataloader
from training.data.samplers import LengthGroupedBatchSampler, MixtureBatchSampler
from training.engine import pretrained
from training.engine.arguments import EpochArguments, resolve_epochs
from training.engine.flops import flops_per_token
from training.engine.metrics import LMMetrics, evaluate
from training.engine.run_folder import ADAPTER, RESPONSES, RESPONSES_PAGE, SCORES
from training.engine.train import TrainResult
from training.errors import UserError, printable
from training.recipe import Recipe, run_recipe
from training.results import cards, responses
from training.results.markdown import block, plain

MIN_LENGTH = 8  # tokens
NUM_PREVIEWS, PREVIEW_TOKENS, PREVIEW_CHARACTERS = 3, 64, 200

USAGE = f"""from transformers import pipeline

chat = pipeline("text-generation", model="{cards.MODEL_PLACEHOLDER}", trust_remote_code=True)
messages = [{{{{"role": "user", "content": {{question}}}}}}]
print(chat(messages)[0]["generated_text"][-1]["content"])"""

IMPORTS = "import AutoModelForCausalLM"
LOAD_ADAPTER = cards.CAUSAL_ADAPTER.replace(IMPORTS, f"{IMPORTS}, AutoTokenizer, GenerationConfig, pipeline")
ADAPTER_USAGE = f"""{LOAD_ADAPTER}.merge_and_unload()
model.generation_config = GenerationConfig.from_pretrained("{cards.MODEL_PLACEHOLDER}")
tokenizer = AutoTokenizer.from_pretrained("{cards.MODEL_PLACEHOLDER}", trust_remote_code=True)
chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
{USAGE.partition("trust_remote_code=True)")[2].lstrip()}"""


@dataclass
class InstructArguments(pretrained.TuningArguments, EpochArguments, ConversationArguments):
    WITHOUT_EFFECT: ClassVar[set[str]] = EpochArguments.WITHOUT_EFFECT | {"max_new_tokens", "repetition_penalty"}
    config: str = option("training/configs/instruct.yaml", "YAML file with values for any of these arguments")
    chat_template: str = option(
        "", f"{', '.join(prompts.CHAT_TEMPLATES)}, or a file with a Jinja chat template; default: the model's own, else chat"
    )
    completion_only_loss: bool = option(True, "compute the loss on the answers only, not on the prompts")
    packing: bool = option(False, "pack several conversations into a row, where they do not see each other, instead of padding")
    context_length: int = option(0, "maximum tokens per conversation, longer are dropped; 0: the model's maximum", minimum=0)
    max_new_tokens: int = option(256, "maximum tokens per answer; at most half of the model's positions", minimum=1)
    repetition_penalty: float = option(1.2, "repetition penalty, 1: off; small models repeat themselves", minimum=1, maximum=10)
    output_dir: str = option("outputs/instruct", "new directory for the model")


class InstructRecipe(Recipe[LMMetrics]):
    """Language modeling on the assistant's messages of conversations, rendered by a chat template."""

    arguments_class = InstructArguments
    usage = "pipeline('text-generation', {path}, trust_remote_code=True)"

    def __init__(self, arguments: InstructArguments, accelerator: Accelerator):
        super().__init__(arguments, accelerator)
        length, num_layers = max(arguments.context_length, MIN_LENGTH), arguments.train_last_n_layers
        config, self.tokenizer = pretrained.load_config_and_tokenizer(arguments.base_model, length, num_layers)
        self.max_length = arguments.context_length or config.max_position_embeddings
        template = prompts.get_chat_template(arguments.chat_template, self.tokenizer)
        self.num_new_tokens = prompts.set_up_chat_template(self.tokenizer, template, config.max_position_embeddings)
        self.vocab_size = max(len(self.tokenizer), config.vocab_size)  # embeddings may have rows without a token
        accelerator.print(f"Reading {cards.dataset_name(arguments.dataset)}")
        with accelerator.local_main_process_first():  # the first process of each machine fills the cache
            self.conversations = read_conversations(arguments, template.input_mark)
        self._tokenize()
        self._report_data()
        self._prepare_training_rows()
        self.dataloaders = {split: self._evaluation_dataloader(split) for split in self.tokenized if split != "train"}
        train, validation = self.tokenized["train"], self.tokenized["validation"].conversations
        by_question = {conversation.prompt[-1]["content"]: conversation.prompt for conversation in validation}
        self.previewed = list(by_question.values())[:NUM_PREVIEWS]
        self.data_digest = prompts.digest(self.tokenized)
        length = int(train.lengths.mean())
        blocks = None if num_layers < 0 or self.num_new_tokens else num_layers
        # Of a token with a label; the tokens without one cost the same, except for the head.
        read, labels = train.lengths.sum(), np.asarray(train.examples.loss_mask).sum()
        with_head, body = (flops_per_token(config, length, bool(arguments.lora_r), head, blocks) for head in (True, False))
        self.flops_per_token = with_head + body * (read / labels - 1)
        self.test_results: dict[str, dict[str, Any]] = {}
        self.response_rows: list[dict[str, Any]] = []

    @staticmethod
    def check(arguments: InstructArguments) -> None:
        pretrained.check_tuning(arguments)
        if 0 < arguments.context_length < MIN_LENGTH:
            raise UserError(f"--context_length must be at least {MIN_LENGTH}, got {arguments.context_length}.")
        check_conversations(arguments)

    def _tokenize(self) -> None:
        """Token ids of each split that is not empty; the loss on prompts, if any, is for training only."""
        self.tokenized: dict[str, prompts.TokenizedConversations] = {}
        splits = {name: split for name, split in self.conversations.splits.items() if split}
        for name, split in splits.items():
            completion_only_loss = self.arguments.completion_only_loss or name != "train"
            tokenized = prompts.tokenize_conversations(split, self.tokenizer, self.max_length, completion_only_loss)
            self.tokenized[name] = tokenized
            if not len(tokenized):
                longer = f"{tokenized.num_too_long:,} are longer than {self.max_length} tokens (use a larger --context_length)"
                special = f"the others contain special tokens: {', '.join(sorted({*tokenized.special})) or 'none'}"
                raise UserError(f"the {name} split is empty: of {len(split):,} conversations {longer}, {special}.")
        # Of the validation data, since the training loss may be on more than the answers.
        self.stop_token_id = prompts.stop_token_id(self.tokenized["validation"], self.tokenizer)

    def _report_data(self) -> None:
        """Print sizes, what was dropped, and an example."""
        print_, leaked, tokenized = self.accelerator.print, self.conversations.leaked, self.tokenized
        special = [token for split in tokenized.values() for token in split.special]
        examples = f" ({', '.join(sorted({*special})[:3])})" if special else ""
        openings = {conversation.group for split in tokenized.values() for conversation in split.conversations}
        print_(
            f"Conversations: {self._sizes()}; each of their {len(openings):,} prompts is in one split only\n"
            f"Ignored columns: {', '.join(map(printable, self.conversations.unused)) or 'none'}\n"
            f"Dropped: {self.conversations.duplicates:,} duplicates; {leaked['train']:,} of train and "
            f"{leaked['validation']:,} of validation that begin with the prompt of a later split; "
            f"{sum(split.num_too_long for split in tokenized.values()):,} longer than {self.max_length:,} tokens; "
            f"{len(special):,} with a special token in their text{examples}"
        )
        print_(f"New tokens: {self.num_new_tokens}. An example, with the tokens of the loss in brackets:\n")
        print_(printable(prompts.render_with_loss_mask(tokenized["train"], 0, self.tokenizer)), "\n")

    def _sizes(self) -> str:
        return ", ".join(f"{name} {len(split):,}" for name, split in self.tokenized.items())

    def _prepare_training_rows(self) -> None:
        """Pack the conversations if the arguments say so, and count the steps of an epoch."""
        arguments, examples = self.arguments, self.tokenized["train"].examples
        self.rows: PackedExamples | PaddedExamples = PaddedExamples(examples)
        if arguments.packing:
            self.num_graphs = 1
            self.rows = PackedExamples(examples, self.max_length, self.tokenizer.pad_token_id)
            used = f"{self.rows.efficiency:.1%} of the positions hold a token"
            self.accelerator.print(f"Packed into {len(self.rows):,} rows: {used}")
        if arguments.batch_size > len(self.rows):
            raise UserError(f"--batch_size {arguments.batch_size} is more than the {len(self.rows)} training rows: lower it.")
        self.arguments = resolve_epochs(arguments, len(self.rows))

    def _evaluation_dataloader(self, split: str) -> DataLoader:
        """Every conversation once, the longest first, in batches that all processes can share: empty rows fill them up."""
        order = sort_by_length(self.tokenized[split].lengths)
        batch_size = min(4 * self.arguments.batch_size, len(order))
        batch_size += -batch_size % self.accelerator.num_processes
        order += [-1] * (-len(order) % batch_size)
        rows = PaddedExamples(self.tokenized[split].examples)
        dataloader = padded_dataloader(rows, self.tokenizer.pad_token_id, batch_size=batch_size, sampler=order)
        return self.accelerator.prepare(dataloader)

    def build_model(self) -> ScratchGPTForCausalLM:
        """The base model with embeddings for the new tokens, which are always trained, with the matrices they are part of."""
        arguments, tokenizer = self.arguments, self.tokenizer
        set_seed(arguments.seed)
        lora = pretrained.lora_config(arguments, ["embed_tokens", "lm_head"] if self.num_new_tokens else None)
        options: Any = {"num_tokens": len(tokenizer), **pretrained.dropout_fields(arguments.dropout)}
        model: ScratchGPTForCausalLM = pretrained.load_pretrained(ScratchGPTForCausalLM, arguments.base_model, lora, **options)
        if arguments.train_last_n_layers >= 0:
            embeddings = [model.get_input_embeddings()] if self.num_new_tokens else []
            pretrained.freeze(model, arguments.train_last_n_layers, model.lm_head, *embeddings)
        model.generation_config = self.generation_config = GenerationConfig(
            do_sample=False,
            repetition_penalty=arguments.repetition_penalty,  # Keskar et al., 2019, "CTRL"
            max_new_tokens=min(arguments.max_new_tokens, model.config.max_position_embeddings // 2),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=self.stop_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.config.eos_token_id, model.config.pad_token_id = self.stop_token_id, tokenizer.pad_token_id
        return model

    def train_dataloader(self) -> DataLoader:
        size, seed, accumulation = self.arguments.batch_size, self.arguments.seed, self.arguments.gradient_accumulation_steps
        num_batches = self.arguments.max_steps * accumulation
        if self.arguments.packing:
            return train_dataloader([self.rows], MixtureBatchSampler([len(self.rows)], size, num_batches, seed))
        sampler = LengthGroupedBatchSampler(self.tokenized["train"].lengths, size, num_batches, seed, accumulation)
        return padded_dataloader(self.rows, self.tokenizer.pad_token_id, batch_sampler=sampler)

    def evaluate(self, model: nn.Module, split: str = "validation") -> LMMetrics:
        return evaluate(self.accelerator, model, self.dataloaders[split], self.tokenized[split].examples.num_bytes)

    def preview(self, model: Any) -> list[str]:
        max_new_tokens = min(PREVIEW_TOKENS, model.generation_config.max_new_tokens)
        answers = responses.respond(model, self.tokenizer, self.previewed, len(self.previewed), max_new_tokens)
        pairs = ((prompt[-1]["content"], str(answer)) for prompt, answer in zip(self.previewed, answers, strict=True))
        return [f"[{plain(question, PREVIEW_CHARACTERS)}] {plain(answer, PREVIEW_CHARACTERS)}" for question, answer in pairs]

    def evaluate_test(self, model: Any) -> None:
        """Also generate the answers of this model and of the base to all prompts of the test split, and score them."""
        if "test" not in self.tokenized:
            return
        accelerator, conversations = self.accelerator, self.tokenized["test"].conversations
        metrics = self.evaluate(model, "test")
        base = self.build_model().to(accelerator.device)
        questions = [conversation.prompt for conversation in conversations]
        options = {"batch_size": 2 * self.arguments.batch_size, "max_new_tokens": model.generation_config.max_new_tokens}
        tuned = responses.respond_distributed(accelerator, model, self.tokenizer, questions, "Answering", **options)
        untuned = responses.respond_distributed(accelerator, base, self.tokenizer, questions, "Answering (base)", **options)
        scores, base_scores = (responses.score_responses(answers, conversations) for answers in (tuned, untuned))
        self.test_results = {"test": {**vars(metrics), **vars(scores)}, "base": vars(base_scores)}
        self.response_rows = responses.response_rows(conversations, untuned, tuned)
        accelerator.print(f"Test split, evaluated once, at the end: {metrics}\nAnswers: {scores}; of the base: {base_scores}\n")

    def held_out_rows(self) -> Iterable[dict[str, Any]]:
        return ({"messages": conversation.messages} for conversation in self.tokenized["validation"].conversations)

    def write_results(self, directory: Path, result: TrainResult[LMMetrics]) -> None:
        (directory / SCORES).write_text(json.dumps(self._results(result), indent=2), encoding="utf-8")
        if self.response_rows:
            responses.write_responses(directory, self.response_rows)
        if (directory / ADAPTER).is_dir():
            self.generation_config.save_pretrained(directory / ADAPTER)

    def card(self, result: TrainResult[LMMetrics]) -> cards.CardContent:
        results, dataset = self._results(result), cards.dataset_name(self.arguments.dataset)
        examples = "## Answers\n\nHeld-out prompts in brackets:\n\n" + block("\n\n".join(result.preview_after))
        if self.response_rows:
            page, rows = (f"[{name}]({name})" for name in (RESPONSES_PAGE, RESPONSES))
            examples = f"The answers to the test split are side by side in {page}, all of them in {rows}.\n\n{examples}"
        question = repr(self.previewed[0][-1]["content"])
        return cards.CardContent(
            introduction=f"A small GPT, {cards.describe_base(self.arguments.base_model)} to follow instructions. It answers in "
            f"the style of {dataset}; its statements are not reliable.",
            usage=USAGE.format(question=question),
            adapter_usage=ADAPTER_USAGE.format(question=question, vocab_size=self.vocab_size),
            results=responses.results_table(results),
            examples=examples,
            task="text-generation",
            metrics=results["test" if "test" in results else "validation"],
            data={"Conversations": f"{dataset}: {self._sizes()}"},
        )

    def _results(self, result: TrainResult[LMMetrics]) -> dict[str, dict[str, Any]]:
        return {"before": vars(result.before), "validation": vars(result.after), **self.test_results}


def main(argv: list[str] | None = None) -> None:
    run_recipe(InstructRecipe, __doc__, argv)


if __name__ == "__main__":
    run_main(main)
