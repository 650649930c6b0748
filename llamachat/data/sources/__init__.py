"""Known data sets, by the name that `format:` takes. To add one: a converter in a module here, an entry below, rows in
its test."""

from llamachat.data.sources.graded import (
    HELPSTEER2,
    HELPSTEER2_PREFERENCE,
    HELPSTEER3,
    ULTRAFEEDBACK,
    ULTRAFEEDBACK_BINARIZED,
)
from llamachat.data.sources.instructions import ALPACA, DOLLY, GPTEACHER, SELF_INSTRUCT
from llamachat.data.sources.labelled import BEAVERTAILS, HH_RLHF, PKU_HELPFULNESS, PKU_SAFETY, RATED_PAIRS
from llamachat.data.sources.oasst import OASST, OASST_PREFERENCE
from llamachat.data.sources.sharegpt import LLAMAFACTORY_PREFERENCE, SHAREGPT
from llamachat.data.sources.source import Source

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        ALPACA,
        BEAVERTAILS,
        DOLLY,
        GPTEACHER,
        HELPSTEER2,
        HELPSTEER2_PREFERENCE,
        HELPSTEER3,
        HH_RLHF,
        LLAMAFACTORY_PREFERENCE,
        OASST,
        OASST_PREFERENCE,
        PKU_HELPFULNESS,
        PKU_SAFETY,
        RATED_PAIRS,
        SELF_INSTRUCT,
        SHAREGPT,
        ULTRAFEEDBACK,
        ULTRAFEEDBACK_BINARIZED,
    )
}

__all__ = ["SOURCES", "Source"]
