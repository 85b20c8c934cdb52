"""LoRA on the linear layers of transformers' architectures, compared with PEFT, which loads the adapter that we have saved."""

import copy
from typing import Any

import peft
import pytest
import torch
import transformers

from modeling_scratchgpt.lora import LoraConfig, add_adapter, lora_layers, save_adapter

# Fields of most configs, then those of single ones.
TINY = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 12}
IMAGES = {"image_size": 8, "patch_size": 4}
SOUNDS = {**SEQ2SEQ, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {}, "MistralForCausalLM": {}, "GemmaForCausalLM": {}, "Gemma2ForCausalLM": {}, "PhiForCausalLM": {},
    "Phi3ForCausalLM": {}, "Qwen2ForCausalLM": {}, "Qwen3ForCausalLM": {}, "GPTNeoXForCausalLM": {},
    "FalconForCausalLM": {"head_dim": None},
    "OPTForCausalLM": {"ffn_dim": 20, "word_embed_proj_dim": 12}, "BloomForCausalLM": {"n_head": 2, "n_layer": 1},
    "MixtralForCausalLM": EXPERTS, "Qwen3MoeForCausalLM": EXPERTS, "BertForSequenceClassification": {},
    "RobertaForTokenClassification": {},
    "DistilBertForQuestionAnswering": {"dim": 16, "hidden_dim": 20, "n_heads": 2, "n_layers": 1},
    "AlbertForSequenceClassification": {"embedding_size": 12}, "DebertaV2ForSequenceClassification": {},
    "T5ForConditionalGeneration": T5, "BartForConditionalGeneration": SEQ2SEQ, "ViTForImageClassification": IMAGES,
    "WhisperForConditionalGeneration": SOUNDS, "CLIPVisionModelWithProjection": IMAGES,
}  # fmt: skip


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 15).view(2, 6)
    decoder = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    main = {
        "pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8),
        "input_features": torch.linspace(-1, 1, 2 * 4 * 16).view(2, 4, 16),
        "input_ids": ids,
    }
    return {model.main_input_name: main[model.main_input_name], **decoder}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_training_step_equals_pefts(name, tmp_path):
    model_class = getattr(transformers, name)
    fields = {field: value for field, value in {**TINY, **ARCHITECTURES[name]}.items() if value is not None}
    ours = model_class(model_class.config_class(**fields)).eval()
    base = copy.deepcopy(ours)
    add_adapter(ours, LoraConfig(r=2, init_lora_weights=False))
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert len(lora_layers(ours)) == sum(hasattr(module, "lora_A") for module in theirs.modules())
    for _ in range(2):
        outputs = [model(**inputs_of(ours))[0] for model in (ours, theirs)]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
        for model, output in zip((ours, theirs), outputs, strict=True):
            output.square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
                        parameter.grad = None
