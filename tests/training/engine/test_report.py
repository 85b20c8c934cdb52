"""What a user sees of a run, compared with arithmetic by hand."""

import pytest
from accelerate import Accelerator

from training.engine.loop import Step
from training.engine.report import ProgressBar, duration


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


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3.0 seconds"), (150, "2.5 minutes"), (9000, "2.5 hours"), (200000, "2.3 days")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
