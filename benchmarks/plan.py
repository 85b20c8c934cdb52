"""What training/plan.py predicts beside what happens: memory and time of a training step, for several shapes.

    python benchmarks/plan.py

Each prediction and each measurement is a process of its own. Measured are the peak memory of the whole process (on a GPU: what
torch has allocated) and the mean step of a longer run.
"""

import argparse
import json
import statistics

from measuring import apart, peak_bytes

from training.cli import model_config, parse_arguments
from training.engine.loop import start_accelerator
from training.plan import PROBE_SECONDS, device_memory, peak_memory, probe
from training.pretrain import PretrainArguments

MEASURED_SECONDS = 20.0
GPT2 = "--model preset=124M"
SHAPES = {
    "the recipe": "",
    "the recipe, with AdamW": "--optimizer adamw",
    "GPT-2, 6 x 384, vocabulary 50,257": f"{GPT2} num_hidden_layers=6 hidden_size=384 num_attention_heads=6 "
    "--vocab_size 50257 --batch_size 8",
    "the same, 4 micro-batches": f"{GPT2} num_hidden_layers=6 hidden_size=384 num_attention_heads=6 "
    "--vocab_size 50257 --batch_size 2 --gradient_accumulation_steps 4",
    "GPT-2 124M": f"{GPT2} --vocab_size 50257 --batch_size 2",
    "GPT-2 124M, with AdamW": f"{GPT2} --vocab_size 50257 --batch_size 2 --optimizer adamw",
    "modern, 8 x 512, context 512": "--model num_hidden_layers=8 hidden_size=512 num_attention_heads=8 num_key_value_heads=2 "
    "--context_length 512 --batch_size 8",
    "the same, gradient checkpointing": "--model num_hidden_layers=8 hidden_size=512 num_attention_heads=8 "
    "num_key_value_heads=2 --context_length 512 --batch_size 8 --gradient_checkpointing true",
}


def look(shape: str, seconds: float) -> dict[str, float]:
    """Predicted and measured memory in bytes, and the seconds of the median and the mean step of a run of so many seconds."""
    arguments = parse_arguments(PretrainArguments, "", SHAPES[shape].split())
    accelerator = start_accelerator()
    config = model_config(arguments.model, arguments.vocab_size, arguments.context_length)
    _, libraries, reuses = device_memory(accelerator.device)
    predicted = peak_memory(config, arguments, arguments.batch_size, libraries, reuses)
    taken = probe(accelerator, arguments, config, seconds)
    return {
        "predicted": sum(predicted.values()),
        "peak": peak_bytes(),
        "median": statistics.median(taken),
        "mean": statistics.mean(taken),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.shape:
        print(json.dumps(look(arguments.shape, arguments.seconds)))
        return
    print("| | memory: predicted | measured | | step: predicted | measured | |\n|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        before, after = (apart("--shape", shape, "--seconds", seconds) for seconds in (PROBE_SECONDS, MEASURED_SECONDS))
        memory, time = before["predicted"] / after["peak"] - 1, before["median"] / after["mean"] - 1
        print(
            f"| {shape} | {before['predicted'] / 1e9:.2f} GB | {after['peak'] / 1e9:.2f} GB | {memory:+.0%} "
            f"| {before['median']:.3f} s | {after['mean']:.3f} s | {time:+.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
