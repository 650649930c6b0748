"""Known data sets, by their names for `format:`. To add one, write a converter in a module here, and a test."""

from llamachat.data.sources import dialogs, judged, oasst
from llamachat.data.sources.source import Source

__all__ = ["SOURCES", "Source"]

_DEFINED = [item for module in (dialogs, judged, oasst) for item in vars(module).values()]

SOURCES: dict[str, Source] = {
    source.name: source
    for source in sorted((item for item in _DEFINED if isinstance(item, Source)), key=lambda source: source.name)
}
