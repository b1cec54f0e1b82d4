"""DPO in a plain PyTorch loop. No logits exist: the loss takes the final hidden states and the head's weight."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastdpo import FusedLinearDPOLoss

torch.manual_seed(0)
config = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
policy = LlamaForCausalLM(config)
reference = copy.deepcopy(policy).eval().requires_grad_(False)
optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
loss_fn = FusedLinearDPOLoss(beta=0.1, shift=True)  # labels as Hugging Face models take them


def batch_of_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of 8 pairs, chosen rows first, then rejected. Here random: low ids are preferred."""
    prompts = torch.randint(128, (8, 6)).repeat(2, 1)
    completions = torch.cat([torch.randint(64, (8, 10)), torch.randint(64, 128, (8, 10))])
    return torch.cat([prompts, completions], 1), torch.cat([torch.full_like(prompts, -100), completions], 1)


for step in range(20):
    ids, labels = batch_of_pairs()
    with torch.no_grad():
        ref_hidden = reference.model(ids, use_cache=False).last_hidden_state
    hidden = policy.model(ids, use_cache=False).last_hidden_state
    loss, pairs = loss_fn(
        policy.lm_head.weight, hidden, labels, ref_hidden=ref_hidden, ref_weight=reference.lm_head.weight
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    margin = (pairs.chosen_rewards - pairs.rejected_rewards).mean()
    print(f"step {step}: loss {loss.item():.4f}, reward margin {margin.item():.4f}")
