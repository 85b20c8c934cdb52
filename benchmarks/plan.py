"""Predictions of training/plan.py compared with measurements: memory and time of a training step, for several shapes.

    python benchmarks/plan.py

Each prediction and each measurement is a process of its own. The measurements are the peak memory of the process (on a GPU:
what torch has allocated) and the mean step of a longer run.
"""

import statistics

from accelerate import Accelerator
from measuring import make_parser, peak_bytes, run_in_subprocess

from modeling_scratchgpt import ScratchGPTConfig
from training.cli import model_config, parse_arguments
from training.engine.launch import start_accelerator
from training.plan import PROBE_SECONDS, predict_memory, probe
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


def set_up(options: str) -> tuple[Accelerator, PretrainArguments, ScratchGPTConfig]:
    arguments = parse_arguments(PretrainArguments, "", options.split())
    return start_accelerator(), arguments, model_config(arguments.model, arguments.vocab_size, arguments.context_length)


def predict(options: str) -> tuple[int, float]:
    """Bytes and seconds of a training step, as training/plan.py predicts them."""
    run = set_up(options)
    return sum(predict_memory(*run).values()), statistics.median(probe(*run, PROBE_SECONDS))


def measure(options: str) -> tuple[float, float]:
    """Bytes and seconds of a training step."""
    seconds = statistics.mean(probe(*set_up(options), MEASURED_SECONDS))
    return peak_bytes(), seconds


def main() -> None:
    make_parser(__doc__).parse_args()
    print("| | memory: predicted | measured | | step: predicted | measured | |\n|---|---|---|---|---|---|---|")
    for shape, options in SHAPES.items():
        (memory, seconds), (real_memory, real_seconds) = (
            run_in_subprocess(function, options) for function in (predict, measure)
        )
        memories = f"{memory / 1e9:.2f} GB | {real_memory / 1e9:.2f} GB | {memory / real_memory - 1:+.0%}"
        times = f"{seconds:.3f} s | {real_seconds:.3f} s | {seconds / real_seconds - 1:+.0%}"
        print(f"| {shape} | {memories} | {times} |", flush=True)


if __name__ == "__main__":
    main()
