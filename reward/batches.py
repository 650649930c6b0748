"""Arrange pairs and labelled responses into optimizer steps, packed rows and tensors.

A row contains whole pairs and single responses, separated by positions that restart at 0 (as in
`llamachat.data.packing`). A step is a fixed set of pairs with an even share of the single responses, so the row layout
affects speed and memory but not the result. Each row records the number of pairs and labels of its whole step, by
which losses are divided. Adjacent pairs whose chosen answers end the same dialog, or prefixes of it, stay together, as
do all comparisons of a prompt in Ouyang et al. 2022 (arXiv:2203.02155, section 3.5). If the model attends by sequence,
that dialog is computed once and the rejected answers branch off it (`llamachat.models.sequence_attention`).
Shapes: 1 a packed row, T positions, N responses in the row, B pairs in the row, L labelled responses in the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from llamachat import distributed
from llamachat.data.packing import StepPlan, epoch_order, lay_out, pack_responses
from llamachat.data.pairs import PairExample
from reward.pairs import LabelExample

_MOST_TOGETHER = 12  # pairs kept together in one row, at most

Group = tuple[int, ...]  # indices of the pairs of one dialog, the shortest first


@dataclass(slots=True)
class Responses:
    """The responses scored in one row, and their labels."""

    ids: list[tuple[int, ...]] = field(default_factory=list)  # without shared tokens
    shared: list[int] = field(default_factory=list)  # number of leading tokens shared with the last unshared response
    chosen: list[int] = field(default_factory=list)  # of each pair, its index in `ids`
    rejected: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    answers: dict[int, int] = field(default_factory=dict)  # number of tokens of each chosen answer, by its index
    labelled: list[int] = field(default_factory=list)
    is_safe: list[bool] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Batches:
    """All rows of a training run. Plan indices below the number of groups are groups, the others single responses."""

    pairs: Sequence[PairExample]
    groups: Sequence[Group]
    labels: Sequence[LabelExample]
    plan: StepPlan
    has_pair_labels: bool  # whether the safety labels of a pair's answers are trained on
    learns_language: bool  # whether the tokens of chosen answers are trained on
    branches: bool  # whether the prefix shared by a group is computed once
    counts: tuple[tuple[int, int, int], ...]  # pairs, labelled responses, tokens of chosen answers, per step

    def longest_row(self) -> int:
        """Number of tokens in the longest row, without padding."""
        return max(sum(len(ids) for ids in self.responses(row).ids) for row in self.plan.rows)

    def responses(self, row: Sequence[int]) -> Responses:
        """The responses of the row with these indices."""
        responses = Responses()
        for index in row:
            if index >= len(self.groups):
                label = self.labels[index - len(self.groups)]
                responses.labelled.append(len(responses.ids))
                responses.is_safe.append(label.is_safe)
                responses.ids.append(label.ids)
                responses.shared.append(0)
            else:
                self._add(responses, self.groups[index])
        return responses

    def _add(self, responses: Responses, numbers: Group) -> None:
        """Add the answers of a group; the tokens of a chosen answer count only with its first pair."""
        group = [self.pairs[place] for place in numbers]
        first = len(responses.ids)
        for ids, shared in _parts(group, branches=self.branches):
            responses.ids.append(ids)
            responses.shared.append(shared)
        places = {chosen: first + number for number, chosen in enumerate(dict.fromkeys(pair.chosen for pair in group))}
        for rejected, (place, pair) in enumerate(zip(numbers, group, strict=True), start=first + len(places)):
            chosen = places[pair.chosen]
            if place == 0 or self.pairs[place - 1].chosen != pair.chosen:
                responses.answers[chosen] = pair.chosen_tokens
            responses.chosen.append(chosen)
            responses.rejected.append(rejected)
            responses.margins.append(pair.margin)
            known = (chosen, pair.preference.chosen_is_safe), (rejected, pair.preference.rejected_is_safe)
            for answer, is_safe in known:
                if self.has_pair_labels and is_safe is not None:
                    responses.labelled.append(answer)
                    responses.is_safe.append(is_safe)

    def collate(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of one row of the plan, with the counts of its step."""
        (number,) = numbers  # several packed rows in one forward pass would cost quadratic attention
        responses = self.responses(self.plan.rows[number])
        num_pairs, num_labelled, num_tokens = self.counts[number // self.plan.rows_per_step]
        rows = pack_responses(responses.ids, responses.shared)
        language = _chosen_tokens(responses, rows["ends"]) if self.learns_language else {}
        return {
            **rows,
            **language,
            "chosen": torch.tensor(responses.chosen, dtype=torch.long),
            "rejected": torch.tensor(responses.rejected, dtype=torch.long),
            "margin": torch.tensor(responses.margins, dtype=torch.float32),
            "labelled": torch.tensor(responses.labelled, dtype=torch.long),
            "is_safe": torch.tensor(responses.is_safe, dtype=torch.float32),
            "pairs_of_step": torch.tensor(num_pairs, dtype=torch.float32),
            "labelled_of_step": torch.tensor(num_labelled, dtype=torch.float32),
            "tokens_of_step": torch.tensor(num_tokens, dtype=torch.float32),
        }


def _chosen_tokens(responses: Responses, ends: Tensor) -> dict[str, Tensor]:
    """Tokens of the chosen answers, and the row positions whose hidden states predict them."""
    places: list[int] = []
    tokens: list[int] = []
    for place, count in responses.answers.items():
        end = int(ends[place])
        places += range(end - count, end)
        tokens += responses.ids[place][-count:]
    return {"states_at": torch.tensor(places, dtype=torch.long), "next_tokens": torch.tensor(tokens, dtype=torch.long)}


def plan_batches(
    pairs: Sequence[PairExample],
    labels: Sequence[LabelExample],
    *,
    pairs_per_step: int,
    epochs: float,
    seed: int,
    row_tokens: int,
    has_pair_labels: bool,
    learns_language: bool = False,
    branches: bool = False,
) -> Batches:
    """Assign pairs, reshuffled each epoch, and an even share of the labelled responses to steps, and pack them in rows.

    A step takes whole groups until it has `pairs_per_step` pairs; its last group may add a few more.
    """
    groups = _groups(pairs)
    steps = _steps(groups, epoch_order(len(groups), epochs, seed), pairs_per_step)
    if labels:
        # Shuffled separately, so that the pairs of each step are the same with and without labels.
        singles = epoch_order(len(labels), epochs, f"labels {seed}")
        bounds = [len(singles) * step // len(steps) for step in range(len(steps) + 1)]
        steps = [
            [*step, *(len(groups) + index for index in singles[start:end])]
            for step, start, end in zip(steps, bounds, bounds[1:], strict=False)
        ]
    groups, plan = _lay_out(pairs, groups, labels, steps, row_tokens, branches=branches)
    return _counted(Batches(pairs, groups, labels, plan, has_pair_labels, learns_language, branches, ()))


def smaller(batches: Batches, row_tokens: int) -> Batches:
    """The same steps, packed into rows of at most `row_tokens` tokens."""
    plan = batches.plan
    steps = [[index for row in plan.step_rows(step) for index in row] for step in range(plan.num_steps)]
    groups, plan = _lay_out(batches.pairs, batches.groups, batches.labels, steps, row_tokens, branches=batches.branches)
    return _counted(replace(batches, groups=groups, plan=plan))


def _groups(pairs: Sequence[PairExample]) -> list[Group]:
    """Group adjacent pairs whose chosen answers end the same dialog, or increasingly long prefixes of it."""
    groups: list[Group] = []
    before: PairExample | None = None
    for place, pair in enumerate(pairs):
        # A rejected answer that shares no token with its chosen answer cannot branch off it.
        joins = before and pair.chosen[: len(before.chosen)] == before.chosen and min(pair.shared, before.shared) > 0
        if joins and len(groups[-1]) < _MOST_TOGETHER:
            groups[-1] = (*groups[-1], place)
        else:
            groups.append((place,))
        before = pair
    return groups


def _steps(groups: Sequence[Group], order: Sequence[int], pairs_per_step: int) -> list[list[int]]:
    """Split the groups, in this order, into steps."""
    steps: list[list[int]] = []
    count = pairs_per_step
    for index in order:
        if count >= pairs_per_step:
            steps.append([])
            count = 0
        steps[-1].append(index)
        count += len(groups[index])
    return steps


def _parts(group: Sequence[PairExample], *, branches: bool) -> list[tuple[tuple[int, ...], int]]:
    """Ids without shared tokens, and the number of shared ones: the distinct chosen answers, then the rejected ones."""
    parts: list[tuple[tuple[int, ...], int]] = []
    shared = 0
    for chosen in dict.fromkeys(pair.chosen for pair in group):
        parts.append((chosen[shared:], shared))
        shared = len(chosen) if branches else 0
    for pair in group:
        ids, start = parts[-1]
        shared = pair.shared if branches else 0
        if shared and shared == start + len(ids):  # positions must jump, or it would continue the response before it
            shared -= 1
        parts.append((pair.rejected[shared:], shared))
    return parts


def _length(group: Sequence[PairExample], *, branches: bool) -> int:
    return sum(len(ids) for ids, _ in _parts(group, branches=branches))


def _fitting(pairs: Sequence[PairExample], group: Group, row_tokens: int, *, branches: bool) -> list[Group]:
    """Split the group into as few parts as fit into rows; a pair that is too long gets its own row."""
    fitting: list[Group] = [group[:1]]
    for place in group[1:]:
        longer = (*fitting[-1], place)
        if _length([pairs[place] for place in longer], branches=branches) <= row_tokens:
            fitting[-1] = longer
        else:
            fitting.append((place,))
    return fitting


def _lay_out(
    pairs: Sequence[PairExample],
    groups: Sequence[Group],
    labels: Sequence[LabelExample],
    steps: Sequence[Sequence[int]],
    row_tokens: int,
    *,
    branches: bool,
) -> tuple[list[Group], StepPlan]:
    """Pack each step's groups and labels into rows; groups longer than a row are split first."""
    divided = [_fitting(pairs, group, row_tokens, branches=branches) for group in groups]
    parts = [part for fitting in divided for part in fitting]
    ends = accumulate(map(len, divided))
    places = [range(end - len(fitting), end) for fitting, end in zip(divided, ends, strict=True)]
    places += [range(len(parts) + number, len(parts) + number + 1) for number in range(len(labels))]
    lengths = [_length([pairs[place] for place in part], branches=branches) for part in parts]
    lengths += [len(label.ids) for label in labels]
    contents = [[place for index in step for place in places[index]] for step in steps]
    return parts, lay_out(contents, lengths, capacity=row_tokens, world_size=distributed.count())


def _counted(batches: Batches) -> Batches:
    counts: list[tuple[int, int, int]] = []
    for step in range(batches.plan.num_steps):
        rows = [batches.responses(row) for row in batches.plan.step_rows(step)]
        counts.append(
            (
                sum(len(row.chosen) for row in rows),
                sum(len(row.labelled) for row in rows),
                sum(sum(row.answers.values()) for row in rows),
            )
        )
    return replace(batches, counts=tuple(counts))
