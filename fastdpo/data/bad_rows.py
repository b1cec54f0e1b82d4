"""Rows that cannot be used: all of them named, with their places, or skipped and counted."""

import logging
from collections import Counter
from collections.abc import Sequence

from fastdpo.data.errors import DataError
from fastdpo.wording import count

logger = logging.getLogger(__name__)

_SHOWN = 50
_SKIPPED_SHOWN = 5
# (place, reason)
BadRow = tuple[str, str]


def settle_bad_rows(where: str, bad: Sequence[BadRow], kept: int, skip_bad_rows: bool) -> None:
    """Log what is skipped. Raises `DataError` where it must not be, or where nothing else is left."""
    total = kept + len(bad)
    if bad and (not skip_bad_rows or not kept):
        raise DataError(_list(where, bad, total, skip_bad_rows))
    if bad:
        first = "; ".join(f"{place}: {reason}" for place, reason in bad[:_SKIPPED_SHOWN])
        more = f"; and {len(bad) - _SKIPPED_SHOWN} more" if len(bad) > _SKIPPED_SHOWN else ""
        logger.warning(f"{where}: skipped {count(len(bad), 'bad row')} of {total}: {first}{more}")


def _list(where: str, bad: Sequence[BadRow], total: int, skipping: bool) -> str:
    reasons = Counter(reason for _, reason in bad)
    if len(bad) == total > 1 and len(reasons) == 1:
        return f"{where}: none of the {total} rows can be used; each: {bad[0][1]}."
    lines = [f"  {place}: {reason}" for place, reason in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    fix = "No row is left." if skipping else "Fix them, or go on without them with --skip_bad_rows."
    return "\n".join([f"{where}: {count(len(bad), 'bad row')} of {total}:", *lines, fix])
