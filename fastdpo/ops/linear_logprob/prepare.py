"""One checked call of the op: its operands and settings, and where its results go."""

from collections.abc import Collection
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from fastdpo.ops import reference
from fastdpo.ops.custom_op import constant_in_graphs, reads_are_free, without_autocast
from fastdpo.ops.linear_logprob.arguments import check_arguments, check_lora
from fastdpo.ops.linear_logprob.operands import Operands
from fastdpo.ops.linear_logprob.operator import run
from fastdpo.ops.linear_logprob.plan import Needs, Plan
from fastdpo.ops.linear_logprob.settings import STATS, Settings, plan_of, result_names, shape_of
from fastdpo.ops.switches import block_cols, choose_backend, fuses, keep_bytes, workspace_bytes
from fastdpo.ops.tensor_kinds import number


@dataclass(frozen=True)
class PreparedCall:
    """One checked call. Ignored labels are taken out where looking at them is free, and negative elsewhere."""

    operands: Operands
    settings: Settings
    scored: Tensor | None  # (N,) bool, where ignored labels are still among the operands' labels
    places: Tensor | None  # (N,) int64, where each result goes in the flattened labels

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None,
        rows: Tensor | None,
        temperature: float,
        logit_scale: float,
        softcap: float | None,
        ignore_index: int,
        shift: bool,
        lora: tuple[Tensor, Tensor] | None,
        stats: Collection[str],
        entropy_grad: bool,
    ) -> "PreparedCall":
        temperature = number("linear_logprob", "temperature", temperature)
        logit_scale = number("linear_logprob", "logit_scale", logit_scale)
        softcap = None if softcap is None else number("linear_logprob", "softcap", softcap)
        compute = check_arguments(
            hidden, weight, labels, bias, rows, temperature, logit_scale, softcap, ignore_index, shift
        )
        lora_compute, lora_u, lora_b = compute, None, None
        if lora is not None:
            lora_compute, (lora_u, lora_b) = check_lora(hidden, weight, lora, compute), lora
        grad = torch.is_grad_enabled()
        needs = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias, lora_u, lora_b)]
        entropy = any(needs) and entropy_grad and "entropy" in stats
        if shift:
            labels = torch.cat((labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)), -1)
        unique_rows, flat = rows is None, labels.reshape(-1)
        scored, places = flat != ignore_index, None
        if reads_are_free(flat):
            if not bool(scored.all()):
                places = scored.nonzero()[:, 0]
                flat = flat[places]
                rows = places if rows is None else rows[places]
            scored = None
        else:
            flat = flat.where(scored, -1)
        # index(): a graph whose sizes are symbols is made for one H
        kind = (index(hidden.shape[-1]), entropy, softcap is not None, lora_compute)
        backend, fused, workspace, keep = _environment(hidden.device, compute, *kind)
        settings = Settings(
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            stats=",".join(name for name in STATS if name in stats),
            needs=[*needs, entropy],
            unique_rows=unique_rows,
            ignored=scored is not None,
            compute=compute,
            lora_compute=lora_compute,
            backend=backend,
            fused=fused,
            workspace=workspace,
            keep=keep,
        )
        hidden = hidden.reshape(-1, hidden.shape[-1])
        lora_u = None if lora_u is None else lora_u.reshape(-1, lora_u.shape[-1])
        return PreparedCall(Operands(hidden, weight, bias, lora_u, lora_b, flat, rows), settings, scored, places)

    def run(self) -> dict[str, Tensor]:
        """Each result, (N,), by name."""
        if self.settings.backend == "reference":
            with without_autocast(self.operands.hidden.device):
                return self._by_definition()
        names = result_names(self.settings)
        outputs = run(*self.operands, *self.settings)
        return dict(zip(names, outputs[: len(names)], strict=True))  # after the results comes what is saved

    def plan(self, flattened: bool) -> Plan:
        """flattened: the operands' hidden states are a copy, made to flatten them."""
        x = self.operands
        sizes, gathered = (len(x.labels), x.sizes, x.dtypes), x.rows is not None
        return plan_of(self.settings, shape_of(self.settings, x.hidden.device, *sizes, gathered, flattened))

    def scatter_back(self, result: Tensor, labels: Tensor) -> Tensor:
        """A result in the labels' shape, 0 where ignored."""
        if self.places is not None:
            result = result.new_zeros(labels.numel()).index_copy(0, self.places, result)
        elif self.scored is not None:
            result = result.where(self.scored, result.new_zeros(()))
        return result.view(labels.shape)

    def _by_definition(self) -> dict[str, Tensor]:
        settings, compute = self.settings, self.settings.compute
        hidden, weight, bias, lora_u, lora_b, labels, rows = self.operands
        if lora_u is not None and lora_b is not None:
            # the definition knows one product: the LoRA's factors beside the others, where the sum is formed in fp32
            wide = torch.promote_types(compute, torch.float32)
            hidden, lora_u = hidden.to(compute).to(wide), lora_u.to(settings.lora_compute).to(wide)
            weight, lora_b = weight.to(compute).to(wide), lora_b.to(settings.lora_compute).to(wide)
            hidden, weight, compute = torch.cat((hidden, lora_u), 1), torch.cat((weight, lora_b), 1), wide
        z = reference.logits(
            hidden.to(compute),
            weight.to(compute),
            bias,
            temperature=settings.temperature,
            logit_scale=settings.logit_scale,
            softcap=settings.softcap,
        )
        z = z if rows is None else z[rows]
        labels = labels if self.scored is None else labels.clamp(min=0)
        stats = reference.token_stats(z, labels)
        results = {"logprob": reference.logprob(z, labels)}
        for name in result_names(settings)[1:]:
            differentiable = name == "entropy" and Needs(*settings.needs).entropy
            results[name] = stats[name] if differentiable else stats[name].detach()
        return results


@constant_in_graphs
def _environment(
    device: torch.device,
    compute: torch.dtype,
    hidden_size: int,
    entropy_grad: bool,
    softcap: bool,
    lora_compute: torch.dtype,
) -> tuple[str, int, int, int]:
    """`Settings`' backend, fused, workspace and keep, of the moment; in a compiled graph that of its tracing."""
    backend = choose_backend(device, compute)
    fusing = fuses(backend, device, compute, hidden_size, entropy_grad, lora_compute)
    fused = block_cols(device, softcap) if fusing else 0
    return backend, fused, workspace_bytes(), keep_bytes()


def copies_when_flat(hidden: Tensor) -> bool:
    """(..., H) cannot be seen as (R, H)."""
    try:
        hidden.view(-1, hidden.shape[-1])
    except RuntimeError:
        return True
    return False
