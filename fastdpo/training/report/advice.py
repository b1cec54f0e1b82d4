"""One line when a logged number leaves its healthy range: what was seen, the likely cause, a fix; each at most once."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdpo.config.dpo_config import DPOConfig

logger = logging.getLogger(__name__)

Record = dict[str, float]

LN2 = math.log(2)
# their value is ln 2 where policy and reference agree
_LN2_LOSSES = {"sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired", "aot_pair"}
# sums of log-probs under a reference: the others bound or average what they push apart, or want the chosen answer down
_SUM_LOSSES = _LN2_LOSSES - {"sigmoid_norm"} | {
    *("hinge", "exo_pair", "nca_pair", "bco_pair", "apo_zero", "discopop", "kto_pair")
}
# neither averages over tokens nor cuts what the longer answer has more of
_LENGTH_FED = _SUM_LOSSES | {"apo_down", "cpo"}


class Advisor(TrainerCallback):
    """Looks at every training log and says what it makes of it, on world process zero.

    The rules read the trainer's log history, which a checkpoint keeps: a resumed run says nothing twice.

    Attributes:
        given: what was said, as {"step", "rule", "text"} each.
    """

    def __init__(self, args: DPOConfig) -> None:
        self.args = args
        self.given: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.given.clear()  # in place: a report holds the list
        logs = training_logs(state.log_history)
        for end in range(1, len(logs) + 1):
            self.given += self.new_advice(logs[:end])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = training_logs(state.log_history)
        if not logs or logs[-1] is not state.log_history[-1]:  # an evaluation's log
            return
        new = self.new_advice(logs)
        self.given += new
        if state.is_world_process_zero:
            for advice in new:
                logger.warning(f"advice (step {advice['step']}): {advice['text']}.")

    def new_advice(self, logs: Sequence[Record]) -> list[dict[str, Any]]:
        """What the rules say of the last of `logs`, the training logs so far, beyond what is in `given`."""
        said = {advice["rule"] for advice in self.given}
        new = []
        for name, rule in RULES.items():
            # a number that is not finite explains every other
            if name in said or "not_finite" in said:
                continue
            text = rule(logs, self.args)
            if text is not None:
                said.add(name)
                new.append({"step": int(logs[-1]["step"]), "rule": name, "text": text})
        return new


def training_logs(history: Sequence[dict[str, Any]]) -> list[Record]:
    """The records of training steps; evaluations, the run's own record, and windows in which unpaired answers were of
    one kind alone are left out."""
    return [record for record in history if "loss" in record and "rewards/margins" in record]


# the rules: the training logs so far, the last one just written -> a line, or None where nothing is wrong


def _not_finite(logs: Sequence[Record], args: DPOConfig) -> str | None:
    last = logs[-1]
    if math.isfinite(last["loss"]) and math.isfinite(last["rewards/margins"]):
        return None
    if args.fp16:
        cause, fix = "fp16 overflowed", "train with bf16=True, or in fp32"
    elif len(logs) == 1:
        cause = "the model's log-probs are not finite from the start (weights, dtype or a broken row)"
        fix = "look at `fastdpo inspect` and at the weights, and load them with dtype float32"
    else:
        cause = "the updates were too large" + (f" (grad norm {norm:.3g} before)" if (norm := _norm(logs[-2])) else "")
        fix = f"lower learning_rate (now {args.learning_rate:g}), add warmup_steps, or set max_grad_norm to 1.0"
    return f"the loss is {last['loss']:g}; likely cause: {cause}; fix: {fix}, and go on from an earlier checkpoint"


def _gradient_not_finite(logs: Sequence[Record], args: DPOConfig) -> str | None:
    # the loss scale of fp16 starts too high and comes down by steps that are skipped
    window = logs[-3 if args.fp16 else -1 :]
    norms = [_norm(record) for record in window]
    if len(window) < (3 if args.fp16 else 1) or any(norm is None or math.isfinite(norm) for norm in norms):
        return None
    cause, fix = "one batch's backward overflowed", f"lower learning_rate (now {args.learning_rate:g}), dtype float32"
    if args.fp16:
        cause, fix = "fp16 overflows in the backward", "train with bf16=True"
    return f"the gradient norm is {norms[-1]:g}; likely cause: {cause}; fix: {fix}"


def _no_gradient(logs: Sequence[Record], args: DPOConfig) -> str | None:
    window = logs[-2:]
    if len(window) < 2 or any(_norm(record) != 0 for record in window) or window[-1]["loss"] < 1e-3:
        return None  # a loss of nothing has no gradient either, rightly
    cause, fix = "no trained weight is reached", "check peft_config's target_modules and which adapter is active"
    if _answers_equal(window):
        cause, fix = "chosen and rejected answers are the same", "look at `fastdpo inspect` and the data's columns"
    elif "hinge" in args.loss_type:
        cause, fix = "every pair is past hinge's margin of 1", "take loss_type sigmoid, or a lower beta"
    return f"the gradient norm is 0; likely cause: {cause}; fix: {fix}"


def _stuck(logs: Sequence[Record], args: DPOConfig) -> str | None:
    window = logs[-5:]
    if not _is_only(args, _LN2_LOSSES) or args.sync_ref_model or len(window) < 5 or logs[-1]["step"] < 20:
        return None
    if any(abs(record["loss"] - LN2) > 2e-3 or abs(record["rewards/margins"]) > 4e-3 for record in window):
        return None
    if any(_norm(record) == 0 for record in window):
        return None  # said by another rule
    rates = [record.get("learning_rate", args.learning_rate) for record in window]
    if rates[-1] > rates[0]:
        return None  # warming up
    seen = f"the loss stays at ln 2 ({window[-1]['loss']:.4f}) up to step {int(logs[-1]['step'])}"
    rate = f"learning_rate (now {args.learning_rate:g})"
    if _answers_equal(window):
        cause, fix = "chosen and rejected answers are the same", "look at `fastdpo inspect` and the data's columns"
    elif max(rates) == 0:
        cause, fix = "the learning rate is 0", f"check {rate}, warmup_steps and lr_scheduler_type"
    elif all(record["rewards/margins"] == 0 and record["rewards/chosen"] == 0 for record in window):
        cause = "the weights do not change (updates too small for their dtype), or the reference is what is trained"
        fix = f"raise {rate}, load the model with dtype float32, or check the line `reference:` above"
    else:
        cause = f"{rate} is too small"
        fix = "raise it (about 1e-6 for all weights, 1e-5 to 1e-4 for a LoRA)"
    return f"{seen}; likely cause: {cause}; fix: {fix}"


def _chosen_falls(logs: Sequence[Record], args: DPOConfig) -> str | None:
    if not _is_only(args, _SUM_LOSSES) or len(logs) < 10:
        return None
    rewards = [record["rewards/chosen"] for record in logs[-10:]]
    before, now = _mean(rewards[:5]), _mean(rewards[5:])
    # it falls in most runs; it is a loss where it falls by more than the margin has gained
    if now > -0.5 or now > before - 0.1 or -now < _mean([record["rewards/margins"] for record in logs[-5:]]):
        return None
    fixes = [f"lower learning_rate (now {args.learning_rate:g})"]
    if not args.rpo_alpha:
        fixes.insert(0, "rpo_alpha=1.0")
    if "apo_zero" not in args.loss_type:
        fixes.append("loss_type apo_zero")
    return (
        f"the chosen answers' reward falls ({before:+.2f} to {now:+.2f}), by more than the margin gains; likely cause: "
        f"both answers become less likely, and the text may degenerate; fix: {', '.join(fixes)}"
    )


def _too_easy(logs: Sequence[Record], args: DPOConfig) -> str | None:
    # the first log may be of a policy that still is the reference, where no margin is above 0
    window = logs[1:5]
    if len(logs) != 5 or any(record.get("rewards/accuracies", 0.0) < 0.999 for record in window):
        return None
    steps = int(logs[-1]["step"] - logs[0]["step"])
    pairs = steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if pairs < 64 or logs[-1].get("epoch", 0.0) > 0.5 or _length_bias(logs, args) is not None:
        return None
    lengths = _lengths(window)
    cause = "something trivial tells chosen from rejected (a format, an empty answer), or these pairs were trained on"
    if lengths and not 0.5 < lengths[0] / max(lengths[1], 1e-9) < 2:
        cause = f"length tells them apart (chosen {lengths[0]:.0f} tokens, rejected {lengths[1]:.0f})"
    return (
        f"accuracy is 1.0 from the first {pairs} pairs on; likely cause: {cause}; fix: look at a pair in "
        "`fastdpo inspect`, and take harder pairs or fewer steps (max_steps)"
    )


def _margins_explode(logs: Sequence[Record], args: DPOConfig) -> str | None:
    window = [record["rewards/margins"] for record in logs[-3:]]
    if not _is_only(args, _SUM_LOSSES) or len(window) < 3 or min(window) < 20:
        return None
    return (
        f"the reward margin is {window[-1]:.1f}, {window[-1] / args.beta:.0f} nats from the reference; likely cause: "
        "the pairs are learnt and the policy still moves away, which costs its language; fix: fewer steps (max_steps, "
        f"num_train_epochs), lower learning_rate (now {args.learning_rate:g}), or a higher beta (now {args.beta:g})"
    )


def _entropy_collapses(logs: Sequence[Record], args: DPOConfig) -> str | None:
    window = [record.get("entropy", math.nan) for record in logs[-3:]]
    first = logs[0].get("entropy", 0.0)
    if len(logs) < 5 or first < 0.1 or not all(value < 0.1 * first for value in window):
        return None
    return (
        f"the policy's entropy fell from {first:.3g} to {window[-1]:.3g} nats a token; likely cause: it repeats one "
        f"text; fix: lower learning_rate (now {args.learning_rate:g}), raise beta (now {args.beta:g}), fewer steps"
    )


def _length_bias(logs: Sequence[Record], args: DPOConfig) -> str | None:
    lengths = _lengths(logs[:5])
    if not _is_only(args, _LENGTH_FED) or len(logs) != 5 or args.ld_alpha is not None or args.aggregate == "mean":
        return None
    if not lengths or min(lengths) < 1 or max(lengths) < 2 * min(lengths):
        return None
    longer = "chosen" if lengths[0] > lengths[1] else "rejected"
    return (
        f"the {longer} answers are {max(lengths) / min(lengths):.1f} times as long (chosen {lengths[0]:.0f} tokens, "
        f"rejected {lengths[1]:.0f}); likely cause of {'longer' if longer == 'chosen' else 'shorter'} answers to come: "
        "log-probs are summed over tokens; fix: loss_type sigmoid_norm or simpo, or ld_alpha=0.5"
    )


RULES: dict[str, Callable[[Sequence[Record], DPOConfig], str | None]] = {
    "not_finite": _not_finite,
    "gradient_not_finite": _gradient_not_finite,
    "no_gradient": _no_gradient,
    "stuck": _stuck,
    "chosen_falls": _chosen_falls,
    "too_easy": _too_easy,
    "margins_explode": _margins_explode,
    "entropy_collapses": _entropy_collapses,
    "length_bias": _length_bias,
}


def _is_only(args: DPOConfig, losses: set[str]) -> bool:
    """Whether every loss is of `losses`, and its rewards are those of a reference."""
    return set(args.loss_type) <= losses and not args.reference_free


def _norm(record: Record) -> float | None:
    return record.get("grad_norm")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _lengths(logs: Sequence[Record]) -> tuple[float, float] | None:
    """Mean scored tokens of chosen and rejected answers."""
    if any("length/chosen" not in record for record in logs):
        return None
    return _mean([record["length/chosen"] for record in logs]), _mean([record["length/rejected"] for record in logs])


def _answers_equal(logs: Sequence[Record]) -> bool:
    """Whether nothing tells the chosen answers from the rejected ones."""
    lengths = _lengths(logs)
    same = all(record["logps/chosen"] == record["logps/rejected"] for record in logs if "logps/chosen" in record)
    return lengths is not None and lengths[0] == lengths[1] and same
