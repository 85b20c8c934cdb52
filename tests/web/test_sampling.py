"""The page's sampling of the next token, in Node, against the processors of transformers."""

import json
import subprocess

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.conftest import ROOT

pytestmark = pytest.mark.web


@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (0.5, 7, 1.0), (0.8, 0, 0.6), (1.3, 9, 0.8), (0, 5, 0.5)])
def test_sampling_excludes_what_transformers_excludes(node_modules, settings):
    temperature, top_k, top_p = settings
    logits = torch.randn(1, 50)
    program = f"""
        import {{ distribution, sample }} from "{ROOT / "space" / "web" / "sampling.js"}";
        const settings = {{ temperature: {temperature}, top_k: {top_k}, top_p: {top_p} }};
        const logits = Float32Array.from({logits[0].tolist()});
        const {{ rows, kept }} = distribution(logits, settings, 50);
        const drawn = Array.from({{ length: 999 }}, (_, step) => sample(logits, settings, step / 999));
        console.log(JSON.stringify([rows.slice(0, kept).map(({{ id }}) => id), rows.map((row) => row.probability), drawn]));
    """
    result = subprocess.run(["node", "--input-type=module", "-e", program], capture_output=True, text=True)
    kept, probabilities, drawn = json.loads(result.stdout)
    scores = logits.clone()
    if temperature:
        scores = TemperatureLogitsWarper(temperature)(None, scores)
        assert probabilities == pytest.approx(scores[0].softmax(-1).sort(descending=True).values.tolist())
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        scores = TopPLogitsWarper(top_p)(None, scores)
    else:
        scores.masked_fill_(scores < scores.max(), -torch.inf)
    assert set(kept) == set(scores[0].isfinite().nonzero().flatten().tolist())
    frequencies = torch.bincount(torch.tensor(drawn), minlength=50) / 999
    assert frequencies.tolist() == pytest.approx(scores[0].softmax(-1).tolist(), abs=0.002)
