"""LoRA compared with PEFT from the same initial weights: training and files."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTForSequenceClassification
from modeling_scratchgpt.lora import LoraConfig, add_adapter, load_adapter, merge_and_unload, save_adapter
from modeling_scratchgpt.lora.files import WEIGHTS
from tests.conftest import MODERN, TINY, on_two_processes, shaken
from tests.modeling_scratchgpt.test_interchange import QWEN3

IDS = torch.arange(24).view(2, 12)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "dropout": {"lora_dropout": 0.2},
    "DoRA with dropout": {"use_dora": True, "lora_dropout": 0.2},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"down_proj": 3}},
    "one layer": {"target_modules": ["q_proj", "mlp.up_proj"], "layers_to_transform": [1]},
    "a pattern of names": {"target_modules": r"model\.layers\.\d\.self_attn\.[qv]_proj"},
    "all but some": {"exclude_modules": ["o_proj"]},
    "all biases": {"bias": "all"},
    "biases of the layers": {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "tied embeddings": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "norms": {"modules_to_save": ["norm"]},
}


def base(**fields: Any) -> ScratchGPTForCausalLM:
    torch.manual_seed(0)
    return shaken(ScratchGPTForCausalLM(ScratchGPTConfig(**{**TINY, **fields})), 0.05).train()


def both(folder: Path, kind: dict[str, Any], **fields: Any) -> tuple[ScratchGPTForCausalLM, peft.PeftModel]:
    """Our model with an adapter, and PEFT's with the same weights, loaded from our file."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "ensure_weight_tying": False, **kind}
    ours = base(**fields)
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(**copy.deepcopy(settings)))
    add_adapter(ours, LoraConfig(**settings))
    save_adapter(ours, folder)
    result = peft.set_peft_model_state_dict(theirs, load_file(folder / WEIGHTS))
    assert not result.unexpected_keys
    return ours, theirs


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest relative difference between tensors of the same name."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).norm() / second[name].norm().clamp(min=1e-12)) for name in first)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients under names common to our LoRA and PEFT."""
    result = {}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".default", "")
            for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
                name = name.replace(f"{part}.weight", part)
            result[name] = parameter.grad.clone()
    return result


def saved_by_peft(model: torch.nn.Module, folder: Path, **settings: Any) -> peft.PeftModel:
    """A copy of the model with an adapter and a head that are not zero, made and saved by PEFT."""
    config = peft.LoraConfig(**{"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **settings})
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_training_steps_equal_pefts(kind, tmp_path):
    tied = kind == "tied embeddings"
    ours, theirs = both(tmp_path, KINDS[kind], tie_word_embeddings=tied)
    models = (ours.train(), theirs.train())
    optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3) for model in models]
    for step in range(50):
        ids = torch.randint(0, 20, (4, 12), generator=torch.Generator().manual_seed(step))
        losses = []
        for model in models:
            torch.manual_seed(step)  # of dropout
            losses.append(model(input_ids=ids, labels=ids, skip_logits=False).loss)
            losses[-1].backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
        if step == 0:
            assert apart(gradients(ours), gradients(theirs)) < 1e-6
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    save_adapter(ours, tmp_path)
    assert apart(load_file(tmp_path / WEIGHTS), peft.get_peft_model_state_dict(theirs)) < 1e-6
    assert losses[0] < 5.6  # it started at 5.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fields", [{"tie_word_embeddings": True}, {**MODERN, "tie_word_embeddings": False}], ids=["gpt2", "modern"]
)
def test_each_loads_what_the_other_has_saved(kind, fields, tmp_path):
    if "bias" in KINDS[kind]:
        fields = {**fields, "attention_bias": True, "mlp_bias": True}
    ours, theirs = both(tmp_path / "0", KINDS[kind], **fields)
    with torch.no_grad():
        for name, parameter in [*ours.named_parameters(), *theirs.named_parameters()]:
            if parameter.requires_grad:  # nonzero adapters
                torch.manual_seed(sum(map(ord, name)))
                parameter.add_(0.1 * torch.randn_like(parameter))
        ours.eval()
        theirs.eval()
        save_adapter(ours, tmp_path / "ours")
        read = peft.PeftModel.from_pretrained(base(**fields), tmp_path / "ours").eval()
        torch.testing.assert_close(read(IDS).logits, ours(IDS).logits, atol=1e-5, rtol=1e-5)

        theirs.save_pretrained(tmp_path / "theirs")
        model = base(**fields).eval()
        load_adapter(model, tmp_path / "theirs")
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        merged = theirs.merge_and_unload()
        torch.testing.assert_close(merge_and_unload(model)(IDS).logits, merged(IDS).logits, atol=1e-5, rtol=1e-5)


def test_missing_fields_have_pefts_defaults(tmp_path):
    model = base(num_hidden_layers=1)
    saved_by_peft(model, tmp_path, r=8, lora_alpha=32, use_rslora=True, alpha_pattern={"q_proj": 3})
    file = tmp_path / "adapter_config.json"
    complete = json.loads(file.read_text())
    for field in dataclasses.fields(LoraConfig):
        file.write_text(json.dumps({name: value for name, value in complete.items() if name != field.name}))
        ours, theirs = copy.deepcopy(model), peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
        load_adapter(ours, tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5, msg=field.name)


def test_classifiers_of_peft_with_their_heads(tmp_path):
    """PEFT adds names of heads that a classifier might have."""
    model = ScratchGPTForSequenceClassification(ScratchGPTConfig(**TINY, num_labels=3)).eval()
    theirs = saved_by_peft(model, tmp_path, task_type="SEQ_CLS")
    assert "classifier" in json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changed", [False, True])
def test_embeddings_that_peft_saves_beside_an_adapter(changed, tmp_path):
    model = base().eval()
    theirs = saved_by_peft(model, tmp_path, target_modules=["lm_head", "q_proj"])
    if changed:
        with torch.no_grad():
            theirs.get_output_embeddings().base_layer.weight.add_(1.0)
        theirs.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has its own embeddings, .*, which is not supported: load it with PEFT"):
            load_adapter(model, tmp_path)
    else:
        load_adapter(model, tmp_path)
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["a model of transformers with linear layers", "a rank above that of narrow matrices"])
def test_adapters_that_peft_has_made_for_other_models(kind, tmp_path):
    is_qwen = kind.startswith("a model")
    model = Qwen3ForCausalLM(Qwen3Config(**QWEN3)).eval() if is_qwen else base(**{**MODERN, "num_key_value_heads": 1}).eval()
    theirs = saved_by_peft(model, tmp_path, r=3 if is_qwen else 16)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("feature", "value"),
    [
        ("use_qalora", True),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("trainable_token_indices", [3]),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("target_parameters", ["mlp.weight"]),
        ("something_new", {"a": 1}),
        ("init_lora_weights", "orthogonal"),
        ("init_lora_weights", "pissa_niter_4"),
    ],
)
def test_features_that_only_peft_supports_are_refused_by_name(feature, value, tmp_path):
    both(tmp_path, {})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, feature: value}))
    with pytest.raises(ValueError, match=f"{feature} is .*, which is not supported: load it with PEFT"):
        load_adapter(base(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
    with pytest.raises(ValueError, match="peft_type is 'LOHA', only LORA is supported: load it with PEFT"):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize("fields", [{}, MODERN], ids=["gpt2", "modern"])
def test_peft_knows_the_default_target_modules(fields):
    model = peft.get_peft_model(base(**fields), peft.LoraConfig())
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"} | ({"gate_proj"} if fields else set())


def train_on_two_processes(kind: str, folder: Path) -> None:
    folder = folder / str(dist.get_rank())
    models = both(folder, KINDS[kind])
    wrapped = [DistributedDataParallel(model.train()) for model in models]
    optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3) for model in models]
    for step in range(50):
        ids = torch.randint(0, 300, (4, 12), generator=torch.Generator().manual_seed(2 * step + dist.get_rank()))
        for model, optimizer in zip(wrapped, optimizers, strict=True):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if step == 0:
            assert apart(*map(gradients, models)) < 1e-6
        for optimizer in optimizers:
            optimizer.step()
    save_adapter(models[0], folder)
    mine = load_file(folder / WEIGHTS)
    assert apart(mine, peft.get_peft_model_state_dict(models[1])) < 1e-6
    for tensor in mine.values():  # equal on both processes
        other = tensor.clone()
        dist.broadcast(other, 0)
        assert torch.equal(tensor, other)


def test_training_on_two_processes_equals_pefts(tmp_path):
    on_two_processes(train_on_two_processes, tmp_path, *((kind, tmp_path / kind) for kind in ("plain", "rsLoRA", "DoRA")))
