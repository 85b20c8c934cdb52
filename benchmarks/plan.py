"""Predictions of training/plan.py compared with measurements: memory and time of a training step, for several shapes.

    python benchmarks/plan.py

Each prediction and each measurement is a process of its own. The measurements are the peak memory of the process (on a GPU:
what torch has allocated) and the mean step of a longer run.
"""

import argparse
import json
import statistics

from measuring import make_parser, peak_bytes, run_in_subprocess

from training.cli import model_config, parse_arguments
from training.engine.loop import start_accelerator
from training.plan import PROBE_SECONDS, device_memory, peak_memory, probe
from training.pretrain import PretrainArguments

MEASURED_SECONDS = 20.0
GPT2 = "--model preset=124M"
SMALL_GPT2 = f"{GPT2} num_hidden_layers=6 hidden_size=384 num_attention_heads=6 --vocab_size 50257"
MODERN = "--model num_hidden_layers=8 hidden_size=512 num_attention_heads=8 num_key_value_heads=2 --context_length 512"
SHAPES = {
    "the recipe": "",
    "the recipe, with AdamW": "--optimizer adamw",
    "GPT-2, 6 x 384, vocabulary 50,257": f"{SMALL_GPT2} --batch_size 8",
    "the same, 4 micro-batches": f"{SMALL_GPT2} --batch_size 2 --gradient_accumulation_steps 4",
    "GPT-2 124M": f"{GPT2} --vocab_size 50257 --batch_size 2",
    "GPT-2 124M, with AdamW": f"{GPT2} --vocab_size 50257 --batch_size 2 --optimizer adamw",
    "modern, 8 x 512, context 512": f"{MODERN} --batch_size 8",
    "the same, gradient checkpointing": f"{MODERN} --batch_size 8 --gradient_checkpointing true",
}


def predict_or_measure(shape: str, is_prediction: bool) -> dict[str, float]:
    """Bytes and seconds of a training step."""
    arguments = parse_arguments(PretrainArguments, "", SHAPES[shape].split())
    accelerator = start_accelerator()
    config = model_config(arguments.model, arguments.vocab_size, arguments.context_length)
    if not is_prediction:
        seconds = statistics.mean(probe(accelerator, arguments, config, MEASURED_SECONDS))
        return {"memory": peak_bytes(), "seconds": seconds}
    _, libraries, reuses = device_memory(accelerator.device)
    memory = peak_memory(config, arguments, arguments.batch_size, accelerator.device, reuses)
    seconds = statistics.median(probe(accelerator, arguments, config, PROBE_SECONDS))
    return {"memory": libraries + sum(memory.values()), "seconds": seconds}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--predict", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.shape:
        print(json.dumps(predict_or_measure(arguments.shape, arguments.predict)))
        return
    print("| | memory: predicted | measured | | step: predicted | measured | |\n|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        predicted, measured = run_in_subprocess("--shape", shape, "--predict"), run_in_subprocess("--shape", shape)
        memory, seconds = (predicted[name] / measured[name] - 1 for name in ("memory", "seconds"))
        print(
            f"| {shape} | {predicted['memory'] / 1e9:.2f} GB | {measured['memory'] / 1e9:.2f} GB | {memory:+.0%} "
            f"| {predicted['seconds']:.3f} s | {measured['seconds']:.3f} s | {seconds:+.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
