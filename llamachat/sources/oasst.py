"""OpenAssistant message trees (oasst1 and oasst2 exports, one tree a row): ranked answers under every question.

A tree yields dialogs (every path that takes the best-ranked answer at each fork) or preferences (every two ranked
answers to one question).
"""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from llamachat.sources.source import Record, Row, Source, as_text, mapping_at, message

_ROLES = {"prompter": "user", "assistant": "assistant"}


def rating_of_rank_distance(distance: int) -> str:
    """How much better the higher-ranked of two answers is: ours, since the annotators ordered answers without grades."""
    return {1: "slightly_better", 2: "better"}.get(distance, "significantly_better")


def _message(node: Mapping[str, Any]) -> dict[str, str]:
    role = node.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(
            f"'role' of a message is {role!r}. A tree of oasst has 'prompter' and 'assistant'. Mend or remove the tree."
        )
    return message(_ROLES[role], as_text(node.get("text"), "text"))


def _replies(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    replies = node.get("replies") or []
    if not isinstance(replies, list):
        raise ValueError("'replies' of a message is not a list. It holds the answers to it. Mend or remove the tree.")
    found = [mapping_at(reply, "'replies'") for reply in replies]
    return [reply for reply in found if not reply.get("deleted")]


def _root(row: Row) -> Mapping[str, Any]:
    return mapping_at(row.get("prompt"), "'prompt'")


def _rank(node: Mapping[str, Any]) -> int | None:
    rank = node.get("rank")
    return rank if isinstance(rank, int) else None


def _best_paths(node: Mapping[str, Any], path: list[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    """Paths from here that end in an answer; `path` is what came before this node."""
    path = [*path, _message(node)]
    replies = _replies(node)
    if node["role"] == "prompter":
        ranked = [reply for reply in replies if _rank(reply) is not None]
        # Unranked answers occur where there was only one: it is then the best.
        best = [min(ranked, key=lambda reply: _rank(reply) or 0)] if ranked else replies[:1]
        for reply in best:
            yield from _best_paths(reply, path)
        return
    longer = [found for reply in replies for found in _best_paths(reply, path)]
    yield from longer or [path]


def convert_dialog(row: Row) -> Iterator[Record]:
    for path in _best_paths(_root(row), []):
        yield {"messages": path}


def _ranked_pairs(node: Mapping[str, Any], path: list[dict[str, str]]) -> Iterator[Record]:
    path = [*path, _message(node)]
    replies = _replies(node)
    if node["role"] == "prompter":
        ranked = [(rank, reply) for reply in replies if (rank := _rank(reply)) is not None]
        ranked.sort(key=lambda entry: entry[0])
        for (rank, better), (other_rank, worse) in combinations(ranked, 2):
            if rank == other_rank:
                continue
            yield {
                "prompt": path,
                "chosen": [_message(better)],
                "rejected": [_message(worse)],
                "rating": rating_of_rank_distance(other_rank - rank),
            }
    for reply in replies:
        yield from _ranked_pairs(reply, path)


def convert_preference(row: Row) -> Iterator[Record]:
    return _ranked_pairs(_root(row), [])


_FIELDS = frozenset({"message_tree_id", "prompt"})
OASST = Source(name="oasst", kind="dialog", fields=_FIELDS, convert=convert_dialog)
OASST_PREFERENCE = Source(name="oasst_preference", kind="preference", fields=_FIELDS, convert=convert_preference)
