"""What `import modeling_scratchgpt` costs and gives, in processes that have imported nothing else."""

import subprocess
import sys

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from tests.conftest import TINY


def run_alone(program: str, *words: object) -> None:
    command = [sys.executable, "-c", "import sys, modeling_scratchgpt\n" + program, *map(str, words)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr


def test_models_are_imported_when_one_is_named():
    """A tokenizer is trained without the slow parts of transformers."""
    run_alone("""
slow = {"transformers.modeling_utils", "transformers.core_model_loading", "transformers.activations", "torch._dynamo"}
modeling_scratchgpt.ScratchGPTTokenizer.train(["to be or not to be"] * 9, vocab_size=270)
assert {"torch", "transformers"} < sys.modules.keys()
assert set(modeling_scratchgpt.__all__) <= set(dir(modeling_scratchgpt))
try:
    modeling_scratchgpt.Nothing
except AttributeError as error:
    assert str(error) == "module 'modeling_scratchgpt' has no attribute 'Nothing'"
else:
    raise AssertionError("Nothing is there")
assert not slow & sys.modules.keys()

from modeling_scratchgpt import *
assert issubclass(ScratchGPTModel, ScratchGPTPreTrainedModel)
assert slow < sys.modules.keys()
""")


def test_auto_classes_import_them(tmp_path):
    """From a folder, then from a config, with no model named before; and what is saved carries its code."""
    ScratchGPTForCausalLM(ScratchGPTConfig(**TINY)).save_pretrained(tmp_path / "base")
    run_alone(
        """
import transformers
folder = sys.argv[1]
tokens = transformers.AutoModelForTokenClassification
stands_for = tokens._model_mapping[modeling_scratchgpt.ScratchGPTConfig]
assert stands_for.__name__ == "ScratchGPTForTokenClassification" and "transformers.modeling_utils" not in sys.modules
model, report = tokens.from_pretrained(f"{folder}/base", output_loading_info=True)
assert set(report["missing_keys"]) == {"score.weight", "score.bias"}
assert type(stands_for(model.config)) is type(model) and stands_for.base_model_prefix == "model"
for head in ("", "ForCausalLM", "ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification"):
    auto_class, name = getattr(transformers, f"AutoModel{head}"), f"ScratchGPT{head or 'Model'}"
    model = auto_class.from_config(model.config)
    assert type(model) is auto_class._model_mapping[type(model.config)] is getattr(modeling_scratchgpt, name)
    assert type(model).__module__ == "modeling_scratchgpt.modeling_scratchgpt"
    model.save_pretrained(f"{folder}/{name}")
""",
        tmp_path,
    )
    assert len(list(tmp_path.glob("ScratchGPT*/modeling_scratchgpt.py"))) == 5
