"""OpenAssistant message trees (oasst1 and oasst2): ranked answers to every question.

A tree yields dialogs (every path that takes the best-ranked answer at each fork) or preferences (every two ranked
answers to one question).
The sets have two formats, described in the cards of OpenAssistant/oasst1 and oasst2. Files `*.trees.jsonl.gz` contain a
tree per row: `message_tree_id`, `tree_state`, `prompt` with nested `replies`. Files `*.messages.jsonl.gz` and the Hub's
own table contain a message a row: `message_id`, `parent_id` (null at the root), `message_tree_id`, `role` (prompter or
assistant), `text`, `rank` (0 is the best; null if unranked), `deleted`, `review_result` etc. There the messages of a
tree are adjacent, so a tree is assembled from adjacent rows, with only one in memory at a time. A tree whose rows are
not adjacent (a shuffled copy) is rejected, since half a tree would give other dialogs than the whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from llamachat.chat_format.dialog import DialogError
from llamachat.data.sources.source import Gather, RawRecord, RawRow, as_row, as_text, message, source

_DEEPEST = 100  # turns; the longest conversations in the sets have about ten
_ROLES = {"prompter": "user", "assistant": "assistant"}
# The rating of the higher-ranked of two answers: ours, since the annotators only ranked the answers.
_RATING_OF_RANK_DISTANCE = {1: "slightly_better", 2: "better"}


def _message(node: Mapping[str, Any]) -> dict[str, str]:
    role = node.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise DialogError("role", f"is {role!r}, but it is 'prompter' or 'assistant'.", "Correct or remove the tree.")
    return message(_ROLES[role], as_text(node.get("text"), "text"))


def _replies(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    replies = node.get("replies") or []
    if not isinstance(replies, list):
        raise DialogError("replies", "is not a list of the answers to a message.", "Correct or remove the tree.")
    return [reply for reply in replies if _is_kept(as_row(reply, "replies"))]


def _is_kept(node: Mapping[str, Any]) -> bool:
    """Whether a message was neither deleted by moderators nor marked as spam (in files that contain such messages)."""
    return not node.get("deleted") and node.get("review_result") is not False


def tree_of_messages(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Assemble a tree from the messages of a table, with the structure of the tree files."""
    nodes: dict[object, dict[str, Any]] = {}
    for row in rows:
        name = as_text(row["message_id"], "message_id")
        if name in nodes:
            reason = f"{name!r} occurs twice in one tree, but each message needs its own id."
            raise DialogError("message_id", reason, "Remove one of the two rows.")
        nodes[name] = {**row, "replies": []}
    roots = []
    for node in nodes.values():
        parent = None if node.get("parent_id") is None else as_text(node["parent_id"], "parent_id")
        if parent is None:
            roots.append(node)
        elif parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            raise DialogError(
                "parent_id",
                f"{parent!r} is not a message in the tree's adjacent rows, but a tree is read as a whole.",
                "Sort the file by 'message_tree_id', or add the missing row.",
            )
    if len(roots) != 1:
        reason = f"is null in {len(roots)} messages of one tree, but exactly one message of a tree must have no parent."
        raise DialogError("parent_id", reason, "Correct or remove the tree's rows.")
    if not _is_whole(roots[0], len(nodes)):
        reason = f"does not make a tree of these messages, or makes one of more than {_DEEPEST} turns."
        raise DialogError("parent_id", reason, "Correct or remove the tree's rows.")
    return {"message_tree_id": rows[0]["message_tree_id"], "prompt": roots[0]}


def _is_whole(root: Mapping[str, Any], size: int) -> bool:
    """Whether all messages descend from the root within the depth limit; a cycle of messages does not."""
    level, count = [root], 0
    for _ in range(_DEEPEST):
        count += len(level)
        level = [reply for node in level for reply in node["replies"]]
    return count == size


def _rank(node: Mapping[str, Any]) -> int | None:
    rank = node.get("rank")
    return rank if isinstance(rank, int) else None


def _best_paths(node: Mapping[str, Any], path: list[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    """Yield paths from this node that end in an answer; `path` leads to the node."""
    path = [*path, _message(node)]
    replies = _replies(node)
    if node["role"] == "prompter":
        ranked = [reply for reply in replies if _rank(reply) is not None]
        # An answer is unranked if it was the only one; then it is the best.
        best = [min(ranked, key=lambda reply: _rank(reply) or 0)] if ranked else replies[:1]
        for reply in best:
            yield from _best_paths(reply, path)
        return
    longer = [long_path for reply in replies for long_path in _best_paths(reply, path)]
    yield from longer or [path]


def _is_tree(row: Mapping[str, Any]) -> bool:
    return isinstance(row["prompt"], Mapping)


_MESSAGES = Gather(
    fields=frozenset({"message_tree_id", "message_id", "role", "text"}), key="message_tree_id", join=tree_of_messages
)


@source("dialog", "message_tree_id prompt", shape=_is_tree, gather=_MESSAGES)
def oasst(row: RawRow) -> Iterator[RawRecord]:
    root = as_row(row.get("prompt"), "prompt")
    yield from ({"messages": path} for path in (_best_paths(root, []) if _is_kept(root) else ()))


def _ranked_pairs(node: Mapping[str, Any], path: list[dict[str, str]]) -> Iterator[RawRecord]:
    path = [*path, _message(node)]
    replies = _replies(node)
    if node["role"] == "prompter":
        ranked = [(rank, reply) for reply in replies if (rank := _rank(reply)) is not None]
        ranked.sort(key=lambda entry: entry[0])
        for (rank, better), (other_rank, worse) in combinations(ranked, 2):
            if rank != other_rank:
                rating = _RATING_OF_RANK_DISTANCE.get(other_rank - rank, "significantly_better")
                yield {"prompt": path, "chosen": [_message(better)], "rejected": [_message(worse)], "rating": rating}
    for reply in replies:
        yield from _ranked_pairs(reply, path)


@source("preference", "message_tree_id prompt", shape=_is_tree, gather=_MESSAGES)
def oasst_preference(row: RawRow) -> Iterator[RawRecord]:
    root = as_row(row.get("prompt"), "prompt")
    yield from _ranked_pairs(root, []) if _is_kept(root) else ()
