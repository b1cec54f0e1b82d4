"""axolotl's `datasets` as ours: what its types read, and which chat template they write."""

from collections.abc import Mapping
from typing import Any

from fastdpo.cli.errors import UsageError
from fastdpo.cli.train.translations.templates import CHATML, LLAMA3

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "chat_template": None, "zephyr": None}
_QUESTION = ["prompt", "input", "question", "instruction"]  # the first that a row has
# the second half of a type -> its columns of question, chosen and rejected answer, all texts
_TEXTS: dict[str, tuple[str | list[str], str | list[str], str | list[str]]] = {
    "default": (_QUESTION, ["chosen", "chosen_response"], ["rejected", "rejected_response"]),
    "argilla": ("instruction", "chosen_response", "rejected_response"),
    "icr": ("input", "chosen", "rejected"),
    "intel": ("question", "chosen", "rejected"),
    "prompt_pairs": ("prompt", "chosen", "rejected"),
}
# rows of messages, which are read as they are
_DIALOGUES = ("ultra", "argilla_chat", "nectar")
_KTO_QUESTIONS = {"argilla": "instruction", "intel": "question", "prompt_pairs": "prompt", "ultra": "prompt"}
_SAME = ("path", "name", "split", "data_files", "data_dir")
_NO_EFFECT = ("ds_type", "trust_remote_code", "preprocess_shards", "train_on_eos", "train_on_eot", "roles_to_train")
_FIELDS = ("field_messages", "field_chosen", "field_rejected", "field_tools")
_ROLES = {"user": {"user", "human"}, "assistant": {"assistant", "gpt"}, "system": {"system"}, "tool": {"tool"}}


def read_dataset(entry: Any, where: str, method: str) -> tuple[dict[str, Any], str | None]:
    """One entry as our `datasets` have it, and the template that its type writes; None for the configured one.

    method: the value of `rl`. Raises UsageError, which names the entry's key.
    """
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where} is {type(entry).__name__}; wanted keys path, type and split")
    options = {key: value for key, value in entry.items() if value is not None}
    _check_kinds(options, where)
    spec = {key: options[key] for key in _SAME if key in options}
    if isinstance(options.get("type"), Mapping):
        columns, template = _user_defined(options["type"], where, method), None
    else:
        columns, template = _typed(options, where, method)
    known = {*_SAME, *_NO_EFFECT, *_FIELDS, "type", "message_property_mappings", "roles"}
    unknown = next((key for key in options if key not in known and options[key]), None)
    if unknown is not None:
        raise UsageError(f"{where}: {unknown} is not supported: leave it out, or write the rows so")
    # a name that a row has anyway needs no word
    columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    return {**spec, **({"columns": columns} if columns else {})}, template


def _check_kinds(options: Mapping[str, Any], where: str) -> None:
    """Texts where names stand; raises UsageError."""
    names = {key: options.get(key) for key in _FIELDS}
    for key in ("message_property_mappings", "roles"):
        if not isinstance(options.get(key, {}), Mapping):
            raise UsageError(f"{where}: {key} is {options[key]!r}; wanted a mapping")
    if isinstance(options.get("type"), Mapping):
        names |= options["type"]
    names |= options.get("message_property_mappings", {})
    wrong = next((key for key, name in names.items() if not isinstance(name, str | None)), None)
    if wrong is not None:
        raise UsageError(f"{where}: {wrong} is {names[wrong]!r}; wanted text")
    for role, others in options.get("roles", {}).items():
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise UsageError(f"{where}: roles gives {role} {others!r}; wanted a list of names")


def _typed(options: Mapping[str, Any], where: str, method: str) -> tuple[dict[str, Any], str | None]:
    name = str(options.get("type", "passthrough"))
    name = f"chatml.{name.removesuffix('_apply_chatml')}" if name.endswith("_apply_chatml") else name
    family, _, form = name.partition(".")
    form = form or "default"
    if family == "passthrough":
        return {}, None
    if family == "user_defined":
        return _user_defined({}, where, method), None
    if family not in TEMPLATES:
        raise UsageError(f"{where}: type {name} is not supported: use one of {', '.join(TEMPLATES)}, or fields")
    if family == "chat_template":
        return _messages(options, where), None
    if method == "kto":
        if form in _KTO_QUESTIONS:
            return {"instruction": _KTO_QUESTIONS[form], "output": "completion"}, TEMPLATES[family]
    elif form in _TEXTS:
        # texts of a chat: our rows of an instruction and two answers become messages
        question, chosen, rejected = _TEXTS[form]
        return {"instruction": question, "chosen": chosen, "rejected": rejected}, TEMPLATES[family]
    if form not in _DIALOGUES:
        raise UsageError(f"{where}: type {name} is not supported: use one of {', '.join((*_TEXTS, *_DIALOGUES))}")
    return {}, TEMPLATES[family]


def _messages(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`chat_template.*`: which columns hold messages; what they are called in a message is checked."""
    mapping = options.get("message_property_mappings") or {}
    keys = (mapping.get("role", "role"), mapping.get("content", "content"))
    if keys not in (("role", "content"), ("from", "value")):
        raise UsageError(f"{where}: message_property_mappings names {' and '.join(keys)}: rename them in the rows")
    for role, names in (options.get("roles") or {}).items():
        if not {*names} <= _ROLES.get(role, set()):
            raise UsageError(f"{where}: roles gives {role} the names {', '.join(names)}: rename them in the rows")
    names = {field: options.get(field, field.removeprefix("field_")) for field in _FIELDS}
    return {field.removeprefix("field_"): name for field, name in names.items()}


def _user_defined(fields: Mapping[str, Any], where: str, method: str) -> dict[str, Any]:
    """Texts under any names; what a format adds to them would need rows of its own."""
    parts = ("prompt", "completion", "label") if method == "kto" else ("prompt", "chosen", "rejected")
    for part in parts:
        form = fields.get(f"{part}_format")
        if form and form != f"{{{part}}}":
            raise UsageError(
                f"{where}: {part}_format {form!r} is not supported: use type chat_template.default with a "
                "chat_template, or write the text into the rows"
            )
    return {part: fields.get(f"field_{part}") or part for part in parts}
