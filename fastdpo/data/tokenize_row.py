"""One preference row -> its token ids, and which of them are scored: the ids that TRL 1.16 makes of the same row."""

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastdpo.data.errors import RowError
from fastdpo.data.rows.messages import Message, for_template, from_json
from fastdpo.data.rows.sides import sides_of
from fastdpo.data.shown import check_shown, template_errors

SCORED_TURNS = ("last", "all")
PROMPT_CUT = "_prompt_tokens_cut"
# "role field" of what the chat template leaves out of a row, one a line
LEFT_OUT = "_left_out"


def common_prefix_length(ids: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    for length, (token, other_token) in enumerate(zip(ids, other, strict=False)):
        if token != other_token:
            return length
    return min(len(ids), len(other))


def tokenize_row(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tools: str | None = None, scored_turns: str = "last"
) -> dict[str, Any]:
    """One row of texts, or of lists of messages -> `prompt_ids`, `chosen_ids`, `rejected_ids`, or of an unpaired row
    `prompt_ids`, `completion_ids`.

    Prompt, prompt + chosen and prompt + rejected are tokenized as wholes (messages through the chat template,
    the prompt with the generation prompt; text with the EOS token after the completion). A completion is what
    follows the common prefix of prompt and whole, the shorter of both completions' prefixes, so that tokens
    which merge across the boundary, or a template that renders the last turn otherwise, end up in the
    completions and both completions share `prompt_ids`. This is TRL 1.16's rule
    (`DPOTrainer._prepare_dataset`, `KTOTrainer._prepare_dataset`).

    `tools` (a list, or its JSON text) and `chat_template_kwargs` (a dict, or its JSON text) go to the
    template; rows without tools get those in `tools` (JSON text).

    scored_turns: with "last" every token of a completion is scored and none of the prompt, as in TRL: in a completion
    of several messages the turns of users and tools too. "all" adds `MASK_COLUMNS` to rows of messages: the assistant's
    turns are scored wherever they are, in the prompt too, and nothing else (see `assistant_spans`), as in minimind.
    For a pair of single answers that is the same.

    A prompt that ends in an assistant's turn is the beginning of the answer: the turn stays open, and an assistant's
    completion goes on in it.

    Raises `jinja2.TemplateError` where the chat template refuses the row, and `RowError` where it shows nothing of a
    turn, or cannot leave one open.
    """
    sides = sides_of(row)
    prompt, answers = row["prompt"], [row[side] for side in sides]
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        prompt_ids = tokenizer(prompt)["input_ids"]
        whole = [tokenizer(prompt + (text if text.endswith(eos) else text + eos))["input_ids"] for text in answers]
        return _split(prompt_ids, whole, sides)
    options = template_options(row, tools)

    def render(messages: list[Message], **more: Any) -> list[int]:
        return template_ids(tokenizer, messages, **options, **more)

    prompt, *answers = (for_template(messages) for messages in (prompt, *answers))
    begun = prompt
    goes_on = all(messages[0]["role"] == "assistant" for messages in (prompt[-1:], *answers))
    if goes_on:
        prompt, answers = prompt[:-1], [_continued(begun[-1], messages) for messages in answers]
    left_out: dict[tuple[str, str], None] = {}
    for side, completion in zip(sides, answers, strict=True):
        left_out |= dict.fromkeys(check_shown(tokenizer, prompt, completion, options, side))
    asked = _left_open(begun, render) if goes_on else render(prompt, add_generation_prompt=True)
    whole = [render(prompt + messages) for messages in answers]
    columns = _split(asked, whole, sides)
    columns[LEFT_OUT] = "\n".join(f"{role} {field}" for role, field in left_out)
    if scored_turns == "all":
        shared = len(columns["prompt_ids"])
        for side, completion, ids in zip(sides, answers, whole, strict=True):
            # the prompt's turns are looked for once
            first = len(prompt) if "prompt_mask" in columns else 0
            spans = assistant_spans(prompt + completion, ids, render, first=first)
            columns.setdefault("prompt_mask", _mask(spans, 0, shared))
            columns[f"{side}_mask"] = _completion_mask(spans, ids, shared, completion)
    return columns


def _left_open(prompt: list[Message], render: Callable[..., list[int]]) -> list[int]:
    """The prompt's ids with its last turn left open."""
    try:
        return render(prompt, continue_final_message=True)
    except ValueError as error:
        raise RowError(
            "`prompt` ends with an assistant turn, which the chat template cannot leave open; put it into `chosen` and "
            "`rejected`"
        ) from error


def _continued(begun: Message, completion: list[Message]) -> list[Message]:
    first = completion[0]
    return [{**begun, **first, "content": begun["content"] + first["content"]}, *completion[1:]]


def template_options(row: dict[str, Any], tools: str | None = None) -> dict[str, Any]:
    """What a row's chat template gets beside its messages; `tools` as in `tokenize_row`."""
    return {
        "tools": from_json(row.get("tools")) or from_json(tools),
        **(from_json(row.get("chat_template_kwargs")) or {}),
    }


def template_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Message], **options: Any) -> list[int]:
    """The ids of messages. Raises `jinja2.TemplateError`, also where the template divides by zero or never ends."""
    with template_errors():
        # transformers 5 answers with a BatchEncoding
        encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return encoded["input_ids"]


def _split(prompt_ids: list[int], whole: list[list[int]], sides: Sequence[str]) -> dict[str, Any]:
    shared = min(common_prefix_length(prompt_ids, ids) for ids in whole)
    return {
        "prompt_ids": prompt_ids[:shared],
        **{f"{side}_ids": ids[shared:] for side, ids in zip(sides, whole, strict=True)},
        PROMPT_CUT: len(prompt_ids) - shared,
        LEFT_OUT: "",
    }


def assistant_spans(
    messages: list[Message], ids: list[int], render: Callable[..., list[int]], first: int = 0
) -> list[tuple[int, int]]:
    """Where the assistant's turns are in `ids`, which are `render(messages)`: [start, end) of each, in order.

    A turn is the tokens that change when its message is replaced by one letter, and the tokens that end a turn after
    them (those after the last turn: an end-of-turn token, a newline). What the template writes in front of every answer
    is not in it. A template that refuses the letter (a tool's result without its call) is asked for the conversation
    up to the turn and with it instead. Turns before message `first` are left out.
    """
    spans = []
    for index in range(first, len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        before, message, after = messages[:index], messages[index], messages[index + 1 :]
        text = message.get("content") or ""
        letter = next(letter for letter in "xyz" if letter not in (text[:1], text[-1:]))
        try:
            varied = render([*before, {"role": "assistant", "content": letter}, *after])
        except TemplateError:
            start = common_prefix_length(ids, render(before, add_generation_prompt=True))
            spans.append((start, common_prefix_length(ids, render([*before, message]))))
            continue
        start = common_prefix_length(ids, varied)
        most = min(len(ids), len(varied)) - start
        spans.append((start, len(ids) - min(common_prefix_length(ids[::-1], varied[::-1]), most)))
    if not spans or messages[-1]["role"] != "assistant":
        return spans
    closing = ids[spans[-1][1] :]
    return [(start, end + common_prefix_length(closing, ids[end : end + len(closing)])) for start, end in spans]


def _completion_mask(
    spans: list[tuple[int, int]], whole: list[int], shared: int, completion: list[Message]
) -> list[int]:
    mask = _mask(spans, shared, len(whole))
    if completion[0]["role"] == "assistant" and 1 in mask:
        # the first turn begins where the completion does, as with scored_turns="last"
        mask[: mask.index(1)] = [1] * mask.index(1)
    return mask


def _mask(spans: list[tuple[int, int]], start: int, end: int) -> list[int]:
    """1 in the spans, for the tokens [start, end) of the sequence that the spans are in."""
    mask = [0] * (end - start)
    for begin, stop in spans:
        begin, stop = max(begin, start), min(stop, end)
        if begin < stop:
            mask[begin - start : stop - start] = [1] * (stop - begin)
    return mask
