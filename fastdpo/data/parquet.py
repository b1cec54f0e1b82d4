"""Rows of a parquet file, which may unfold to a million times its size: one text stored once for all rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from fastdpo.data.errors import DataError, refuse_twice
from fastdpo.wording import count, first_line, in_bytes

# a row and a value take so many bytes in Python, however small they are
ROW, VALUE = 200, 16
# texts are in memory as Python's rows and as the dataset that is made of them
COPIES = 2
# a file that unfolds so far is none of pairs; below a gigabyte it does no harm
MOST_TIMES, HARMLESS = 1_000, 10**9


def read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows with their places, numbered from 1. Raises `DataError` where they cannot be read, or not be held."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fastdpo.data.arrow_rows import arrow_rows

    try:
        _check_size(path)
        file = pq.ParquetFile(path)
        refuse_twice(str(path), file.schema_arrow.names)
        as_written = arrow_rows(file.schema_arrow, decoded=False)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", as_written(row)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowMemoryError, OSError) as error:
        reason = first_line(error).split(". ")[0]
        raise DataError(f"{path} is not a readable parquet file: {reason}.") from None


def _check_size(path: Path) -> None:
    """Refuse a file whose rows would not fit into memory, or unfold beyond reason, before they are unfolded.

    The metadata count a text once that is stored once; so the texts are read as numbers into a dictionary, and the
    lengths added up.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        metadata, stored = file.metadata, path.stat().st_size
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
        rows = metadata.num_rows
        fixed = ROW * rows + VALUE * sum(chunk.num_values for chunk in chunks)
        _refuse(path, rows, fixed + sum(chunk.total_uncompressed_size for chunk in chunks), stored)
        columns = [file.schema.column(index) for index in range(metadata.num_columns)]
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    with pq.ParquetFile(path, read_dictionary=texts) as file:
        size = fixed
        for batch in file.iter_batches(batch_size=10_000):
            size += sum(map(_text_bytes, batch.columns))
            _refuse(path, rows, size, stored)


def _text_bytes(array: Any) -> int:
    """The bytes of all texts in an Arrow array, each as often as it stands there."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.call_function("binary_length", [array.dictionary])
        return pc.call_function("sum", [lengths.cast(pa.int64()).take(array.indices)]).as_py() or 0
    if pa.types.is_struct(kind):
        return sum(_text_bytes(field) for field in array.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _text_bytes(array.flatten())
    if pa.types.is_map(kind):
        return _text_bytes(array.keys) + _text_bytes(array.items)
    return array.nbytes


def _refuse(path: Path, rows: int, size: int, stored: int) -> None:
    free = psutil.virtual_memory().available
    if COPIES * size > free:
        why = f"and twice as much is needed, of which {in_bytes(free)} are free"
    elif size > max(HARMLESS, MOST_TIMES * stored):
        why = f"more than {MOST_TIMES} times as much"
    else:
        return
    raise DataError(
        f"{path}: {in_bytes(stored)} unfold to {in_bytes(size)} or more in {count(rows, 'row')}, {why}; make a file of "
        "fewer or shorter rows."
    )
