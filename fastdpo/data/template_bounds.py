"""A chat template comes with a model and is a program: one row is rendered under limits before all rows are."""

import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastdpo.data.errors import DataError
from fastdpo.data.rows.messages import Message

logger = logging.getLogger(__name__)

SECONDS = 2  # of a processor, for a row that takes milliseconds
BYTES = 1 << 30
# a template adds a system prompt, tools and turn markers
EXTRA_CHARACTERS, TIMES_LONGER = 1_000_000, 20
_SCRIPT = Path(__file__).with_name("render_alone.py")
_tried: set[str] = set()


def check_template(
    tokenizer: PreTrainedTokenizerBase,
    renders: Sequence[tuple[list[Message], bool]],
    options: Mapping[str, Any],
    name: str,
) -> None:
    """Render conversations, each with its add_generation_prompt, in a process with limits; once for each template.

    options: what the template gets besides. name: what the message calls the row. A template that merely fails is left
    to the rendering that counts.

    Raises `DataError` where it takes too long, too much memory, or makes far more text than the row has.
    """
    template = str(tokenizer.get_chat_template(tools=options.get("tools")))
    if template in _tried:
        return
    job = {
        "path": [path for path in sys.path if path],
        "seconds": SECONDS,
        "bytes": BYTES,
        "template": template,
        "options": {**tokenizer.special_tokens_map, **options},
        "renders": [list(render) for render in renders],
    }
    text = json.dumps(job, default=str)
    fix = "give the model another chat template (chat_template.jinja, or tokenizer.chat_template)"
    reason = _why_refused(text)
    if reason is not None:
        raise DataError(f"{name}: the tokenizer's chat template {reason}; {fix}.")
    _tried.add(template)


def _why_refused(job: str) -> str | None:
    clock = 30.0 if sys.platform != "win32" else SECONDS + 1.0  # else the processor's time is what counts
    try:
        # isolated, without site: it gets this process's paths
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(_SCRIPT)], input=job.encode(), capture_output=True, timeout=clock
        )
    except subprocess.TimeoutExpired:
        return f"takes more than {SECONDS} seconds for one row"
    except OSError as error:
        logger.warning(f"the chat template is not tried on one row first: no process can be started ({error}).")
        return None
    answer = done.stdout.decode().strip()
    if answer == "memory":
        return f"takes more than {BYTES >> 30} GiB of memory for one row"
    if done.returncode in (-9, -24):  # SIGKILL, SIGXCPU: the processor's time is used up
        return f"takes more than {SECONDS} seconds for one row"
    if done.returncode < 0:
        return f"makes Python crash (signal {-done.returncode})"
    if not answer.isdigit():
        logger.warning(f"the chat template is not tried on one row first: {done.stderr.decode()[-200:].strip()}")
        return None
    most = EXTRA_CHARACTERS + TIMES_LONGER * len(job)
    return f"makes {int(answer):,} characters of one row" if int(answer) > most else None
