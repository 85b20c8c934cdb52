"""Reinforcement learning: GRPO (Shao et al., 2024) with TRL. A tiny GPT learns to sort digits from the scores of its answers.

    pip install -c constraints.txt -e '.[trl]'
    python examples/grpo.py outputs/sort

The supervised warm start shows the digits of each prompt in random order: the model learns the format, but its answers are
sorted only by chance. GRPO samples several answers to each prompt and makes those likelier that score above the mean of their
group. A program computes the score (a verifiable reward).
"""

import argparse
import random
from pathlib import Path

from datasets import Dataset
from matplotlib.figure import Figure
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer

LENGTH, NUM_PROMPTS, NUM_HELD_OUT = 5, 6_000, 500
MODERN = {"position_embedding_type": "rotary", "norm_type": "rmsnorm", "qk_norm": True, "mlp_type": "gated"}
SHAPE = {"vocab_size": 15, "max_position_embeddings": 16, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def in_place(completions: list[str], answer: list[str], **columns: list) -> list[float]:
    """Reward: share of the places that have the right digit; 0 for an answer of another length."""
    return [sum(map(str.__eq__, a, b)) / LENGTH * (len(a) == LENGTH) for a, b in zip(completions, answer, strict=True)]


def is_sorted(completions: list[str], answer: list[str], **columns: list) -> list[float]:
    """Accuracy: 1 for a sorted answer, else 0. It is measured on the held-out prompts, but not rewarded."""
    return [float(a == b) for a, b in zip(completions, answer, strict=True)]


class PrintAccuracy(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **others) -> None:
        print(f"step {state.global_step}: {metrics['eval_rewards/is_sorted/mean']:.1%} of held-out prompts sorted", flush=True)


def draw(history: list[dict], path: str) -> None:
    """Accuracy over steps, as a PNG."""
    curve = {row["step"]: 100 * row["eval_rewards/is_sorted/mean"] for row in history if "eval_reward" in row}
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(curve), list(curve.values()), marker="o", markersize=4)
    axes.set(xlabel="step of GRPO", ylabel="held-out prompts sorted (%)", ylim=(0, 102))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", help="new directory for the model and the curve, accuracy.png")
    parser.add_argument("--sft_steps", type=int, default=300, help="steps of the supervised warm start")
    parser.add_argument("--max_steps", type=int, default=300, help="steps of GRPO")
    arguments = parser.parse_args(argv)
    if Path(arguments.output_dir).exists():
        parser.error(f"{arguments.output_dir} already exists: pass a new directory, or move it.")

    set_seed(0)
    texts = dict.fromkeys("".join(random.choices("0123456789", k=LENGTH)) for _ in range(NUM_PROMPTS))
    rows = [
        {"prompt": f"{text}=", "completion": "".join(random.sample(text, LENGTH)), "answer": "".join(sorted(text))}
        for text in texts
    ]
    splits = Dataset.from_list(rows).train_test_split(NUM_HELD_OUT, seed=0)

    tokenizer = ScratchGPTTokenizer.train(["0123456789="], vocab_size=15, kind="character")
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**SHAPE, **MODERN, bos_token_id=0, eos_token_id=1, pad_token_id=2))
    common = {"output_dir": arguments.output_dir, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3}
    common |= {"gradient_checkpointing": False, "bf16": False}  # bf16: True on a GPU
    args = SFTConfig(**common, max_steps=arguments.sft_steps, per_device_train_batch_size=64)
    trainer = SFTTrainer(model, args, train_dataset=splits["train"], processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    # Each step samples 8 answers to each of 64 prompts: the digits and EOS.
    common |= {"per_device_train_batch_size": 512, "num_generations": 8, "max_completion_length": LENGTH + 1}
    common |= {"eval_strategy": "steps", "eval_steps": 0.1, "eval_on_start": True, "num_generations_eval": 1}
    common |= {"max_steps": arguments.max_steps, "reward_weights": [1.0, 0.0], "per_device_eval_batch_size": NUM_HELD_OUT}
    rewards, args = [in_place, is_sorted], GRPOConfig(**common)
    trainer = GRPOTrainer(model, rewards, args, splits["train"], splits["test"], tokenizer, callbacks=[PrintAccuracy()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(arguments.output_dir)
    draw(trainer.state.log_history, f"{arguments.output_dir}/accuracy.png")


if __name__ == "__main__":
    main()
