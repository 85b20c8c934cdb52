"""Preference tuning: DPO (Rafailov et al., 2023) with TRL, on pairs of a chosen and a rejected answer.

    pip install -c constraints.txt -e '.[trl]'
    python examples/dpo.py outputs/instruct instruction-data-with-preference.json outputs/preferred

Notable:
- The prompts are written by the chat template of the model, so that training and inference use the same tokens.
- Only LoRA adapters are trained. Without them the model is its own reference: no second copy is in memory.
- The reward of an answer is beta x (its log-probability - its log-probability under the reference). Before training all rewards
  are equal, so accuracy and margin are 0.
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer

from modeling_scratchgpt.atomic import atomic_directory  # the import also registers the model with the Auto classes


def to_preference(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Convert instruction, input, chosen and rejected to messages; the prompt is joined as by training/instruct.py."""
    question = "\n".join(filter(None, (row["instruction"], row["input"])))
    answers = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": question}], **answers}


def report(when: str, metrics: dict[str, float]) -> None:
    accuracy, margin = metrics["eval_rewards/accuracies"], metrics["eval_rewards/margins"]
    print(f"{when} training, on held-out pairs: reward accuracy {accuracy:.1%}, reward margin {margin:.3f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory of training/instruct.py")
    parser.add_argument("data", help="a JSON file of rows with instruction, input, chosen and rejected")
    parser.add_argument("output_dir", help="new directory for the tuned model")
    parser.add_argument("--max_steps", type=int, default=-1, help="optimizer steps (-1: one epoch)")
    arguments = parser.parse_args(argv)
    if not Path(arguments.data).is_file():
        parser.error(f"{arguments.data} is not a file: pass the JSON file of pairs.")
    if Path(arguments.output_dir).exists():
        parser.error(f"{arguments.output_dir} already exists: pass a new directory, or move it.")

    rows = load_dataset("json", data_files=arguments.data, split="train")
    rows = rows.filter(lambda row: row["chosen"] != row["rejected"])
    pairs = rows.map(to_preference, remove_columns=rows.column_names).train_test_split(test_size=0.1, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.model),
        args=DPOConfig(
            output_dir=arguments.output_dir,
            max_steps=arguments.max_steps,
            num_train_epochs=1,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            max_length=256,
            gradient_checkpointing=False,
            bf16=False,  # True on a GPU
            save_strategy="no",
        ),
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.remove_callback(PrinterCallback)
    report("Before", trainer.evaluate())
    trainer.train()
    report("After", trainer.evaluate())
    with atomic_directory(Path(arguments.output_dir)) as directory:
        trainer.model.merge_and_unload().save_pretrained(directory)
        tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()
