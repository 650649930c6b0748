"""How many records the data of a step hold, told in a moment: lines are counted, large files by their first part."""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamachat.config.sections import DataSource

BYTES_PER_TOKEN = 4.0  # of JSON lines of English dialogs; ours, rough
HUB_TOKENS = 200.0  # a dialog of a set that is not here; ours, assumed
MOST_BYTES = 1 << 26  # read of one file; what comes after is taken to be like it


@dataclass(frozen=True, slots=True)
class DataSize:
    """Records, weights counted, and the tokens of one."""

    records: float
    tokens_per_record: float


def measure_data(sources: Sequence[DataSource], *, hub_tokens: float = HUB_TOKENS) -> DataSize | None:
    """Size of the sources; None as soon as one of them is not here and has no `limit` to bound it.

    `hub_tokens` are assumed in a record of a set that is not here.
    """
    records = tokens = 0.0
    for source in sources:
        size = _measure(source, hub_tokens)
        if size is None:
            return None
        records += size.records * source.weight
        tokens += size.records * size.tokens_per_record * source.weight
    return DataSize(records, tokens / records) if records else None


def _measure(source: DataSource, hub_tokens: float) -> DataSize | None:
    path = Path(source.path)
    if path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")):
        return _measure_lines(path, source.limit)
    if path.is_file() and path.suffix == ".parquet":
        return _measure_parquet(path, source.limit)
    return DataSize(source.limit, hub_tokens) if source.limit is not None and not path.exists() else None


def _measure_lines(path: Path, limit: int | None) -> DataSize:
    lines = num_bytes = 0
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else path.open("rb") as stream:
        for line in stream:
            if lines == limit:
                break
            lines, num_bytes = lines + 1, num_bytes + len(line)
            if num_bytes >= MOST_BYTES:
                position = raw.tell() if path.suffix == ".gz" else num_bytes
                whole = lines * max(1.0, path.stat().st_size / position)
                return DataSize(min(whole, limit) if limit else whole, num_bytes / lines / BYTES_PER_TOKEN)
    return DataSize(lines, num_bytes / lines / BYTES_PER_TOKEN if lines else 0.0)


def _measure_parquet(path: Path, limit: int | None) -> DataSize | None:
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError):
        return None  # told where it is read
    num_bytes = sum(found.row_group(index).total_byte_size for index in range(found.num_row_groups))
    rows = max(1, found.num_rows)
    return DataSize(min(found.num_rows, limit) if limit else found.num_rows, num_bytes / rows / BYTES_PER_TOKEN)
