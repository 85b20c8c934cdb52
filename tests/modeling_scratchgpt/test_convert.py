"""Conversion by the command in both directions, compared with the original models."""

import base64
import json
import os
import pickle
import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from modeling_scratchgpt.convert import reading
from modeling_scratchgpt.convert.tensorflow import crc32c, read_tensorflow_checkpoint
from tests.conftest import TINY, shaken
from tests.modeling_scratchgpt.test_interchange import GPT2, difference


def test_a_gpt2_directory_becomes_a_complete_scratchgpt(real_data, tmp_path, convert):
    files = real_data / "gpt2-tokenizer"
    theirs = shaken(GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=3))).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "gpt2")
    shutil.copy(files / "encoder.json", tmp_path / "gpt2" / "vocab.json")
    shutil.copy(files / "vocab.bpe", tmp_path / "gpt2" / "merges.txt")
    output = convert(tmp_path / "gpt2", tmp_path / "new" / "ours")
    assert "GPT2LMHeadModel of transformers; 1," in output
    assert "Tokenizer: 50,257 tokens" in output
    assert "Largest difference from GPT2LMHeadModel in transformers: " in output
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "ours")
    assert type(ours) is ScratchGPTForCausalLM
    assert ours.dtype == torch.bfloat16
    assert difference(ours.float(), theirs.float()) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new" / "ours")
    assert type(tokenizer) is ScratchGPTTokenizer
    assert (
        tokenizer("Hello, naïve world")["input_ids"]
        == AutoTokenizer.from_pretrained(tmp_path / "gpt2")("Hello, naïve world")["input_ids"]
    )
    assert tokenizer.eos_token_id == ours.config.eos_token_id == 50256


def test_openais_checkpoint(real_data, tmp_path, convert):
    source = real_data / "openai-tf-toy"
    output = convert(source, tmp_path / "ours")
    assert "OpenAI's checkpoint for TensorFlow" in output
    assert "No tokenizer: " in output  # the merges of the toy produce tokens that are not in its vocabulary
    ours = ScratchGPTForCausalLM.from_pretrained(tmp_path / "ours")
    arrays = read_tensorflow_checkpoint(source / "model.ckpt.index")
    config = GPT2Config(vocab_size=356, n_positions=20, n_embd=15, n_head=5, n_layer=3)
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for block, theirs_block in enumerate(theirs.transformer.h):
            for name, parameter in theirs_block.named_parameters():
                path = name.replace(".weight", ".g" if name.startswith("ln") else ".w").replace(".bias", ".b").replace(".", "/")
                parameter.copy_(torch.tensor(arrays[f"model/h{block}/{path}"]).view_as(parameter))
        theirs.transformer.wte.weight.copy_(torch.tensor(arrays["model/wte"]))
        theirs.transformer.wpe.weight.copy_(torch.tensor(arrays["model/wpe"]))
        theirs.transformer.ln_f.weight.copy_(torch.tensor(arrays["model/ln_f/g"]))
        theirs.transformer.ln_f.bias.copy_(torch.tensor(arrays["model/ln_f/b"]))
    assert difference(ours, theirs) < 1e-6


def test_the_checksum_is_crc32c():
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # the check value of the CRC catalogue
    assert crc32c(np.zeros(32, np.uint8)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(np.arange(32, dtype=np.uint8)) == 0x46DD794E
    long = np.random.default_rng(0).integers(0, 256, 200_001, dtype=np.uint8)
    state = 0xFFFFFFFF
    for byte in long.tolist():
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    assert crc32c(long) == state ^ 0xFFFFFFFF


def sorting_gpt(real_data: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """minGPT's sorting model, as its author's script saves it, and its activations."""

    def tensor(entry: dict) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(base64.b64decode(entry["data"]), dtype="<f4").reshape(entry["shape"]).copy())

    content = json.loads((real_data / "gpt-nano-sort" / "gpt-nano-sort-model.json").read_text())
    activations = json.loads((real_data / "gpt-nano-sort" / "gpt-nano-sort-t0-partials.json").read_text())
    state = {name: tensor(entry) for name, entry in content.items() if name != "config"}
    return state, {name: tensor(entry) for name, entry in activations.items() if isinstance(entry, dict) and "data" in entry}


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_mingpts_sorter_sorts(ending, real_data, tmp_path, convert, refused):
    state, activations = sorting_gpt(real_data)
    file = tmp_path / f"model.{ending}"
    torch.save(state, file) if ending == "pt" else save_file(state, file)
    message = refused(file, tmp_path / "ours")
    assert f"{file} does not contain its number of heads: pass --num_attention_heads" in message
    assert "does not divide the width" in refused(file, tmp_path / "ours", "--num_attention_heads", 5)
    output = convert(file, tmp_path / "ours", "--num_attention_heads", 3)
    assert "85,728 parameters" in output
    ours = ScratchGPTForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        output = ours(activations["idx"].long(), output_hidden_states=True)
        torch.testing.assert_close(output.logits, activations["lm_head"], atol=1e-5, rtol=1e-5)
        for layer in range(3):
            torch.testing.assert_close(
                output.hidden_states[layer], activations["x" if layer == 0 else f"block{layer - 1}"], atol=1e-5, rtol=1e-5
            )
        unsorted = torch.tensor(list(product(range(3), repeat=6)))
        answers = ours.generate(unsorted, attention_mask=torch.ones_like(unsorted), max_new_tokens=5, do_sample=False)
        last = ours(answers).logits[:, -1].argmax(-1, keepdim=True)  # the eleven positions hold all but the sixth digit
    assert torch.equal(torch.cat([answers[:, 6:], last], dim=1), unsorted.sort(dim=1).values)


def nanogpt(bias: bool, vocab_size: int = 90) -> tuple[dict, GPT2LMHeadModel]:
    """A checkpoint as nanoGPT's train.py saves it with torch.compile, and the equivalent GPT-2."""
    fields = {**GPT2, "vocab_size": vocab_size, "activation_function": "gelu"}
    theirs = shaken(GPT2LMHeadModel(GPT2Config(**fields)))
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith(".bias") and not bias:
            tensor.zero_()
        elif name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            state[f"_orig_mod.{name}"] = tensor.T.contiguous()
        else:
            state[f"_orig_mod.{name}"] = tensor
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 32, "bias": bias, "vocab_size": vocab_size, "dropout": 0}
    training = {
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "device": "cpu"},
    }
    return {"model": state, "model_args": sizes, "iter_num": 5, **training}, theirs


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint(bias, tmp_path, convert):
    content, theirs = nanogpt(bias)
    (tmp_path / "out").mkdir()
    torch.save(content, tmp_path / "out" / "ckpt.pt")
    output = convert(tmp_path / "out", tmp_path / "ours")
    assert "nanoGPT's checkpoint" in output
    ours = ScratchGPTForCausalLM.from_pretrained(tmp_path / "ours")
    assert difference(ours, theirs) < 1e-5
    assert ours.config.attention_bias == ours.config.mlp_bias == bias


@pytest.mark.parametrize("table_file", ["out/meta.pkl", "data/shakespeare_char/meta.pkl"])  # copied, and where nanoGPT has it
def test_nanogpts_characters_become_the_tokenizer_without_unpickling(tmp_path, convert, refused, table_file):
    characters = sorted(set("to be, or not to be\n")) + [chr(0x4E00 + index) for index in range(77)]
    content, _ = nanogpt(False)
    checkpoint, table_path = tmp_path / "out" / "ckpt.pt", tmp_path / table_file
    for directory in {checkpoint.parent, table_path.parent}:
        directory.mkdir(parents=True)
    torch.save({**content, "config": {"dataset": "shakespeare_char"}}, checkpoint)
    table = {
        "vocab_size": 90,
        "itos": dict(enumerate(characters)),
        "stoi": {text: index for index, text in enumerate(characters)},
    }
    table_path.write_bytes(pickle.dumps(table))
    assert f"Tokenizer: {len(characters)} tokens" in convert(checkpoint, tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    ids = tokenizer("to be,\nor not")["input_ids"]
    assert ids == [characters.index(character) for character in "to be,\nor not"]
    assert tokenizer.decode(ids) == "to be,\nor not"
    for text in ("to be 12345", "naïve"):
        with pytest.raises(ValueError, match="characters or words outside the vocabulary, which has no unknown token"):
            tokenizer(text)

    table_path.write_bytes(pickle.dumps({"stoi": Explosive(tmp_path / "ran")}))
    message = refused(checkpoint, tmp_path / "again")
    assert "meta.pkl is not nanoGPT's table of characters" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_plain_pickle_is_read_without_unpickling(protocol):
    stoi = {chr(index): index for index in range(70_000) if not 0xD800 <= index < 0xE000}
    table = {"vocab_size": len(stoi), "itos": {index: text for text, index in stoi.items()}, "stoi": stoi, "empty": {}}
    assert reading.parse_plain_pickle(pickle.dumps(table, protocol)) == table
    with pytest.raises(ValueError, match="it contains more than dictionaries, strings and integers"):
        reading.parse_plain_pickle(pickle.dumps({"stoi": 0.5}, protocol))
    assert reading.parse_plain_pickle(b"\x80\x02K\x01r\xff\xff\xff\x7f.") == 1  # without memory for 2**31 memo entries


class Explosive:
    """Creates a directory when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@dataclass
class Settings:
    n_head: int = 3


def test_a_checkpoint_with_a_dataclass_says_what_to_do(tmp_path, convert, refused):
    content, theirs = nanogpt(True)
    torch.save(content | {"config": Settings()}, tmp_path / "ckpt.pt")
    message = refused(tmp_path / "ckpt.pt", tmp_path / "ours")
    assert "Save the state dict alone, with the program that made this file: torch.save(" in message
    state = content["model"]
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "new.pt")  # module._orig_mod.
    convert(tmp_path / "new.pt", tmp_path / "ours", "--num_attention_heads", 3, "--hidden_act", "gelu")
    assert difference(ScratchGPTForCausalLM.from_pretrained(tmp_path / "ours"), theirs) < 1e-5


def test_a_pickle_with_code_is_refused(tmp_path, refused):
    torch.save({"model": Explosive(tmp_path / "ran")}, tmp_path / "model.pt")
    message = refused(tmp_path / "model.pt", tmp_path / "ours", "--num_attention_heads", 3)
    assert "contains more than weights, which could run code" in message
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_named(real_data, tmp_path, refused):
    state, _ = sorting_gpt(real_data)
    heads = ("--num_attention_heads", 3)

    def saved(name: str, **changes: torch.Tensor | None) -> Path:
        changed = {**state, **{key.replace("__", "."): tensor for key, tensor in changes.items()}}
        torch.save({key: tensor for key, tensor in changed.items() if tensor is not None}, tmp_path / name)
        return tmp_path / name

    key = "transformer__h__1__mlp__c_fc__bias"
    for file, expected in (
        (saved("missing.pt", **{key: None}), "missing.pt lacks transformer.h.1.mlp.c_fc.bias"),
        (saved("surplus.pt", transformer__h__1__mlp__gate=torch.ones(3)), "has the unknown transformer.h.1.mlp.gate"),
        (saved("shape.pt", **{key: torch.ones(7)}), "transformer.h.1.mlp.c_fc.bias is (7,), expected (192,)"),
        (saved("other.pt", transformer__wte__weight=None), "'transformer.wte.weight' is missing"),
    ):
        assert expected in refused(file, tmp_path / "ours", *heads)
    whole = (tmp_path / "missing.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[: len(whole) // 2])
    assert "short.pt is damaged" in refused(tmp_path / "short.pt", tmp_path / "ours", *heads)
    save_file(state, tmp_path / "short.safetensors")
    os.truncate(tmp_path / "short.safetensors", 9000)
    assert "short.safetensors is damaged" in refused(tmp_path / "short.safetensors", tmp_path / "ours", *heads)
    (tmp_path / "text.pt").write_text("hello")
    assert "text.pt is" in refused(tmp_path / "text.pt", tmp_path / "ours", *heads)
    assert "nowhere" in refused(tmp_path / "nowhere", tmp_path / "ours")


@pytest.mark.parametrize("tensor_file", ["data", "index"])
def test_a_damaged_tensorflow_checkpoint_is_named(tensor_file, real_data, tmp_path, refused):
    source = tmp_path / "toy"
    shutil.copytree(real_data / "openai-tf-toy", source)
    (path,) = [path for path in source.glob("model.ckpt.*") if f".{tensor_file}" in path.name]
    whole = path.read_bytes()
    os.chmod(source, 0o755)
    os.chmod(path, 0o644)
    for damaged in (whole[:100], whole[:1200], b"", whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]):
        path.write_bytes(damaged)
        message = refused(source, tmp_path / "ours")
        assert "model.ckpt" in message
        assert "model/" in message or tensor_file == "index"
    path.unlink()
    refused(source, tmp_path / "ours")


def test_a_damaged_gpt2_folder_is_named(tmp_path, refused, monkeypatch):
    shaken(GPT2LMHeadModel(GPT2Config(**GPT2))).save_pretrained(tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    state = load_file(file)
    for changed, expected in (
        ({**state, "transformer.h.1.ln_1.weight": None}, "lacks model.layers.1.input_layernorm.weight"),
        ({**state, "transformer.h.1.ln_3.weight": torch.ones(3)}, "has the unknown model.layers.1.ln_3.weight"),
        ({**state, "transformer.h.1.ln_1.weight": torch.ones(3)}, "model.layers.1.input_layernorm.weight"),
    ):
        save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file, {"format": "pt"})
        message = refused(tmp_path / "gpt2", tmp_path / "ours")
        assert expected in message
        assert str(tmp_path / "gpt2") in message
    os.truncate(file, 5000)
    assert "model.safetensors is damaged" in refused(tmp_path / "gpt2", tmp_path / "ours")
    assert "exists: pass" in refused(tmp_path / "gpt2", tmp_path / "gpt2")
    monkeypatch.setenv("HOME", str(tmp_path))  # a quoted ~ or --tokenizer=~/gpt2, which a shell leaves as it is
    assert f"{tmp_path}/gpt2/model.safetensors is damaged" in refused("~/gpt2", Path("~/ours"))


def test_missing_sources_and_other_files_are_refused(tmp_path, refused):
    (tmp_path / "model.json").write_text("{}")
    output = refused(tmp_path / "model.json", tmp_path / "out")
    assert "is damaged or not a file of weights (ValueError: neither PyTorch nor safetensors)" in output
    output = refused(tmp_path / "nothing", tmp_path / "out")
    assert "nothing does not exist, and is not the id of a repository on the Hub" in output
    output = refused("someone/nothing", tmp_path / "out")
    assert "someone/nothing does not exist here, and the Hub did not provide it (" in output


# Errors and damaged files -------------------------------------------------------------------------------------------------


@pytest.fixture
def gpt2(tmp_path) -> Path:
    """A directory with a GPT-2."""
    shaken(GPT2LMHeadModel(GPT2Config(**GPT2))).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("[1, 2]", "is damaged or mislabeled"),
        ("[" * 100_000, "is damaged or mislabeled"),
        ({"n_embd": "24"}, "n_embd"),
        ({"n_layer": 10**9}, "num_hidden_layers must be at most 10,000"),
        ({"architectures": ["GPT2Config"]}, "is a GPT2Config, for which ScratchGPT has no head"),
        ({"quantization_config": "x"}, "is damaged or mislabeled"),
    ],
)
def test_invalid_configs_are_refused(changed, expected, gpt2, tmp_path, refused):
    file = gpt2 / "config.json"
    file.write_text(changed if isinstance(changed, str) else json.dumps({**json.loads(file.read_text()), **changed}))
    assert expected in refused(gpt2, tmp_path / "ours")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {"transformer.h.1.ln_1.weight": torch.full((24,), torch.nan)},
            "input_layernorm.weight has values that are not finite",
        ),
        ({"transformer.h.1.ln_1.weight": torch.ones(24, dtype=torch.int8)}, "transformer.h.1.ln_1.weight is of type I8"),
        ({"wpe.weight": torch.ones(32, 24)}, "has two tensors for one weight: transformer.wpe.weight and wpe.weight"),
    ],
)
def test_invalid_weights_are_refused(changed, expected, gpt2, tmp_path, refused):
    file = gpt2 / "model.safetensors"
    save_file({**load_file(file), **changed}, file, {"format": "pt"})
    assert expected in refused(gpt2, tmp_path / "ours")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"transformer.h.9.ln_1.weight": torch.ones(24)}, "has 3 layers, from 0 to 9: some are missing"),
        ({"transformer.wte.weight": torch.ones(90, 24)}, "has two tensors for transformer.wte.weight"),
        ({"_orig_mod.transformer.wte.weight": torch.ones(90, 24, dtype=torch.int32)}, "is of type torch.int32"),
    ],
)
def test_invalid_checkpoints_are_refused(changed, expected, tmp_path, refused):
    checkpoint, _ = nanogpt(bias=True)
    checkpoint["model"] |= changed
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert expected in refused(tmp_path / "ckpt.pt", tmp_path / "ours")


def test_a_checkpoint_without_its_number_of_heads(tmp_path, convert, refused):
    checkpoint, theirs = nanogpt(bias=True)
    torch.save({"model": checkpoint["model"]}, tmp_path / "ckpt.pt")
    assert "pass --num_attention_heads" in refused(tmp_path / "ckpt.pt", tmp_path / "ours")
    convert(tmp_path / "ckpt.pt", tmp_path / "ours", "--num_attention_heads", theirs.config.n_head)
    assert difference(ScratchGPTForCausalLM.from_pretrained(tmp_path / "ours"), theirs) < 1e-5


def test_weights_of_several_precisions_get_the_highest(tmp_path, convert):
    checkpoint, theirs = nanogpt(bias=True)
    checkpoint["model"] = {
        name: tensor if ".ln_" in name else tensor.bfloat16() for name, tensor in checkpoint["model"].items()
    }
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    convert(tmp_path / "ckpt.pt", tmp_path / "ours")
    ours = ScratchGPTForCausalLM.from_pretrained(tmp_path / "ours")
    assert ours.dtype == torch.float32
    assert difference(ours, theirs) < 0.1


def test_a_flipped_bit_in_a_checkpoint_is_detected(tmp_path, refused):
    file = tmp_path / "ckpt.pt"
    torch.save(nanogpt(bias=True)[0], file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # inside a matrix
    file.write_bytes(content)
    assert "is wrong" in refused(file, tmp_path / "ours")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--type", "q8_0"], "--type q8_0 is for --to gguf"),
        (["--num_attention_heads", 3], "contains its heads and its activation"),
        (["--tokenizer", ""], "--tokenizer : "),
        (["--tokenizer", "nowhere/at/all"], "--tokenizer nowhere/at/all: that of nowhere/at/all cannot be read"),
        (["--hidden_act", "nope"], "--hidden_act nope is unknown to transformers: choose one of "),
    ],
)
def test_options_that_do_not_apply_are_refused(words, expected, gpt2, tmp_path, refused):
    assert expected in refused(gpt2, tmp_path / "ours", *words)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(gpt2, tmp_path, refused):
    ScratchGPTTokenizer.train(["to be, or not to be"] * 9, 290).save_pretrained(tmp_path / "tokenizer")
    message = refused(gpt2, tmp_path / "ours", "--tokenizer", tmp_path / "tokenizer")
    assert "but the model 90 embeddings" in message


def test_no_code_beside_a_tokenizer_runs(gpt2, tmp_path, refused):
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass E: pass\n")
    (evil / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [None, "evil.E"]}, "tokenizer_class": "E"})
    )
    refused(gpt2, tmp_path / "ours", "--tokenizer", evil)
    assert not (tmp_path / "ran").exists()


def test_all_settings_of_a_tokenizer_are_kept_in_both_directions(tmp_path, convert):
    tokenizer = ScratchGPTTokenizer.train(["to be, or not to be"] * 9, 280, kind="bpe")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]})
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "ours")
    settings = {"padding_side": "left", "truncation_side": "left", "add_prefix_space": True, "split_special_tokens": True}
    settings |= {"model_input_names": ["input_ids"], "clean_up_tokenization_spaces": True}
    tokenizer = ScratchGPTTokenizer.from_pretrained(tmp_path / "ours", **settings)
    tokenizer.save_pretrained(tmp_path / "ours")
    ScratchGPTForCausalLM(ScratchGPTConfig(**TINY)).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "gpt2", "--to", "gpt2")
    convert(tmp_path / "gpt2", tmp_path / "back")
    for folder in ("ours", "gpt2", "back"):
        other = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert {name: getattr(other, name) for name in settings} == settings
        assert other.chat_template == tokenizer.chat_template
        assert "<|tool|>" in other.all_special_tokens
        text = "to be<|eos|> or"
        assert other(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert len(other("to", padding="max_length")["input_ids"]) == (1 if folder == "ours" else 64)  # no maximum, positions


@pytest.mark.parametrize("settings", [None, {"do_lower_case": True}])
def test_a_tokenizer_of_a_vocab_txt_alone(settings, gpt2, tmp_path, convert):
    if settings:
        (gpt2 / "tokenizer_config.json").write_text(json.dumps(settings))
    (gpt2 / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "to", "be"]))
    assert "Tokenizer: 7 tokens" in convert(gpt2, tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer("To be")["input_ids"] == transformers.BertTokenizer.from_pretrained(gpt2)("To be")["input_ids"]
    assert tokenizer.model_max_length == 32
    ScratchGPTForCausalLM.from_pretrained(tmp_path / "ours").generate(**tokenizer("to", return_tensors="pt"), max_new_tokens=1)


@pytest.mark.parametrize("pad_token_id", [None, 2])
def test_a_classifier_needs_no_padding(pad_token_id, tmp_path, convert):
    theirs = transformers.GPT2ForSequenceClassification(GPT2Config(**{**GPT2, "vocab_size": 4}, pad_token_id=pad_token_id))
    theirs.save_pretrained(tmp_path / "gpt2")
    output = convert(tmp_path / "gpt2", tmp_path / "ours")
    assert "is a ScratchGPT without a tokenizer: AutoModelForSequenceClassification.from_pretrained(" in output


def test_an_untied_head_despite_a_config_that_says_tied(gpt2, tmp_path, convert):
    file = gpt2 / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": torch.randn(90, 24)}, file, {"format": "pt"})
    convert(gpt2, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    convert(tmp_path / "ours", tmp_path / "back", "--to", "gpt2")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    assert difference(ScratchGPTForCausalLM.from_pretrained(tmp_path / "ours"), theirs) < 1e-5


def test_an_interrupt_leaves_nothing(gpt2, tmp_path, convert, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modeling_scratchgpt.convert.__main__._write", interrupted)
    with pytest.raises(SystemExit) as caught:
        convert(gpt2, tmp_path / "ours")
    assert caught.value.code == 130
    assert {path.name for path in tmp_path.iterdir()} == {"gpt2"}
