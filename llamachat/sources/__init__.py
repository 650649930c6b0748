"""Known public data sets, by the name that `format:` takes. To add one: a module here, an entry below, rows in its test."""

from llamachat.sources.alpaca import ALPACA, GPTEACHER
from llamachat.sources.dolly import DOLLY
from llamachat.sources.hh_rlhf import HH_RLHF
from llamachat.sources.oasst import OASST, OASST_PREFERENCE
from llamachat.sources.self_instruct import SELF_INSTRUCT
from llamachat.sources.sharegpt import LLAMAFACTORY_PREFERENCE, SHAREGPT
from llamachat.sources.source import Source

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        ALPACA,
        DOLLY,
        GPTEACHER,
        HH_RLHF,
        LLAMAFACTORY_PREFERENCE,
        OASST,
        OASST_PREFERENCE,
        SELF_INSTRUCT,
        SHAREGPT,
    )
}

__all__ = ["SOURCES", "Source"]
