"""What tokenization did to a dataset, in numbers and in one line."""

from dataclasses import asdict, dataclass
from typing import Any

from fastdpo.wording import count


@dataclass(frozen=True)
class TokenizeReport:
    """What tokenization kept, dropped and will cut. Counts are rows (pairs); None for a lazy IterableDataset.

    rows: rows that are left.
    overlong: rows given, of which a sequence is longer than `max_length`.
    dropped_overlong: those of them that were dropped: all with `on_overlong="drop"`, else none (but see the next two).
    dropped_long_prompt: rows dropped because the prompt alone fills `max_length` (keep_start only, as TRL).
    dropped_unscored: other rows dropped because neither completion has a scored token.
    truncated_chosen, truncated_rejected: kept rows whose sequence the collator cuts at `max_length`; of unpaired rows
        truncated_completions, and the others are None.
    empty_after_truncation: kept rows in which one completion has no scored token.
    shortened_prompts, shortened_chosen, shortened_rejected: kept rows in which a part was longer than
        `max_prompt_length` or `max_completion_length` and was cut to it; of unpaired rows shortened_completions.
    left_out: what the chat template leaves out of rows, a sentence each.
    length_of: the `max_length` that would keep 95 % and all of the rows, where `dropped_long_prompt` is not 0.
    prompt_cut: rows whose prompt ends in tokens that are not a prefix of prompt + completion; these tokens
        are left out (see `tokenize_row`).
    """

    name: str
    rows: int | None
    max_length: int | None
    dropped_long_prompt: int | None = None
    dropped_unscored: int | None = None
    truncated_chosen: int | None = None
    truncated_rejected: int | None = None
    truncated_completions: int | None = None
    empty_after_truncation: int | None = None
    shortened_prompts: int | None = None
    shortened_chosen: int | None = None
    shortened_rejected: int | None = None
    shortened_completions: int | None = None
    prompt_cut: int | None = None
    overlong: int | None = None
    dropped_overlong: int | None = None
    left_out: tuple[str, ...] = ()
    length_of: dict[str, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The counts of the kind of rows that it is about."""
        others = ("completions",) if self.truncated_completions is None else ("chosen", "rejected")
        return {name: value for name, value in asdict(self).items() if name.rpartition("_")[2] not in others}

    def __str__(self) -> str:
        if self.rows is None:
            return f"{self.name}: streamed, rows are tokenized as they come and not counted"
        paired = self.truncated_completions is None
        pairs = f"{self.name}: {count(self.rows, 'pair' if paired else 'unpaired row')}"
        if self.max_length is None:
            parts = [f"{pairs}, no max_length"]
        else:
            dropped = f"dropped {self.dropped_long_prompt} whose prompt alone fills it"
            if self.length_of:
                most, every = self.length_of["95 %"], self.length_of["100 %"]
                dropped += (
                    f" (max_length {most} would keep 95 % of all {'pairs' if paired else 'rows'} and {every} all of "
                    "them; max_prompt_length, or truncation_mode='keep_end', cuts prompts from the left instead)"
                )
            cut = (
                f"{self.truncated_chosen} chosen and {self.truncated_rejected} rejected"
                if self.truncated_completions is None
                else count(self.truncated_completions, "completion")
            )
            parts = [f"{pairs}; max_length {self.max_length} cuts {cut}", dropped]
        if self.dropped_overlong:
            parts.append(f"dropped {self.dropped_overlong} longer than max_length")
        if self.shortened_prompts:
            parts.append(f"max_prompt_length cuts {count(self.shortened_prompts, 'prompt')} from the left")
        if self.shortened_chosen or self.shortened_rejected:
            parts.append(
                f"max_completion_length cuts {self.shortened_chosen} chosen and {self.shortened_rejected} rejected"
            )
        if self.shortened_completions:
            parts.append(f"max_completion_length cuts {count(self.shortened_completions, 'completion')}")
        if self.dropped_unscored:
            parts.append(f"dropped {self.dropped_unscored} without a scored token")
        if self.empty_after_truncation:
            parts.append(f"{self.empty_after_truncation} with no scored token in one of the completions")
        return "; ".join(parts)
