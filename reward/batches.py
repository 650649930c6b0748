"""From pairs and labelled responses to optimizer steps, packed rows and tensors.

A row holds whole pairs and single responses, each apart from its neighbours by positions that restart at 0 (as in
`llamachat.data.packing`); a step is a fixed set of pairs with an even share of the single responses, so that rows decide
speed and memory and not the result. Each row carries how many pairs and labels its whole step has: losses are divided
by those. Neighbouring pairs whose chosen answers end the same dialog, or beginnings of it, stay together, as all comparisons
of a prompt do in Ouyang et al. 2022 (arXiv:2203.02155, section 3.5). Where the model attends by sequence, that dialog is
computed once: the rejected answers are its branches (`llamachat.models.sequence_attention`).
Shapes: 1 a packed row, T positions, N responses of a row, B pairs of a row, L labelled responses of a row.
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

_MOST_TOGETHER = 12  # pairs that stay together: a row holds them whole

Group = tuple[int, ...]  # places of pairs in one dialog, the shortest first


@dataclass(slots=True)
class Responses:
    """What is scored in one row, and what is known of it."""

    ids: list[tuple[int, ...]] = field(default_factory=list)  # without the tokens that are shared
    shared: list[int] = field(default_factory=list)  # first tokens that are those of the last response that shares none
    chosen: list[int] = field(default_factory=list)  # of each pair, its place in `ids`
    rejected: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    answers: dict[int, int] = field(default_factory=dict)  # tokens of each chosen answer, by its place
    labelled: list[int] = field(default_factory=list)
    is_safe: list[bool] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Batches:
    """All rows of a training; an index of the plan below the number of groups is a group, one above a single response."""

    pairs: Sequence[PairExample]
    groups: Sequence[Group]
    labels: Sequence[LabelExample]
    plan: StepPlan
    has_pair_labels: bool  # whether safety labels of a pair's answers are learnt
    learns_language: bool  # whether the tokens of chosen answers are
    branches: bool  # whether what the pairs of a group share is computed once
    counts: tuple[tuple[int, int, int], ...]  # pairs, labelled responses and tokens of chosen answers of each step

    def longest_row(self) -> int:
        """Tokens of the fullest row, without padding."""
        return max(sum(len(ids) for ids in self.responses(row).ids) for row in self.plan.rows)

    def responses(self, row: Sequence[int]) -> Responses:
        """What the row with these indices holds."""
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
        """The answers of one group; the tokens of a chosen one are learnt with the first of its pairs, however rows divide them."""
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
        """The tensors of one row of the plan, with the counts of its step."""
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
    """The tokens of the chosen answers, and the positions of the row before them, whose states they are predicted from."""
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
    """Every step's pairs, in a new order each epoch, and its even share of the labelled responses, laid out in rows.

    A step takes whole groups until it has `pairs_per_step` pairs: a few more where a group of several is its last.
    """
    groups = _groups(pairs)
    steps = _steps(groups, epoch_order(len(groups), epochs, seed), pairs_per_step)
    if labels:
        # An order of its own: the pairs of each step are the same with and without labels.
        singles = epoch_order(len(labels), epochs, f"labels {seed}")
        bounds = [len(singles) * step // len(steps) for step in range(len(steps) + 1)]
        steps = [
            [*step, *(len(groups) + index for index in singles[start:end])]
            for step, start, end in zip(steps, bounds, bounds[1:], strict=False)
        ]
    groups, plan = _lay_out(pairs, groups, labels, steps, row_tokens, branches=branches)
    return _counted(Batches(pairs, groups, labels, plan, has_pair_labels, learns_language, branches, ()))


def smaller(batches: Batches, row_tokens: int) -> Batches:
    """The same steps in rows of at most `row_tokens` tokens."""
    plan = batches.plan
    steps = [[index for row in plan.step_rows(step) for index in row] for step in range(plan.num_steps)]
    groups, plan = _lay_out(batches.pairs, batches.groups, batches.labels, steps, row_tokens, branches=batches.branches)
    return _counted(replace(batches, groups=groups, plan=plan))


def _groups(pairs: Sequence[PairExample]) -> list[Group]:
    """Neighbours whose chosen answers end one dialog, or longer and longer beginnings of it."""
    groups: list[Group] = []
    before: PairExample | None = None
    for place, pair in enumerate(pairs):
        # What shares no token with its chosen answer is no branch of it.
        joins = before and pair.chosen[: len(before.chosen)] == before.chosen and min(pair.shared, before.shared) > 0
        if joins and len(groups[-1]) < _MOST_TOGETHER:
            groups[-1] = (*groups[-1], place)
        else:
            groups.append((place,))
        before = pair
    return groups


def _steps(groups: Sequence[Group], order: Sequence[int], pairs_per_step: int) -> list[list[int]]:
    """Groups in this order, cut into steps."""
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
    """Ids of the different chosen answers, then of the rejected ones; each without its shared tokens, and their number."""
    parts: list[tuple[tuple[int, ...], int]] = []
    shared = 0
    for chosen in dict.fromkeys(pair.chosen for pair in group):
        parts.append((chosen[shared:], shared))
        shared = len(chosen) if branches else 0
    for pair in group:
        ids, start = parts[-1]
        shared = pair.shared if branches else 0
        if shared and shared == start + len(
            ids
        ):  # without a jump of positions it would continue the response before it
            shared -= 1
        parts.append((pair.rejected[shared:], shared))
    return parts


def _length(group: Sequence[PairExample], *, branches: bool) -> int:
    return sum(len(ids) for ids, _ in _parts(group, branches=branches))


def _fitting(pairs: Sequence[PairExample], group: Group, row_tokens: int, *, branches: bool) -> list[Group]:
    """The group, or as few parts of it as rows hold; a longer pair stands alone."""
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
    """Rows for steps that hold these groups and labels; first, groups that no row holds are divided."""
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
