"""A bench on which files are converted and what came of them is checked; rows to convert."""

import gzip
import json
from pathlib import Path
from typing import Any

from llamachat.chat_format import ChatFormat
from llamachat.data.check import check_path
from llamachat.data.convert.command import ConvertReport, convert_path


class Bench:
    """Converts and checks in a folder of its own."""

    def __init__(self, folder: Path, chat_format: ChatFormat) -> None:
        self.folder, self.forbidden = folder, chat_format.forbidden

    def convert(self, content: bytes | str, name: str = "in.jsonl", out: str = "out.jsonl", **options: Any) -> tuple:
        source, target = self.folder / name, self.folder / out
        source.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        target.unlink(missing_ok=True)
        report = convert_path(str(source), target, forbidden=self.forbidden, **options)
        return report, self.checked(target, report)

    def checked(self, target: Path, report: ConvertReport) -> list[Any]:
        """The records written, which the checking command passes, all of one kind."""
        found = check_path(str(target), None, "auto", self.forbidden)
        assert found.problems == [] and found.exit_status == 0
        assert (found.kind, found.num_records, found.num_duplicates) == (report.kind, report.written, 0)
        # HTML stays where nobody asked for plain text.
        warned = [warning for warning in found.warnings if warning.field != "content"]
        assert warned == [], "nothing is left that nothing reads"
        raw = gzip.decompress(target.read_bytes()) if target.suffix == ".gz" else target.read_bytes()
        return [json.loads(line) for line in raw.split(b"\n")[:-1]]
