"""Two processes on a CPU (gloo): tensor parallelism and FSDP2 give what one process gives."""

from tests.conftest import IS_CURRENT, on_two_processes

PROGRAM = """
from torch.distributed.fsdp import fully_shard
from modeling_scratchgpt import ScratchGPTForCausalLM

kind, folder = sys.argv[1:]
ids = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(1))

def gradient(model, name):
    tensor = model.get_parameter(name).grad
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

one = ScratchGPTForCausalLM.from_pretrained(folder)
if kind == "tensor parallel":
    two = ScratchGPTForCausalLM.from_pretrained(folder, tp_plan="auto")
    name = "model.layers.0.self_attn.q_proj.weight"
    part = two.get_parameter(name)
    part = part.to_local() if hasattr(part, "to_local") else part
    assert part.numel() * 2 == one.get_parameter(name).numel()
    with torch.no_grad():
        torch.testing.assert_close(two(ids).logits, one(ids).logits, atol=1e-5, rtol=1e-4)
    for model in (one, two):
        model.train()
        model.loss = model(ids, labels=ids).loss
        model.loss.backward()
    torch.testing.assert_close(two.loss, one.loss)
    for name in ("lm_head.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
        torch.testing.assert_close(gradient(two, name), one.get_parameter(name).grad, atol=1e-6, rtol=1e-4)
else:
    two = ScratchGPTForCausalLM.from_pretrained(folder)
    for layer in two.model.layers:
        fully_shard(layer)
    fully_shard(two)
    one.train(), two.train()
    whole = one(ids, labels=ids).loss
    whole.backward()
    rows = ids.chunk(2)[dist.get_rank()]
    count = (ids.shape[1] - 1) * ids.shape[0]
    loss = two(rows, labels=rows, num_items_in_batch=count).loss
    (loss * 2).backward()  # gradients are averaged over the two
    dist.all_reduce(loss.detach_())
    torch.testing.assert_close(loss, whole.detach())
    for name in ("lm_head.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
        torch.testing.assert_close(gradient(two, name), one.get_parameter(name).grad, atol=1e-6, rtol=1e-4)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (one, two)]
    for optimizer in optimizers:
        optimizer.step()
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(two.get_parameter(name).full_tensor(), one.get_parameter(name), atol=1e-5, rtol=1e-4)
"""


def test_two_processes_compute_what_one_computes(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    kinds = ["fsdp2", *(["tensor parallel"] if IS_CURRENT else [])]  # it takes transformers 5.23
    on_two_processes(PROGRAM, tmp_path, *((kind, tmp_path / "model") for kind in kinds))
