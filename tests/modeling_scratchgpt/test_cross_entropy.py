"""The memory-efficient loss, compared with torch's, which materializes the logits."""

import importlib.util
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_scratchgpt import cross_entropy as module
from modeling_scratchgpt.cross_entropy import IGNORE_INDEX, linear_cross_entropy


def inputs(tokens: int, width: int, vocab_size: int, ignored: float, seed: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden_states = (scale * torch.randn(tokens, width, generator=generator)).requires_grad_()
    weight = torch.randn(vocab_size, width, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORE_INDEX
    return hidden_states, weight, targets


def torchs_own(hidden_states, weight, targets, num_items_in_batch=None):
    logits = (hidden_states @ weight.T).float()
    if num_items_in_batch is None:
        return functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)
    return functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum") / num_items_in_batch


def loss_and_gradients(function, hidden_states, weight, *arguments):
    hidden_states.grad = weight.grad = None
    loss = function(hidden_states, weight, *arguments)
    loss.backward()
    return loss.detach(), hidden_states.grad, weight.grad


def assert_same(ours, theirs, terms=None):
    """Equal to 1e-5 of the largest number, in float32, or to 1e-6 of the `terms` of its sum, which may cancel."""
    for one, two, term in zip(ours, theirs, terms or [0.0] * len(ours), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=max(1e-5 * max(two.abs().max().item(), 1e-6), 1e-6 * float(term)))


@torch.no_grad()
def largest_terms(hidden_states, weight, targets, num_items_in_batch):
    """The largest sum of absolute terms in the loss and in either gradient, (softmax + one-hot) times a factor: by hand."""
    scored = targets != IGNORE_INDEX
    hidden_states, divisor = hidden_states[scored], scored.sum() if num_items_in_batch is None else num_items_in_batch
    logits = hidden_states @ weight.T
    parts = (logits.softmax(-1) + functional.one_hot(targets[scored], len(weight))) / divisor
    losses = 2 * logits.abs().amax(-1).sum() / divisor
    return losses, (parts @ weight.abs()).max(), (parts.T @ hidden_states.abs()).max()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 70),
    width=st.integers(1, 20),
    vocab_size=st.integers(1, 90),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    rows_in_a_chunk=st.integers(1, 80),
    num_items_in_batch=st.sampled_from([None, 1, 17, torch.tensor(5)]),
    seed=st.integers(0, 1000),
)
@example(tokens=1, width=1, vocab_size=60, ignored=0.0, rows_in_a_chunk=1, num_items_in_batch=17, seed=186)
def test_value_and_gradients(tokens, width, vocab_size, ignored, rows_in_a_chunk, num_items_in_batch, seed):
    hidden_states, weight, targets = inputs(tokens, width, vocab_size, ignored, seed)
    targets[0] = 0  # at least one that counts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", rows_in_a_chunk * 4 * vocab_size)
        ours = loss_and_gradients(linear_cross_entropy, hidden_states, weight, targets, num_items_in_batch)
    theirs = loss_and_gradients(torchs_own, hidden_states, weight, targets, num_items_in_batch)
    assert_same(ours, theirs, largest_terms(hidden_states, weight, targets, num_items_in_batch))


def test_all_targets_ignored():
    hidden_states, weight, targets = inputs(5, 4, 7, 1.1, seed=0)
    assert_same(
        loss_and_gradients(linear_cross_entropy, hidden_states, weight, targets, 3),
        loss_and_gradients(torchs_own, hidden_states, weight, targets, 3),
    )
    assert linear_cross_entropy(hidden_states, weight, targets).isnan()
    assert torchs_own(hidden_states, weight, targets).isnan()


def test_large_logits_do_not_overflow():
    hidden_states, weight, targets = inputs(30, 16, 50, 0.2, seed=0, scale=300.0)
    ours = loss_and_gradients(linear_cross_entropy, hidden_states, weight, targets)
    assert all(tensor.isfinite().all() for tensor in ours)
    assert_same(ours, loss_and_gradients(torchs_own, hidden_states, weight, targets))


def test_only_the_gradients_that_are_needed():
    hidden_states, weight, targets = inputs(20, 8, 30, 0.2, seed=0)
    weight.requires_grad_(False)  # LoRA: a frozen head
    linear_cross_entropy(hidden_states, weight, targets).backward()
    assert weight.grad is None
    expected = torch.autograd.grad(torchs_own(hidden_states, weight, targets), hidden_states)[0]
    torch.testing.assert_close(hidden_states.grad, expected)
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(hidden_states, weight, targets), torchs_own(hidden_states, weight, targets)
        )


def test_backward_twice_adds_up():
    hidden_states, weight, targets = inputs(20, 8, 30, 0.0, seed=0)
    loss = linear_cross_entropy(hidden_states, weight, targets) * 3
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def hessian_vector_product(function, tensors, vectors):
    gradients = torch.autograd.grad(function(*tensors), tensors, create_graph=True)
    return torch.autograd.grad(gradients, tensors, vectors)


def gradient_penalty(function, tensors, vectors):
    loss = function(*tensors)
    gradients = torch.autograd.grad(3 * loss, tensors, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    return torch.autograd.grad(loss + penalty, tensors)


def forward_mode(function, tensors, vectors):
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(tensors, vectors, strict=True)]
        return (torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent,)


def per_sample_gradients(function, tensors, vectors):
    hidden_states, weight = tensors
    return (torch.func.vmap(torch.func.grad(function, argnums=1), in_dims=(0, None))(hidden_states[:, None], weight),)


DERIVATIVES = {
    "Hessian-vector product": hessian_vector_product,
    "gradient penalty": gradient_penalty,
    "forward mode": forward_mode,
    "torch.func.grad": lambda function, tensors, vectors: torch.func.grad(function, argnums=(0, 1))(*tensors),
    "torch.func.jvp": lambda function, tensors, vectors: torch.func.jvp(function, tensors, vectors),
    "torch.func.hessian": lambda function, tensors, vectors: (torch.func.hessian(function, argnums=1)(*tensors),),
    "torch.func.vmap of gradients": per_sample_gradients,
}


@pytest.mark.parametrize("kind", DERIVATIVES)
def test_derivatives_other_than_the_first(kind):
    """The operator computes first derivatives; Sophia, influence functions and gradient penalties ask for others."""
    hidden_states, weight, targets = inputs(6, 4, 9, 0.3, seed=0)
    targets = targets[1:2] if "vmap" in kind else targets
    vectors = torch.randn_like(hidden_states), torch.randn_like(weight)

    def differentiate(loss):
        def tied(hidden_states, weight):  # the hidden states depend on the weight, too
            return loss((hidden_states + weight[: len(targets)]).tanh(), weight, targets)

        return DERIVATIVES[kind](tied, (hidden_states, weight), vectors)

    assert_same(differentiate(linear_cross_entropy), differentiate(torchs_own))


def test_autocast():
    hidden_states, weight, targets = inputs(40, 16, 50, 0.2, seed=0)
    results = []
    for function in (linear_cross_entropy, torchs_own):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(loss_and_gradients(function, hidden_states, weight, targets))
    exact = loss_and_gradients(torchs_own, hidden_states, weight, targets)
    for ours, theirs, right in zip(*results, exact, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        # As close to the float32 result as torch's own is under autocast.
        assert (ours - right).abs().max() <= 1.5 * (theirs - right).abs().max() + 1e-6


def test_small_gradients_survive_float16():
    """The divisor of a large batch makes them too small for float16, unless the loss scale is applied first."""
    tokens_in_the_step, loss_scale = 65536, 65536.0
    hidden_states, weight, targets = inputs(512, 32, 2000, 0.0, 0, scale=0.1)
    _, *expected = loss_and_gradients(torchs_own, hidden_states, weight, targets, tokens_in_the_step)
    hidden_states.grad = weight.grad = None
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(hidden_states, weight, targets, tokens_in_the_step)
    (loss * loss_scale).backward()
    for tensor, gradient in zip((hidden_states, weight), expected, strict=True):
        error = (tensor.grad / loss_scale - gradient).norm() / gradient.norm()
        assert error < 5e-3


@pytest.mark.parametrize("shape", [(2, 3), (3, 4), (0, 5)])
def test_labels_of_another_shape_are_refused(shape):
    hidden_states, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"labels are .*: they must be \(3, 5\), like the inputs"):
        linear_cross_entropy(hidden_states, weight, torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("label", [-1, -5, 9])
def test_labels_outside_the_vocabulary_are_refused(label):
    hidden_states, weight, targets = inputs(6, 4, 9, 0.0, 0)
    targets[2] = label
    with pytest.raises(ValueError, match=rf"labels must be ids \(0 to 8\) or -100: .*{label}"):
        linear_cross_entropy(hidden_states, weight, targets)


def test_gradients_of_a_kept_graph_are_not_shared():
    """A first backward pass that keeps the graph, and changes to its gradients, must not change the second."""
    hidden_states, weight, targets = inputs(6, 4, 9, 0.0, 0)
    loss = linear_cross_entropy(hidden_states, weight, targets)
    loss.backward(retain_graph=True)
    expected = weight.grad.clone()
    weight.grad.data.zero_()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, expected)
    weight.grad.mul_(3)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 4 * expected)


def test_batched_gradients():
    hidden_states, weight, targets = inputs(6, 4, 9, 0.0, 0)
    (ours,), (theirs,) = (
        torch.autograd.grad(function(hidden_states, weight, targets), weight, torch.tensor([1.0, 2.0]), is_grads_batched=True)
        for function in (linear_cross_entropy, torchs_own)
    )
    torch.testing.assert_close(ours, theirs)


def test_bfloat16_weights():
    hidden_states, weight, targets = inputs(40, 16, 50, 0.2, seed=0)
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden_states, weight)]
    loss, *gradients = loss_and_gradients(linear_cross_entropy, *half, targets)
    exact = loss_and_gradients(torchs_own, *(tensor.detach().float().requires_grad_() for tensor in half), targets)
    assert loss.dtype == torch.float32
    for ours, right in zip((loss, *gradients), exact, strict=True):
        torch.testing.assert_close(ours.float(), right, rtol=2e-2, atol=2e-2 * right.abs().max().item())


def test_compiled_in_one_graph():
    hidden_states, weight, targets = inputs(40, 16, 50, 0.2, seed=0)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    assert_same(
        loss_and_gradients(compiled, hidden_states, weight, targets),
        loss_and_gradients(torchs_own, hidden_states, weight, targets),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_softmax(dtype, monkeypatch):
    """As in a compiled model on a GPU: the same results, and two graphs, for the first chunk and for any number of rows."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(module, "CHUNK_BYTES", 16 * 4 * 90)
    compiled = partial(module.loss_and_gradients, is_compiled=True)
    for tokens in (40, 41, 43, 60):
        hidden_states, weight, targets = (each.detach() for each in inputs(tokens, 8, 90, 0.2, seed=tokens))
        arguments = hidden_states.to(dtype), weight, targets, torch.tensor(3.0), True, True
        for ours, eager in zip(compiled(*arguments), module.loss_and_gradients(*arguments), strict=True):
            tolerance = 1e-5 if ours.dtype == torch.float32 == dtype else 1e-2
            torch.testing.assert_close(ours, eager, rtol=tolerance, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2
    for label in (-1, 90):
        targets[2] = label
        with pytest.raises(ValueError, match=r"labels must be ids \(0 to 89\) or -100"):
            compiled(*arguments)


@pytest.mark.parametrize(("device", "is_compiling"), [("cuda", True), ("cuda", False), ("cpu", True)])
def test_the_softmax_is_compiled_in_a_compiled_model_on_a_gpu(device, is_compiling, monkeypatch):
    operator = Mock(return_value=[None])
    monkeypatch.setattr(module, "loss_and_gradients", operator)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    with FakeTensorMode():
        hidden_states, weight = torch.empty(6, 8, device=device), torch.empty(9, 8, device=device)
        linear_cross_entropy(hidden_states, weight, torch.zeros(6, dtype=torch.long, device=device))
    assert operator.call_args.args[-1] == (device == "cuda" and is_compiling)


def test_the_operator_is_well_formed():
    hidden_states, weight, targets = inputs(12, 4, 9, 0.2, seed=0)
    torch.library.opcheck(module.loss_and_gradients, (hidden_states, weight, targets, torch.tensor(3.0), True, True))


def test_the_logits_are_never_materialized():
    """The largest intermediate tensor is one chunk of logits."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), kwargs=None):
            nonlocal largest
            result = operator(*arguments, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    hidden_states, weight, targets = inputs(512, 4, 1000, 0.0, seed=0)
    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(module, "CHUNK_BYTES", 16 * 4 * 1000)
        # The operator's body, where the mode sees what it does.
        module.loss_and_gradients._init_fn(hidden_states.detach(), weight.detach(), targets, torch.tensor(512.0), True, True)
    assert largest == 16 * 1000


class Reads(TorchDispatchMode):
    """Records the operators that wait for a GPU to read data from it."""

    NAMES = ("aten.nonzero", "aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.masked_select")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, arguments=(), kwargs=None):
        if (name := str(operator).removesuffix(".default")) in self.NAMES:
            self.names.append(name)
        return operator(*arguments, **(kwargs or {}))


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_a_gpu_waits_once(ignored, monkeypatch):
    """To count the targets that are not ignored, however many chunks there are; and a CUDA graph must not contain it."""
    hidden_states, weight, targets = inputs(512, 4, 100, ignored, seed=0)
    monkeypatch.setattr(module, "CHUNK_BYTES", 16 * 4 * 100)
    with torch.no_grad(), Reads() as reads:
        module.loss_and_gradients._init_fn(hidden_states, weight, targets, torch.tensor(512.0), True, True)
    assert reads.names == ["aten.nonzero"]
    assert torch.Tag.cudagraph_unsafe in module.loss_and_gradients._opoverload.tags


@pytest.mark.parametrize(
    ("device", "vocab_size", "rows"),
    [("cuda", 50257, 5312), ("cpu", 50257, 320), ("cpu", 4096, 4096), ("cpu", 2**20, 16), ("cpu", 2**25, 1)],
)
def test_chunks_are_aligned(device, vocab_size, rows):
    """To 64 rows, for tensor cores, unless there are fewer; on a GPU 13 chunks of 65,536 tokens instead of 197."""
    with FakeTensorMode():
        assert module.chunk_rows(torch.empty(vocab_size, 8, device=device)) == rows


def test_several_copies_of_the_file_can_be_imported():
    """Two directories loaded as remote code in one process define the operator twice. Neither destroys that of the other."""
    hidden_states, weight, targets = inputs(12, 4, 9, 0.2, seed=0)
    expected, copies = linear_cross_entropy(hidden_states, weight, targets), [module]
    for name in ("first_copy", "second_copy"):
        spec = importlib.util.spec_from_file_location(name, module.__file__)
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        torch.testing.assert_close(copy.linear_cross_entropy(hidden_states, weight, targets), expected)
        copies.append(copy)
    for each in copies:
        operator = each.loss_and_gradients._opoverload
        assert getattr(torch.ops.scratchgpt, operator._schema.name.partition("::")[2]).default is operator
    torch.testing.assert_close(linear_cross_entropy(hidden_states, weight, targets), expected)
