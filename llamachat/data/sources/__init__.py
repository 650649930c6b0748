"""Known data sets, by the name that `format:` takes. To add one: a converter in a module here, its name below, rows in
its test."""

from llamachat.data.sources.graded import (
    helpsteer2,
    helpsteer2_preference,
    helpsteer3,
    ultrafeedback,
    ultrafeedback_binarized,
)
from llamachat.data.sources.instructions import alpaca, dolly, gpteacher, self_instruct
from llamachat.data.sources.labelled import (
    beavertails,
    hh_rlhf,
    pku_saferlhf_helpfulness,
    pku_saferlhf_safety,
    rated_pairs,
)
from llamachat.data.sources.oasst import oasst, oasst_preference
from llamachat.data.sources.sharegpt import llamafactory_preference, sharegpt
from llamachat.data.sources.source import Source

__all__ = ["SOURCES", "Source"]

_INSTRUCTIONS = (alpaca, dolly, gpteacher, self_instruct)
_LABELLED = (beavertails, hh_rlhf, pku_saferlhf_helpfulness, pku_saferlhf_safety, rated_pairs)
_GRADED = (helpsteer2, helpsteer2_preference, helpsteer3, ultrafeedback, ultrafeedback_binarized)
_CONVERSATIONS = (llamafactory_preference, oasst, oasst_preference, sharegpt)
_ALL = (*_INSTRUCTIONS, *_LABELLED, *_GRADED, *_CONVERSATIONS)

SOURCES: dict[str, Source] = {source.name: source for source in sorted(_ALL, key=lambda source: source.name)}
