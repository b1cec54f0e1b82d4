"""DPO as a Lightning module: log-probs of whole sequences from the hidden states, the loss on top of them."""

import copy

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from fastdpo import DPOLoss, sequence_logprob


class DPO(lightning.LightningModule):
    def __init__(self, model: LlamaForCausalLM, beta: float = 0.1) -> None:
        super().__init__()
        self.policy, self.reference = model, copy.deepcopy(model).eval().requires_grad_(False)
        self.loss = DPOLoss(beta=beta)

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        chosen, rejected, labels_chosen, labels_rejected = batch
        ids, labels = torch.cat([chosen, rejected]), torch.cat([labels_chosen, labels_rejected])
        logps = {}
        for model in (self.policy, self.reference):  # the reference asks for no gradient, so none is made
            hidden = model.model(ids, use_cache=False).last_hidden_state
            logps[model] = sequence_logprob(hidden, model.lm_head.weight, labels, shift=True)
        loss, pairs = self.loss(logps[self.policy], logps[self.reference])
        margin = (pairs.chosen_rewards - pairs.rejected_rewards).mean()
        print(f"step {number}: loss {loss.item():.4f}, reward margin {margin.item():.4f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), lr=2e-3)


lightning.seed_everything(0)
config = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
prompts, chosen, rejected = (torch.randint(*ids, (160, 8)) for ids in ((0, 128), (0, 64), (64, 128)))
sides = [torch.cat([prompts, side], 1) for side in (chosen, rejected)]
labels = [torch.cat([torch.full_like(prompts, -100), side], 1) for side in (chosen, rejected)]
trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(DPO(LlamaForCausalLM(config)), DataLoader(TensorDataset(*sides, *labels), batch_size=8))
