"""Fine-tune a pretrained GPT to follow instructions: from a model folder and conversations to a model that answers, and stops.

    accelerate launch training/instruct.py
    accelerate launch training/instruct.py --dataset alpaca.json --base_model outputs/pretrain --output_dir outputs/alpaca
    accelerate launch training/instruct.py --dataset alpaca.json --lora_r 16 --output_dir outputs/lora
    python training/instruct.py --judge outputs/alpaca --judge_url http://localhost:11434/v1 --judge_model llama3.2

With nothing given it reads training/configs/instruct.yaml and teaches the model of `training/pretrain.py` to say what a Python
signature does. `--judge` has the answers of a finished run graded by a language model, over HTTP.
"""

import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from transformers import GenerationConfig

from modeling_scratchgpt import ScratchGPTForCausalLM
from modeling_scratchgpt.lora import trainable_parameters
from training.cli import option, parse_arguments, run_main
from training.data.cache import atomic_file
from training.data.conversations import ConversationArguments, Conversations, check_conversations, read_conversations
from training.data.padding import LengthGroupedBatchSampler, in_order_of_length
from training.data.prompts import (
    CHAT_TEMPLATES,
    EncodedConversations,
    conversation_loader,
    digest,
    encode,
    get_chat_template,
    render_with_loss_mask,
    set_up_chat_template,
    stop_token_id,
)
from training.data.splits import SPLITS
from training.data.tokens import Tokens
from training.data.windows import Batches, PackedDocuments, training_loader
from training.engine.checkpoints import atomic_directory, full_state_dict
from training.engine.flops import flops_per_token
from training.engine.metrics import LMMetrics, evaluate
from training.engine.pretrained import (
    TuningArguments,
    check_tuning,
    dropout_fields,
    freeze,
    load_config_and_tokenizer,
    load_pretrained,
    lora_config,
    save_trained,
)
from training.engine.report import CURVE, draw_loss
from training.engine.train import EpochArguments, check_epochs, resolve_epochs, start, train
from training.errors import UserError, one_line, printable
from training.results.cards import (
    CARD,
    CAUSAL_ADAPTER,
    HERE,
    SCORES,
    dataset_name,
    hardware,
    origin,
    without_folders,
    write_card,
)
from training.results.judge import Judge, Verdicts, judge_all
from training.results.markdown import block, code, plain
from training.results.responses import (
    PAGE,
    RESPONSES,
    read_responses,
    respond,
    respond_together,
    response_rows,
    responses_page,
    score_responses,
    write_responses,
)

NUM_SHOWN, SHOWN_TOKENS, LINE = 3, 64, 200

USAGE = f"""from transformers import pipeline

chat = pipeline("text-generation", model="{HERE}", trust_remote_code=True)
messages = [{{{{"role": "user", "content": {{question}}}}}}]
print(chat(messages)[0]["generated_text"][-1]["content"])"""

EXAMPLES = f"""The answers to the test split stand side by side in [{PAGE}]({PAGE}), all of them in [{RESPONSES}]({RESPONSES}).

"""


@dataclass
class InstructArguments(EpochArguments, ConversationArguments, TuningArguments):
    RESUME_MAY_CHANGE: ClassVar[set[str]] = EpochArguments.RESUME_MAY_CHANGE | {
        "judge",
        "judge_url",
        "judge_model",
        "max_new_tokens",
        "repetition_penalty",
    }
    config: str = option("training/configs/instruct.yaml", "YAML file with values for any of these arguments.")
    chat_template: str = option(
        "",
        f"chat template: {', '.join(CHAT_TEMPLATES)}, or a file with a Jinja template; default: the model's own, else chat",
    )
    train_on_prompt: bool = option(False, "Learn to say the prompts too, and not the answers alone.")
    packing: bool = option(False, "Put several conversations into a row, each seen by itself, instead of padding.")
    context_length: int = option(0, "Most tokens of a conversation, longer ones are left out; 0: as many as the model takes.")
    max_new_tokens: int = option(256, "Most tokens of an answer; at most half of what the model can read.")
    repetition_penalty: float = option(
        1.2, "How much less likely a token gets that stands there already, 1 for not at all; small models repeat themselves."
    )
    output_dir: str = option("outputs/instruct", "New folder for the model.")
    judge: str = option("", "Folder of a finished run: only have its answers graded.")
    judge_url: str = option("", "Server that speaks OpenAI's protocol, up to /v1, to grade the answers; key: OPENAI_API_KEY.")
    judge_model: str = option("", "The name of its model.")


def check(arguments: InstructArguments, num_processes: int) -> None:
    """Refuse nonsense before any long work."""
    check_epochs(arguments, num_processes)
    check_tuning(arguments)
    if arguments.context_length and arguments.context_length < 8:
        raise UserError(f"--context_length must be at least 8, got {arguments.context_length}.")
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens must be at least 1, got {arguments.max_new_tokens}.")
    if not 1 <= arguments.repetition_penalty <= 10:
        raise UserError(f"--repetition_penalty must be between 1 and 10, got {arguments.repetition_penalty}.")
    check_conversations(arguments)
    if judge := judge_of(arguments):
        if not (arguments.test_fraction or arguments.test_dataset):
            raise UserError("--judge_url grades the answers to the test split: give a --test_fraction or a --test_dataset.")
        judge.check()


def judge_of(arguments: InstructArguments) -> Judge | None:
    """The judge, if there is to be one.

    Raises:
        UserError: half of what names it is missing, or it is no address.
    """
    if not (arguments.judge_url or arguments.judge_model or arguments.judge):
        return None
    for name in ("judge_url", "judge_model"):
        if not getattr(arguments, name):
            raise UserError(f"--{name} is missing: a judge is named by --judge_url and --judge_model.")
    if not arguments.judge_url.startswith(("http://", "https://")):
        raise UserError(f"--judge_url {arguments.judge_url} must begin with http:// or https://.")
    return Judge(arguments.judge_url, arguments.judge_model)


def first_model(arguments: InstructArguments, tokenizer: Any, num_new: int, stop: int) -> ScratchGPTForCausalLM:
    """The model as it is before the first step, the same whenever it is asked for. The rows of new tokens are always trained,
    with the matrices that they are in. It answers with the likeliest token each time, but for repetitions."""
    set_seed(arguments.seed)
    model: ScratchGPTForCausalLM = load_pretrained(
        ScratchGPTForCausalLM,
        arguments.base_model,
        lora_config(arguments, ["embed_tokens", "lm_head"] if num_new else None),
        num_tokens=len(tokenizer),
        **dropout_fields(arguments.dropout),
    )
    if arguments.train_last_n_layers >= 0:
        freeze(model, arguments.train_last_n_layers, model.lm_head, *([model.get_input_embeddings()] if num_new else []))
    model.generation_config = GenerationConfig(
        do_sample=False,
        repetition_penalty=arguments.repetition_penalty,  # Keskar et al., 2019, "CTRL"
        max_new_tokens=min(arguments.max_new_tokens, model.config.max_position_embeddings // 2),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def encoded_splits(
    conversations: Conversations, tokenizer: Any, max_length: int, train_on_prompt: bool
) -> dict[str, EncodedConversations]:
    """The splits that there are, as ids and labels; the prompts are learned in training alone, if at all.

    Raises:
        UserError: one of them holds nothing that is short enough.
    """
    texts = {}
    for name in SPLITS:
        if split := conversations.splits[name]:
            texts[name] = encode(split, tokenizer, max_length, train_on_prompt and name == "train")
            if not len(texts[name]):
                raise UserError(
                    f"of the {name} split nothing is left: of {len(split):,} conversations {texts[name].num_too_long:,} are "
                    f"longer than {max_length} tokens (give a longer --context_length), in the others stands a special token."
                )
    return texts


def described(conversations: Conversations, texts: dict[str, EncodedConversations], max_length: int) -> str:
    """How much there is of each split, and what was dropped, for people."""
    copies = " and ".join(f"{conversations.copies[name]:,} of {name}" for name in SPLITS[:2])
    return (
        f"Conversations: {sizes(texts)}\n"
        f"Dropped: {conversations.duplicates:,} duplicates; {copies} that begin with the prompt of a later split; "
        f"{sum(text.num_too_long for text in texts.values()):,} longer than {max_length:,} tokens; "
        f"{sum(text.num_spelled for text in texts.values()):,} whose text holds a special token"
    )


def sizes(texts: dict[str, EncodedConversations]) -> str:
    return ", ".join(f"{name} {len(text):,}" for name, text in texts.items())


def judge_responses(judge: Judge, folder: Path) -> None:
    """Have the answers in a folder graded; the grades go into its files, the card among them.

    Raises:
        UserError: the folder holds no answers; the judge does not answer.
    """
    try:
        rows = read_responses(folder)
        results = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        card = (folder / CARD).read_text(encoding="utf-8")
        table = results_table(results)
        responses_page(rows)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = one_line(error)
        raise UserError(f"{folder} holds no answers of a finished run with a test split ({reason}).") from error
    write_responses(folder, rows)  # if that cannot be, it is known before the first request
    try:
        verdicts = judge_all(judge, rows)
    finally:
        write_responses(folder, rows)  # the grades so far: the same command goes on with the others
    results["judge"] = {"model": without_folders(judge.model), **asdict(verdicts)}
    card = card.replace(table, results_table(results))
    for name, text in ((SCORES, json.dumps(results, indent=2)), (CARD, card)):
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"The judge {judge.model} says: {verdicts}. The grades are in {folder / PAGE} and {folder / RESPONSES}")


def results_table(results: dict[str, dict[str, Any]]) -> str:
    """Losses, and what is said of the answers, as Markdown."""
    lines = ["| | loss (nats per token) | perplexity | bits per byte |", "|---|---|---|---|"]
    for name, title in {"before": "validation, before", "validation": "validation", "test": "test"}.items():
        if it := results.get(name):
            lines.append(f"| {title} | {it['loss']:.3f} | {it['perplexity']:,.1f} | {it['bits_per_byte']:.3f} |")
    lines += ["", "The loss is that of the answers alone. The validation split was used in training, to follow it."]
    if "test" in results:
        lines[-1] += " The test split was used once, at the end."
        lines += ["", "| answers to the test split | ended by itself | word for word as expected | chrF |", "|---|---|---|---|"]
        for name, title in {"base": "the base", "test": "this model"}.items():
            it = results[name]
            lines.append(f"| {title} | {it['ended']:.1%} | {it['exact_match']:.1%} | {it['chrf']:.1f} |")
        if it := results.get("judge"):
            lines += ["", f"The judge {code(it['model'])} says: {Verdicts(it['mean'], it['graded'], it['malformed'])}."]
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments(InstructArguments, __doc__)
    judge = judge_of(arguments)
    if arguments.judge and judge:
        if PartialState().is_main_process:
            judge_responses(judge, Path(os.path.expanduser(arguments.judge)))
        return
    accelerator, output_dir = start(arguments, check)
    config, tokenizer = load_config_and_tokenizer(
        arguments.base_model, max(arguments.context_length, 8), arguments.train_last_n_layers
    )
    max_length = arguments.context_length or config.max_position_embeddings
    style = get_chat_template(arguments.chat_template, tokenizer)
    num_new = set_up_chat_template(tokenizer, style, config.max_position_embeddings)

    # Conversations -> ids -> batches. The first process of a machine fills the caches, the others read them.
    dataset = dataset_name(arguments.dataset)
    accelerator.print(f"Reading {dataset}")
    with accelerator.local_main_process_first():
        conversations = read_conversations(arguments, arguments.seed, style.input_mark)
    texts = encoded_splits(conversations, tokenizer, max_length, arguments.train_on_prompt)
    stop = stop_token_id(texts["train"], tokenizer)
    accelerator.print(described(conversations, texts, max_length))
    accelerator.print(f"New tokens: {num_new}. A conversation, with what is learned in brackets:\n")
    accelerator.print(printable(render_with_loss_mask(texts["train"], 0, tokenizer)), "\n")
    if arguments.packing:
        tokens = Tokens(texts["train"].ids, texts["train"].num_bytes, texts["train"].starts[:-1])
        packed = PackedDocuments(tokens, max_length, tokenizer.pad_token_id, texts["train"].labels)
        accelerator.print(f"Packed into {len(packed):,} rows: {packed.efficiency:.1%} of the places hold a token")
    num_rows = len(packed) if arguments.packing else len(texts["train"])
    if arguments.batch_size > num_rows:
        raise UserError(f"--batch_size {arguments.batch_size} is more than the {num_rows} rows to train on: lower it.")
    arguments = resolve_epochs(arguments, num_rows)

    first = partial(first_model, arguments, tokenizer, num_new, stop)
    model = first()
    accelerator.print(f"A GPT on {hardware(accelerator.num_processes)}: {trainable_parameters(model)}")

    def evaluation_batches(split: str) -> Any:
        rows = [*in_order_of_length(texts[split].lengths), *[-1] * (-len(texts[split]) % accelerator.num_processes)]
        batch_size = min(4 * arguments.batch_size, len(rows))
        rows += [-1] * (-len(rows) % batch_size)
        return accelerator.prepare(conversation_loader(texts[split], tokenizer, batch_size=batch_size, sampler=rows))

    def batches_from(start: int) -> DataLoader:
        num_batches = arguments.max_steps * arguments.gradient_accumulation_steps
        if arguments.packing:
            drawn = Batches([num_rows], arguments.batch_size, num_batches, arguments.seed, start=start)
            return training_loader([packed], drawn)
        batches = LengthGroupedBatchSampler(texts["train"].lengths, arguments.batch_size, num_batches, arguments.seed, start)
        return conversation_loader(texts["train"], tokenizer, batch_sampler=batches)

    validation_batches = evaluation_batches("validation")
    shown = list({talk.prompt[-1]["content"]: talk for talk in texts["validation"].conversations}.values())[:NUM_SHOWN]
    most_tokens: Any = model.generation_config.max_new_tokens  # type: ignore[union-attr]

    def score(prepared_model: nn.Module) -> LMMetrics:
        return evaluate(accelerator, prepared_model, validation_batches, texts["validation"].num_bytes)

    def show() -> str:
        prompts = [talk.prompt for talk in shown]
        answers = respond(model, tokenizer, prompts, len(prompts), min(SHOWN_TOKENS, most_tokens))
        pairs = zip(shown, answers, strict=True)
        return "\n".join(f"[{plain(talk.prompt[-1]['content'], LINE)}] {plain(str(it), LINE)}\n" for talk, it in pairs)

    flops = flops_per_token(
        config,
        int(texts["train"].lengths.mean()),
        frozen=bool(arguments.lora_r),
        trained_blocks=arguments.train_last_n_layers if arguments.train_last_n_layers >= 0 and not num_new else None,
    )
    outcome = train(accelerator, arguments, model, batches_from, digest(texts), score, show, flops)
    said = show()
    results: dict[str, dict[str, Any]] = {"before": vars(outcome.before), "validation": vars(outcome.after)}
    rows: list[dict[str, Any]] = []
    if "test" in texts:
        test = texts["test"]
        prompts = [talk.prompt for talk in test.conversations]
        how: Any = {"batch_size": 2 * arguments.batch_size, "max_new_tokens": most_tokens}
        result = evaluate(accelerator, model, evaluation_batches("test"), test.num_bytes)
        tuned = respond_together(accelerator, model, tokenizer, prompts, "Answering", **how)
        untuned: Any = first()
        base = respond_together(accelerator, untuned.to(accelerator.device), tokenizer, prompts, "The base answers", **how)
        scores, base_scores = (score_responses(answers, test.conversations) for answers in (tuned, base))
        results |= {"test": {**vars(result), **vars(scores)}, "base": vars(base_scores)}
        rows = response_rows(test.conversations, base, tuned)
        accelerator.print(f"On the test split, used only now: {result}\nAnswers: {scores}; of the base: {base_scores}\n")

    last = "test" if rows else "validation"
    weights = full_state_dict(model)
    if accelerator.is_main_process:
        with atomic_directory(output_dir) as folder:
            save_trained(folder, model, weights, tokenizer, first)
            (folder / SCORES).write_text(json.dumps(results, indent=2), encoding="utf-8")
            if rows:
                write_responses(folder, rows)
            draw_loss(outcome.metrics.rows, folder / CURVE, "nats per token")
            write_card(
                folder,
                arguments,
                accelerator,
                model,
                outcome,
                introduction=f"A small GPT, {origin(arguments.base_model)} to answer what it is asked. It does so in the "
                f"manner of {dataset}; what it says is not to be relied on.",
                usage=USAGE.format(question=repr(shown[0].prompt[-1]["content"])),
                adapter_usage=CAUSAL_ADAPTER.format(vocab_size=model.config.vocab_size),
                results=results_table(results),
                examples=f"{EXAMPLES if rows else ''}## What it answers\n\nHeld-out prompts in brackets:\n\n{block(said)}",
                task="text-generation",
                metrics=results[last],
                data={"Conversations": f"{dataset}: {sizes(texts)}"},
                settings={},
            )
    accelerator.print(
        f"Trained for {outcome}. The model, its card and its answers are in {output_dir}/:\n"
        f"    pipeline('text-generation', {str(output_dir)!r}, trust_remote_code=True)"
    )
    if judge and rows and accelerator.is_main_process:
        judge_responses(judge, output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
