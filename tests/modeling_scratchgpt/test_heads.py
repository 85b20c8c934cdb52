"""The heads: outputs, pooling, and losses that do not depend on the split of a batch."""

import inspect
import shutil
from functools import partial

import accelerate
import peft
import pytest
import torch
import transformers
from accelerate.big_modeling import attach_layerwise_casting_hooks
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    StaticCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import modeling_scratchgpt
from modeling_scratchgpt import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForQuestionAnswering,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
)
from modeling_scratchgpt.attention import eager_attention_forward
from modeling_scratchgpt.interchange import HEADS
from tests.conftest import TINY, shaken


def make(head_class, config: ScratchGPTConfig, **fields):
    return shaken(head_class(ScratchGPTConfig(**{**config.to_dict(), **fields})), 0.2)


def random_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_ignores_padding(tiny_config, side, pooling):
    """Even if the padding id is also EOS, which pooling by id would confuse."""
    model = make(ScratchGPTForSequenceClassification, tiny_config, num_labels=5, pad_token_id=1, classifier_pooling=pooling)
    ids, padding = random_ids(3, 9), torch.full((3, 4), 1)
    ids[:, -1] = 1  # each text ends with EOS
    alone, hidden = model(ids).logits, model.model(ids).last_hidden_state
    torch.testing.assert_close(alone, (hidden[:, -1] if pooling == "last" else hidden.mean(1)) @ model.score.weight.T)
    padded, mask = torch.cat((padding, ids), dim=1), torch.cat((torch.zeros(3, 4), torch.ones(3, 9)), dim=1).long()
    if side == "right":
        padded, mask = torch.cat((ids, padding), dim=1), mask.flip(1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, alone, atol=1e-5, rtol=1e-4)


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=20),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHES)
def test_a_classifier_continues_from_a_cache(tiny_config, kind):
    """With the logits of the whole text, padded on either side."""
    model = make(ScratchGPTForSequenceClassification, tiny_config, num_labels=5)
    ids, mask, cache = random_ids(3, 12), torch.ones(3, 12, dtype=torch.long), CACHES[kind](model.config)
    mask[0, :3] = mask[1, 9:] = 0
    model(ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache)
    continued = model(ids[:, 7:], attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(continued.logits, model(ids, attention_mask=mask).logits, atol=1e-5, rtol=1e-4)
    assert continued.past_key_values is cache


@torch.no_grad()
def test_what_a_classifier_cannot_compute_from_a_cache_is_refused(tiny_config):
    model = make(ScratchGPTForSequenceClassification, tiny_config)
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0  # its last real token is in the cache
    cache = model(ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="1 of 2 texts have no token after the cached ones"):
        model(ids[:, 6:], attention_mask=mask, past_key_values=cache)
    model.config.classifier_pooling = "mean"
    with pytest.raises(ValueError, match="classifier_pooling='mean' needs the hidden states of the whole text"):
        model(ids[:, 6:], past_key_values=cache)
    model(ids, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 1, 9, 9\)"):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9))


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_arguments_are_those_of_transformers(head):
    """PEFT and Trainer decide by the signature what they pass."""
    ours = inspect.signature(getattr(modeling_scratchgpt, f"ScratchGPTFor{head}").forward).parameters
    theirs = inspect.signature(getattr(transformers, f"Qwen3For{head}").forward).parameters
    assert [name for name in theirs if name != "use_cache"] == [name for name in ours if name in theirs]


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_prefix_tuning(tiny_config, head):
    """PEFT passes the prefix as a cache: the gradients are those of the prefix as embeddings' keys and values."""
    model = make(getattr(modeling_scratchgpt, f"ScratchGPTFor{head}"), tiny_config)
    task = HEADS[f"For{head}"]
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4)).eval()
    ids = random_ids(2, 6)
    labels = {"labels": torch.zeros(2, *([6] if task == "TOKEN_CLS" else []), dtype=torch.long)}
    if task == "QUESTION_ANS":
        labels = {"start_positions": torch.zeros(2, dtype=torch.long), "end_positions": torch.ones(2, dtype=torch.long)}
    output = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), **labels)
    expected = model(ids, attention_mask=torch.ones(2, 10), past_key_values=tuned.get_prompt(2), **labels)
    torch.testing.assert_close(output.loss, expected.loss)
    output.loss.backward()
    assert all(parameter.grad.any() for parameter in tuned.prompt_encoder.parameters())


@torch.no_grad()
def test_an_exported_classifier_takes_other_shapes():
    config = ScratchGPTConfig(**{**TINY, "num_hidden_layers": 1, "use_cache": False})
    model = make(ScratchGPTForSequenceClassification, config)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=64)
    shapes = {"input_ids": (batch, length), "attention_mask": (batch, length)}
    example = {"input_ids": random_ids(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    exported = torch.export.export(model, (), example, dynamic_shapes=shapes).module()
    ids, mask = random_ids(3, 5), torch.ones(3, 5, dtype=torch.long)
    mask[0, 3:] = mask[1, :2] = 0
    found, expected = (function(input_ids=ids, attention_mask=mask).logits for function in (exported, model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_labels_may_be_class_probabilities(tiny_config):
    """As in torch's cross-entropy, for label smoothing and weights. Trainer counts every element."""
    model = make(ScratchGPTForSequenceClassification, tiny_config, num_labels=4, problem_type="single_label_classification")
    ids, classes = random_ids(4, 8), torch.tensor([3, 0, 1, 2])
    hard = functional.one_hot(classes, 4).float()
    torch.testing.assert_close(model(ids, labels=hard).loss, model(ids, labels=classes).loss)
    smooth = 0.9 * hard + 0.1 / 4
    output = model(ids, labels=smooth)
    torch.testing.assert_close(output.loss, functional.cross_entropy(output.logits, classes, label_smoothing=0.1))
    pieces = [
        model(ids[row : row + 1], labels=smooth[row : row + 1], num_items_in_batch=smooth.numel()).loss for row in range(4)
    ]
    torch.testing.assert_close(sum(pieces), output.loss)
    weights = torch.tensor([2.0, 1, 1, 0.5])
    expected = (functional.cross_entropy(output.logits, classes, reduction="none") * weights[classes]).mean()
    torch.testing.assert_close(model(ids, labels=hard * weights[classes][:, None]).loss, expected)


SEVERAL, NUMBERS = {"problem_type": "multi_label_classification"}, {"problem_type": "regression"}
CASES = {
    "classes": ({"num_labels": 4}, [3, 0, 1, 2], functional.cross_entropy),
    "several at once": (
        {**SEVERAL, "num_labels": 3},
        [[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]],
        functional.binary_cross_entropy_with_logits,
    ),
    "a number": ({"num_labels": 1}, [0.5, -1.0, 2.0, 0.0], lambda logits, labels: functional.mse_loss(logits[:, 0], labels)),
    "numbers": ({**NUMBERS, "num_labels": 2}, [[0.5, 1], [2, -1], [0.1, 0.2], [3, 4]], functional.mse_loss),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_of_sequence_classification(tiny_config, case):
    fields, numbers, function = CASES[case]
    model = make(ScratchGPTForSequenceClassification, tiny_config, **fields)
    ids, labels = random_ids(4, 8), torch.tensor(numbers)
    output = model(ids, labels=labels)
    expected = function(output.logits, labels)
    torch.testing.assert_close(output.loss, expected)
    pieces = [
        model(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=labels.numel()).loss for row in range(4)
    ]
    torch.testing.assert_close(sum(pieces), expected)


def test_the_problem_type_is_inferred_from_the_labels(tiny_config):
    for num_labels, labels, kind in (
        (1, torch.rand(2), "regression"),
        (3, torch.tensor([0, 2]), "single_label_classification"),
        (3, torch.rand(2, 3), "multi_label_classification"),
    ):
        model = make(ScratchGPTForSequenceClassification, tiny_config, num_labels=num_labels)
        model(random_ids(2, 5), labels=labels)
        assert model.config.problem_type == kind


def test_loss_of_token_classification(tiny_config):
    model = make(ScratchGPTForTokenClassification, tiny_config, num_labels=4)
    ids = random_ids(3, 8)
    labels = torch.randint(0, 4, (3, 8))
    labels[1, :5] = labels[2, 2:] = -100
    output = model(ids, labels=labels)
    expected = functional.cross_entropy(output.logits.view(-1, 4), labels.view(-1))
    torch.testing.assert_close(output.loss, expected)
    count = (labels != -100).sum()
    pieces = [model(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=count).loss for row in range(3)]
    torch.testing.assert_close(sum(pieces), expected)


def test_loss_of_question_answering(tiny_config):
    """Positions outside the text are ignored."""
    model = make(ScratchGPTForQuestionAnswering, tiny_config)
    ids, starts, ends = random_ids(3, 8), torch.tensor([0, 3, -1]), torch.tensor([2, 3, 99])
    output = model(ids, start_positions=starts, end_positions=ends)
    logits, positions = (output.start_logits[:2], output.end_logits[:2]), (starts[:2], ends[:2])
    torch.testing.assert_close(output.loss, sum(map(functional.cross_entropy, logits, positions)) / 2)
    pieces = [
        model(ids[r : r + 1], start_positions=starts[r : r + 1], end_positions=ends[r : r + 1], num_items_in_batch=3).loss
        for r in range(3)
    ]
    by_hand = sum(map(partial(functional.cross_entropy, reduction="sum"), logits, positions))
    torch.testing.assert_close(sum(pieces), by_hand / 6)
    model(ids[2:], start_positions=starts[2:], end_positions=ends[2:]).loss.backward()  # no answer in the batch
    assert model.qa_outputs.weight.grad.abs().max() == 0


def test_training_without_logits_gives_the_same_loss_and_gradients(tiny_model):
    ids = random_ids(2, 12)
    labels = ids.clone()
    labels[0, :6] = -100
    tiny_model.train()
    results = {}
    for skip in (False, True):
        tiny_model.zero_grad()
        output = tiny_model(ids, labels=labels, skip_logits=skip)
        assert (output.logits is None) == skip
        output.loss.backward()
        results[skip] = (output.loss, [parameter.grad.clone() for parameter in tiny_model.parameters()])
    torch.testing.assert_close(results[True][0], results[False][0])
    for one, two in zip(results[True][1], results[False][1], strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_who_gets_logits(tmp_path):
    """As from every model of transformers, unless the call or, in training with labels, the config skips them."""
    ids = random_ids(2, 12)
    gpt2 = GPT2LMHeadModel(GPT2Config(**TINY)).train()
    assert gpt2(ids, labels=ids).logits is not None
    gpt2.save_pretrained(tmp_path / "gpt2")
    ScratchGPTForCausalLM.from_pretrained(tmp_path / "gpt2", skip_logits=True).save_pretrained(tmp_path / "ours")  # not kept
    for name, skip in (("gpt2", False), ("gpt2", True), ("ours", False), ("ours", True)):
        model = ScratchGPTForCausalLM.from_pretrained(tmp_path / name, **({"skip_logits": True} if skip else {}))
        for training in (True, False):
            model.train(training)
            assert (model(ids, labels=ids).logits is None) == (skip and training)
            assert model(ids).logits.shape == (2, 12, 300)
            assert model(ids, labels=ids, skip_logits=True).logits is None
            assert model(ids, labels=ids, skip_logits=False).logits is not None


class Doubled(torch.nn.Linear):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


def softcap(head):
    head.forward = lambda hidden_states: 5 * (functional.linear(hidden_states, head.weight) / 5).tanh()


def double(module, given, *_):
    """A hook of any kind, of a head that has no bias."""
    if getattr(module, "out_features", None) == 300:
        return 2 * given if isinstance(given, torch.Tensor) else (2 * given[0],)


def double_output(module, inputs, output):
    return double(module, output)


def double_weight(head, wrap):
    """Change what the weight is computed from: it is computed when the head is called."""
    wrap(head)
    next(head.parameters()).data.mul_(2)


GLOBAL = torch.nn.modules.module
WRAPPERS = {  # each changes what the head computes, or where its weight is
    "subclass": lambda head: setattr(head, "__class__", Doubled),
    "softcap": softcap,
    "forward hook": lambda head: head.register_forward_hook(double_output),
    "forward pre-hook": lambda head: head.register_forward_pre_hook(double),
    "backward hook": lambda head: head.register_full_backward_hook(double),
    "backward pre-hook": lambda head: head.register_full_backward_pre_hook(double),
    "global forward hook": lambda head: GLOBAL.register_module_forward_hook(double_output),
    "global forward pre-hook": lambda head: GLOBAL.register_module_forward_pre_hook(double),
    "global backward hook": lambda head: GLOBAL.register_module_full_backward_hook(double),
    "global backward pre-hook": lambda head: GLOBAL.register_module_full_backward_pre_hook(double),
    "pruning": partial(double_weight, wrap=partial(prune.l1_unstructured, name="weight", amount=0.5)),
    "weight norm": partial(double_weight, wrap=parametrizations.weight_norm),
    "weight norm by a hook": partial(double_weight, wrap=torch.nn.utils.weight_norm),
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by a hook": torch.nn.utils.spectral_norm,
    "CPU offload": partial(accelerate.cpu_offload, execution_device="cpu"),
    "CPU offload with a hook": lambda head: accelerate.cpu_offload_with_hook(head, execution_device="cpu"),
    "disk offload": partial(accelerate.disk_offload, execution_device="cpu"),
    "layerwise casting": partial(
        attach_layerwise_casting_hooks, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_head_that_is_more_than_a_matrix_is_called(wrapper, tmp_path):
    """The memory-efficient loss would pass over what wraps the head."""
    model = shaken(ScratchGPTForCausalLM(ScratchGPTConfig(**TINY, tie_word_embeddings=False)), 0.2).train()
    ids, embedding = random_ids(2, 12), model.model.embed_tokens.weight
    handle = WRAPPERS[wrapper](model.lm_head, *([tmp_path] if "disk" in wrapper else []))
    model.lm_head.eval()  # the spectral norm is estimated anew in each training step
    try:
        outputs = [model(ids, labels=ids, skip_logits=skip) for skip in (None, True, False)]
        gradients = [torch.autograd.grad(output.loss, embedding)[0] for output in outputs]
    finally:
        if "global" in wrapper:
            handle.remove()
    for output, gradient in zip(outputs, gradients, strict=True):
        torch.testing.assert_close(output.loss, outputs[-1].loss)
        torch.testing.assert_close(gradient, gradients[-1])


def flash_stand_in(module, query, key, value, mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **options):
    """Flash attention on lengths: the rows of a batch one after another, cut at the boundaries."""
    lengths = cu_seq_lens_q.diff().tolist()
    assert mask is None
    assert cu_seq_lens_q.dtype == torch.int32
    assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    assert max_length_q == max_length_k == max(lengths)
    assert type(max_length_q) is int
    parts = zip(*(x.transpose(0, 1).flatten(1, 2).split(lengths, 1) for x in (query, key, value)), strict=True)
    outputs = [torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
    return torch.cat(outputs, 1).transpose(0, 1).view(len(query), -1, *outputs[0].shape[::2]), None


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "flash_stand_in"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_documents_do_not_attend_to_each_other(tiny_model, attention, use_cache):
    if attention == "flex_attention" and shutil.which("g++") is None:
        pytest.skip("torch compiles flex attention for a CPU with g++, which is not installed")
    AttentionInterface.register("flash_stand_in", flash_stand_in)
    lengths = ((5, 1, 9, 3), (7, 9, 2))
    documents = [[random_ids(1, 9)[:, :length] + row + length for length in lengths[row]] for row in range(2)]
    packed = torch.cat([torch.cat(row, dim=1) for row in documents])
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    separate = torch.cat([torch.cat([tiny_model(document).logits for document in row], dim=1) for row in documents])
    tiny_model.config._attn_implementation = attention  # without a check that flash attention is installed
    together = tiny_model(packed, position_ids=position_ids, use_cache=use_cache).logits
    torch.testing.assert_close(together, separate, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_lengths_of_the_caller_are_taken(tiny_model, monkeypatch):
    """As continuous batching passes them: finding them in the positions would read from the device."""
    AttentionInterface.register("flash_stand_in", flash_stand_in)
    ids, boundaries = random_ids(1, 9), torch.tensor([0, 4, 9], dtype=torch.int32)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    expected = tiny_model(ids, position_ids=position_ids).logits
    tiny_model.config._attn_implementation = "flash_stand_in"
    monkeypatch.setattr(modeling_scratchgpt.modeling_scratchgpt, "packed_lengths", None)
    lengths = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 5, "max_length_k": 5}
    torch.testing.assert_close(tiny_model(ids, position_ids=position_ids, **lengths).logits, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_that_returns_tokens_times_width(tiny_model):
    """As that of vLLM, which runs models of transformers."""

    def flat(module, query, *args, **kwargs):
        output, _ = eager_attention_forward(module, query, *args, **kwargs)
        return output.reshape(-1, output.shape[-2] * output.shape[-1]), None

    AttentionInterface.register("flat", flat)
    AttentionMaskInterface.register("flat", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    ids = random_ids(2, 9)
    expected = tiny_model(ids).logits
    tiny_model.set_attn_implementation("flat")
    torch.testing.assert_close(tiny_model(ids).logits, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_logits_to_keep(tiny_model):
    ids = random_ids(2, 10)
    logits = tiny_model(ids).logits
    torch.testing.assert_close(tiny_model(ids, logits_to_keep=3).logits, logits[:, -3:])
    torch.testing.assert_close(tiny_model(ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])
    of_each_row = tiny_model(ids, logits_to_keep=torch.tensor([[1, 4], [0, 9]])).logits
    torch.testing.assert_close(of_each_row, torch.stack((logits[0, [1, 4]], logits[1, [0, 9]])))
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 3] = mask[1, 5:7] = True
    torch.testing.assert_close(tiny_model(ids, logits_to_keep=mask).logits, logits[mask])


def test_wrong_inputs_are_named(tiny_model):
    ids = random_ids(2, 6)
    with pytest.raises(ValueError, match=r"input_ids must be within the vocabulary \(0 to 299\), got 3 to 300"):
        tiny_model(torch.tensor([[3, 300]]))
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 5\): it must be .* here \(2, 6\)"):
        tiny_model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"attention_mask is \(3, 6\)"):
        tiny_model(ids, attention_mask=torch.ones(3, 6))
    with pytest.raises(ValueError, match="attn_implementation=.sparkling"):
        ScratchGPTForCausalLM._from_config(tiny_model.config, attn_implementation="sparkling")
