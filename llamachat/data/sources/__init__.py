"""Known data sets, by the name that `format:` takes. To add one: a module here, an entry below, rows in its test."""

from llamachat.data.sources.alpaca import ALPACA, GPTEACHER
from llamachat.data.sources.dolly import DOLLY
from llamachat.data.sources.helpsteer import HELPSTEER2, HELPSTEER2_PREFERENCE, HELPSTEER3
from llamachat.data.sources.hh_rlhf import HH_RLHF
from llamachat.data.sources.oasst import OASST, OASST_PREFERENCE
from llamachat.data.sources.pku import BEAVERTAILS, PKU_HELPFULNESS, PKU_SAFETY
from llamachat.data.sources.rated_pairs import RATED_PAIRS
from llamachat.data.sources.self_instruct import SELF_INSTRUCT
from llamachat.data.sources.sharegpt import LLAMAFACTORY_PREFERENCE, SHAREGPT
from llamachat.data.sources.source import Source
from llamachat.data.sources.ultrafeedback import ULTRAFEEDBACK, ULTRAFEEDBACK_BINARIZED

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
