"""Two processes on a CPU (gloo): tensor parallelism and FSDP2 give what one process gives."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from modeling_scratchgpt import ScratchGPTForCausalLM
from tests.conftest import IS_CURRENT, on_two_processes
from training.engine.checkpoints import full_state_dict

IDS = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(1))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare_tensor_parallel(one: ScratchGPTForCausalLM, folder: str) -> ScratchGPTForCausalLM:
    two = ScratchGPTForCausalLM.from_pretrained(folder, tp_plan="auto")
    name = "model.layers.0.self_attn.q_proj.weight"
    part = two.get_parameter(name)
    part = part.to_local() if hasattr(part, "to_local") else part
    assert part.numel() * 2 == one.get_parameter(name).numel()
    with torch.no_grad():
        torch.testing.assert_close(two(IDS).logits, one(IDS).logits, atol=1e-5, rtol=1e-4)
    losses = [model.train()(IDS, labels=IDS, skip_logits=True).loss for model in (one, two)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    return two


def compare_fsdp2(one: ScratchGPTForCausalLM, folder: str) -> ScratchGPTForCausalLM:
    two = ScratchGPTForCausalLM.from_pretrained(folder)
    for module in (*two.model.layers, two):
        fully_shard(module)
    expected = one.train()(IDS, labels=IDS, skip_logits=True).loss
    expected.backward()
    rows = IDS.chunk(2)[dist.get_rank()]
    loss = two.train()(rows, labels=rows, skip_logits=True, num_items_in_batch=IDS[:, 1:].numel()).loss
    (loss * 2).backward()  # gradients are averaged over the two
    dist.all_reduce(loss.detach_())
    torch.testing.assert_close(loss, expected.detach())
    return two


def compare(kind: str, folder: str) -> None:
    one = ScratchGPTForCausalLM.from_pretrained(folder)
    two = (compare_fsdp2 if kind == "fsdp2" else compare_tensor_parallel)(one, folder)
    for name in ("lm_head.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
        gradient = whole(two.get_parameter(name).grad)
        torch.testing.assert_close(gradient, one.get_parameter(name).grad, atol=1e-6, rtol=1e-4)
    if kind == "fsdp2":
        weights, saved = full_state_dict(two), Path(f"{folder}-saved")  # as the recipes save
        if dist.get_rank() == 0:
            two.save_pretrained(saved, state_dict=weights)
            found, expected = (
                {path.name: path.read_bytes() for path in directory.iterdir()} for directory in (saved, Path(folder))
            )
            assert found.keys() == expected.keys()
            assert [name for name in found if found[name] != expected[name]] == ["model.safetensors"]  # the tied weight twice
            again = ScratchGPTForCausalLM.from_pretrained(saved)
            torch.testing.assert_close(again.state_dict(), one.state_dict(), rtol=0, atol=0)
        for model in (one, two):
            torch.optim.AdamW(model.parameters(), lr=1e-2).step()
        name = "model.layers.0.mlp.down_proj.weight"
        torch.testing.assert_close(whole(two.get_parameter(name)), one.get_parameter(name), atol=1e-5, rtol=1e-4)


def test_two_processes_compute_what_one_computes(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    kinds = ["fsdp2", *(["tensor parallel"] if IS_CURRENT else [])]  # it takes transformers 5.23
    on_two_processes(compare, tmp_path, *((kind, tmp_path / "model") for kind in kinds))
