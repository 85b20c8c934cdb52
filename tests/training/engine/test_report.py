"""What a user sees of a run, compared with arithmetic by hand."""

import io
import os
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import GenerationConfig

from modeling_scratchgpt import ScratchGPTTokenizer
from training import progress
from training.engine.loop import Step
from training.engine.report import ProgressBar, describe_sampling, duration, make_prompts, sample
from training.progress import bar_options


def test_progress_bar_shows_loss_speed_and_mfu():
    with ProgressBar(10, Accelerator(), flops_per_token=3_000.0, peak=6e6) as bar:
        bar.log(Step(1, loss=4.0, grad_norm=1.0, learning_rate=0.1, tokens=800, seconds=2.0))
        # 800 tokens / 2 s = 400 tokens/s; 400 tokens/s x 3,000 FLOP / 6,000,000 FLOP/s = 20 %
        assert "1/10" in str(bar)
        assert "loss 4.000, 400 tokens/s, MFU 20%, " in str(bar)
        bar.log(Step(2, loss=2.0, grad_norm=1.0, learning_rate=0.1, tokens=600, seconds=0.5))
        # The mean of both steps: (4 + 2) / 2 = 3; (400 + 1,200) / 2 = 800 tokens/s; 800 x 3,000 / 6,000,000 = 40 %
        assert "2/10" in str(bar)
        assert "loss 3.000, 800 tokens/s, MFU 40%, " in str(bar)
        bar.log(
            Step(3, loss=3.0, grad_norm=1.0, learning_rate=0.1, tokens=60_000, seconds=1.0)
        )  # the peak was measured too low
        assert "MFU 100%, " in str(bar)


def test_the_memory_is_that_of_the_device_that_is_used(monkeypatch):
    """Here of a CPU, beside a GPU."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with ProgressBar(10, accelerator, flops_per_token=1.0, peak=1.0) as bar:
        bar.log(Step(1, loss=4.0, grad_norm=1.0, tokens=800, seconds=2.0))
        assert float(re.search(r"(\d+\.\d) GB", str(bar))[1]) > 0


def test_samples_are_the_same_each_time_and_leave_other_gpus_alone(tiny_model, monkeypatch):
    """By default `fork_rng` saves the state of all eight, and warns, in every process."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    tokenizer = SimpleNamespace(batch_decode=lambda parts, **options: [str(part) for part in parts])
    tiny_model.generation_config.update(do_sample=True)
    state = torch.get_rng_state()
    first, second = (sample(tiny_model, [[3, 4], [5]], 4, tokenizer) for _ in range(2))
    assert first == second
    assert first[0].startswith("[[3, 4]][")
    assert torch.equal(torch.get_rng_state(), state)


def test_prompts_of_texts_without_spaces_are_not_empty():
    tokenizer = ScratchGPTTokenizer.train(["to be or not to be"] * 9, 290)
    tokenizer.bos_token = None  # as Qwen3's
    texts = ["海" * 100, "https://example.com/" + "x" * 100, "to be\n" * 20]
    prompts = [tokenizer.decode(prompt) for prompt in make_prompts(texts, tokenizer)]
    assert prompts == [texts[0][:60], texts[1][:60], texts[2][:60]]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"do_sample": True, "temperature": 0.8, "top_k": 50}, "Temperature 0.8, top-k 50"),
        ({"do_sample": True, "top_p": 0.95}, "Top-p 0.95"),
        ({}, "Greedy decoding"),
    ],
)
def test_the_card_says_how_samples_are_made(fields, text):
    assert describe_sampling(GenerationConfig(**fields)) == text


def test_a_file_gets_whole_lines_instead_of_a_bar(monkeypatch):
    """At most one every few seconds, and what is printed between them begins at a line's start."""
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    start = time.perf_counter()
    with ProgressBar(40, Accelerator(), flops_per_token=3.0, peak=6e6) as bar:
        for number in range(1, 41):
            time.sleep(0.005)
            bar.log(Step(number, loss=4.0, grad_norm=1.0, learning_rate=0.1, tokens=800, seconds=2.0))
            if number % 20 == 0:
                for _ in tqdm(range(9), desc="Evaluating", leave=False, **bar_options()):
                    pass
                bar.print(f"step {number}: loss 4.000")
    elapsed = time.perf_counter() - start
    lines = file.getvalue().split("\n")
    evaluations = [line for line in lines if re.match("step [0-9]+:", line)]
    assert evaluations == ["step 20: loss 4.000", "step 40: loss 4.000"]
    progress_lines = [line for line in lines if line and line not in evaluations]
    pattern = r"step \d+/40: loss 4\.000, 400 tokens/s, MFU 0%, \d+\.\d GB, \d\d:\d\d left"
    assert all(re.fullmatch(pattern, line) for line in progress_lines), progress_lines
    assert 1 <= len(progress_lines) <= 2 + elapsed / 0.05
    for part in ("\r", "|", "Training"):
        assert part not in file.getvalue()


def test_lines_in_a_file_keep_their_first_letter_and_a_closed_one_gets_none(monkeypatch):
    """The codes that move the cursor end in an A."""
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(progress, "SECONDS", 0)
    for _ in tqdm(range(3), desc="Answering", leave=False, **bar_options()):
        pass
    assert re.match("(Answering: [0-3] of 3.*\n)+$", file.getvalue())
    monkeypatch.setattr(file, "write", lambda text: os.write(closed, b"x"))
    closed = os.pipe()[1]
    os.close(closed)
    for _ in tqdm(range(3), desc="Answering", leave=False, **bar_options()):
        pass
    monkeypatch.setattr(sys, "stderr", None)
    assert bar_options() == {"disable": True}


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3.0 seconds"), (150, "2.5 minutes"), (9000, "2.5 hours"), (200000, "2.3 days")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
