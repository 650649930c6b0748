"""The values of constraints: from files, or asked of the policy itself, as the paper did (Llama 2, section 3.3)."""

import logging
from collections import Counter
from pathlib import Path

from gatt.config import Config
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import DialogError, Message
from llamachat.constraints import parse_list, read_list
from llamachat.errors import DataError
from llamachat.rollout.engine import RolloutEngine, Sampling, scatter_generate

log = logging.getLogger(__name__)

FEWEST = 12  # values of a family: some of them are held out
LISTS_ASKED = 32  # answers sampled for each list
QUESTIONS = {
    "figures": "Write a list of twenty famous public figures, one name a line.",
    "hobbies": "Write a list of twenty hobbies, one a line.",
    "languages": "Write a list of twenty languages, one a line.",
}
_OF_FAMILY = {"figure": "figures", "hobby": "hobbies", "language": "languages"}


def lists_of(
    config: Config, engine: RolloutEngine, chat_format: ChatFormat, sampling: Sampling
) -> dict[str, list[str]]:
    """The values of the recipe's families that have a list, by list."""
    wanted = [name for family, name in _OF_FAMILY.items() if family in config.families]
    if config.values == "policy":
        return {name: asked(name, engine, chat_format, sampling) for name in wanted}
    places = {"figures": config.lists.figures, "hobbies": config.lists.hobbies, "languages": config.lists.languages}
    found = {name: list(read_list(Path(places[name]))) for name in wanted}
    for name, values in found.items():
        for value in values:
            reason = _fault(value, chat_format)
            if reason:
                raise DataError(f"{places[name]}: the entry {value!r} {reason} Write it otherwise, or drop it.")
    return found


def asked(name: str, engine: RolloutEngine, chat_format: ChatFormat, sampling: Sampling) -> list[str]:
    """What the policy names when it is asked for a list, the most often named first."""
    prompt = chat_format.encode_prompt([Message("user", QUESTIONS[name])])
    (found,) = scatter_generate(engine, [prompt], samples_per_prompt=LISTS_ASKED, sampling=sampling)
    counts: Counter[str] = Counter()
    spelling: dict[str, str] = {}
    for completion in found:
        for entry in parse_list(chat_format.decode_answer(completion.token_ids)):
            if _fault(entry, chat_format) is None:
                spelling.setdefault(entry.casefold(), entry)
                counts[entry.casefold()] += 1
    if len(counts) < FEWEST:
        raise DataError(
            f"gatt.values: policy, but the policy named {len(counts)} {name} in {LISTS_ASKED} answers, and {FEWEST} are "
            "needed, some of them to measure with. Take them from files (gatt.values=lists), or tune the policy first."
        )
    log.info("%d %s named by the policy", len(counts), name)
    return [spelling[entry] for entry, _ in counts.most_common()]


def _fault(value: str, chat_format: ChatFormat) -> str | None:
    """Why the value cannot stand in an instruction, if it cannot."""
    try:
        chat_format.check_text((Message("system", value),))
    except DialogError as error:
        return error.reason
    return None
