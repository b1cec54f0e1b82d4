"""One checked call of the op: its plan, its operands' dtypes, and where its results go."""

from collections.abc import Collection
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from fastdpo.ops import reference
from fastdpo.ops.custom_op import constant_in_graphs, reads_are_free, without_autocast
from fastdpo.ops.linear_logprob.arguments import check_arguments, check_lora
from fastdpo.ops.linear_logprob.operator import run
from fastdpo.ops.linear_logprob.plan import Needs, Plan
from fastdpo.ops.linear_logprob.settings import STATS, Settings, plan_of, result_names, shape_of
from fastdpo.ops.switches import block_cols, choose_backend, fuses, keep_bytes, workspace_bytes
from fastdpo.ops.tensor_kinds import number


@dataclass(frozen=True)
class Call:
    """One checked call: everything about it that is not differentiated."""

    labels: Tensor  # (N,), compacted where that is free; negative where ignored
    rows: Tensor | None  # (N,)
    scored: Tensor | None  # (N,) bool, where ignored labels are still among `labels`
    places: Tensor | None  # (N,) int64, where each result goes in the flattened labels
    settings: Settings

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        temperature: float,
        logit_scale: float,
        softcap: float | None,
        ignore_index: int,
        shift: bool,
        stats: Collection[str],
        entropy_grad: bool,
        lora: tuple[Tensor, Tensor] | None = None,
    ) -> "Call":
        temperature = number("linear_logprob", "temperature", temperature)
        logit_scale = number("linear_logprob", "logit_scale", logit_scale)
        softcap = None if softcap is None else number("linear_logprob", "softcap", softcap)
        compute = check_arguments(
            hidden, weight, labels, bias, rows, temperature, logit_scale, softcap, ignore_index, shift
        )
        lora_compute = compute if lora is None else check_lora(hidden, weight, lora, compute)
        if shift:
            labels = torch.cat((labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)), -1)
        flat, unique = labels.reshape(-1), rows is None
        scored, places = flat != ignore_index, None
        if reads_are_free(flat):
            if not bool(scored.all()):
                places = scored.nonzero()[:, 0]
                flat = flat[places]
                rows = places if rows is None else rows[places]
            scored = None
        else:
            flat = flat.where(scored, -1)
        grad = torch.is_grad_enabled()
        wanted = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias, *(lora or (None, None)))]
        entropy = any(wanted) and entropy_grad and "entropy" in stats
        needs = [*wanted, entropy]  # the fields of `Needs`
        # index(): a graph whose sizes are symbols is made for one H
        kind = (index(hidden.shape[-1]), entropy, softcap is not None, lora_compute)
        backend, fused, workspace, keep = _environment(hidden.device, compute, *kind)
        settings = Settings(
            temperature,
            logit_scale,
            softcap,
            ",".join(name for name in STATS if name in stats),
            needs,
            unique,
            scored is not None,
            compute,
            lora_compute,
            backend,
            fused,
            workspace,
            keep,
        )
        return Call(flat, rows, scored, places, settings)

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Each result, (N,), by name."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        pair = (None, None) if lora is None else (lora[0].reshape(-1, lora[0].shape[-1]), lora[1])
        if self.settings.backend == "reference":
            with without_autocast(flat.device):
                return self._eager(flat, weight, bias, *pair)
        found = run(flat, weight, bias, *pair, self.labels, self.rows, *self.settings)
        names = result_names(self.settings)
        return dict(zip(names, found[: len(names)], strict=True))  # after the results comes what is saved

    def plan(self, hidden: Tensor, weight: Tensor, lora: tuple[Tensor, Tensor] | None = None) -> Plan:
        sizes = (hidden.shape[:-1].numel(), hidden.shape[-1], len(weight), 0 if lora is None else lora[1].shape[1])
        dtypes = (hidden.dtype, weight.dtype)
        gathered, flattened = self.rows is not None, _copies_when_flat(hidden)
        shape = shape_of(self.settings, hidden.device, len(self.labels), sizes, dtypes, gathered, flattened)
        return plan_of(self.settings, shape)

    def spread(self, found: Tensor, labels: Tensor) -> Tensor:
        """Results back in the labels' shape, 0 where ignored."""
        if self.places is not None:
            found = found.new_zeros(labels.numel()).index_copy(0, self.places, found)
        elif self.scored is not None:
            found = found.where(self.scored, found.new_zeros(()))
        return found.view(labels.shape)

    def _eager(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_hidden: Tensor | None,
        lora_weight: Tensor | None,
    ) -> dict[str, Tensor]:
        settings = self.settings
        if lora_hidden is not None and lora_weight is not None:
            # the definition knows one product: the LoRA's factors beside the others, where the sum is formed in fp32
            wide = torch.promote_types(settings.compute, torch.float32)
            hidden, lora_hidden = hidden.to(settings.compute).to(wide), lora_hidden.to(settings.lora_compute).to(wide)
            weight, lora_weight = weight.to(settings.compute).to(wide), lora_weight.to(settings.lora_compute).to(wide)
            hidden, weight = torch.cat((hidden, lora_hidden), 1), torch.cat((weight, lora_weight), 1)
            settings = settings._replace(compute=wide)
        z = reference.logits(
            hidden.to(settings.compute),
            weight.to(settings.compute),
            bias,
            temperature=settings.temperature,
            logit_scale=settings.logit_scale,
            softcap=settings.softcap,
        )
        z = z if self.rows is None else z[self.rows]
        labels = self.labels if self.scored is None else self.labels.clamp(min=0)
        stats = reference.token_stats(z, labels)
        differentiable = ("entropy",) if Needs(*settings.needs).entropy else ()
        asked_for = {name: stats[name] for name in result_names(settings)[1:]}
        out = {name: x if name in differentiable else x.detach() for name, x in asked_for.items()}
        return {"logprob": reference.logprob(z, labels), **out}


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


def _copies_when_flat(hidden: Tensor) -> bool:
    try:
        hidden.view(-1, hidden.shape[-1])
    except RuntimeError:
        return True
    return False
