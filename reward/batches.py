"""From pairs and labelled responses to optimizer steps, packed rows and tensors.

A row holds whole pairs and single responses, each apart from its neighbours by positions that begin anew at 0 (as in
`llamachat.data.packing`); a step is a fixed set of pairs with an even share of the single responses, so that rows decide
speed and memory and not the result. Each row carries how many pairs and labels its whole step has: losses are divided
by those. Neighbouring pairs with one chosen answer stay together, as all comparisons of a prompt do in Ouyang et al. 2022
(arXiv:2203.02155, section 3.5). Where the model attends by sequence, their prompt and chosen answer are computed once: the
rejected answers are branches of the chosen one (`llamachat.models.sequence_attention`).
Shapes: 1 a packed row, T positions, N responses of a row, B pairs of a row, L labelled responses of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llamachat import distributed
from llamachat.chat_format.tokenizer import UNK_ID
from llamachat.data.packing import StepPlan, epoch_order, lay_out
from reward.pairs import LabelExample, PairExample

# A CPU keeps a compiled kernel for each shape it has met: lengths are filled up to a multiple, which also is faster.
SHAPE_MULTIPLE = 64
_MOST_TOGETHER = 4  # pairs that stay together: a row holds them whole

Group = tuple[int, ...]  # places of pairs that have one chosen answer


@dataclass(slots=True)
class Responses:
    """What is scored in one row, and what is known of it."""

    ids: list[tuple[int, ...]] = field(default_factory=list)  # of a branch, those after what it shares
    shared: list[int] = field(default_factory=list)  # tokens that a branch shares with the last response that is none
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
    branches: bool  # whether rejected answers are branches of the chosen one
    counts: tuple[tuple[int, int, int], ...]  # pairs, labelled responses and tokens of chosen answers of each step

    def longest_row(self) -> int:
        """Tokens of the fullest row, without padding."""
        return max(sum(len(ids) for ids in self.responses(row).ids) for row in self.plan.rows)

    def responses(self, row: Sequence[int]) -> Responses:
        """What the row with these indices holds."""
        found = Responses()
        for index in row:
            if index >= len(self.groups):
                label = self.labels[index - len(self.groups)]
                found.labelled.append(len(found.ids))
                found.is_safe.append(label.is_safe)
                found.ids.append(label.ids)
                found.shared.append(0)
            else:
                self._add(found, [self.pairs[place] for place in self.groups[index]])
        return found

    def _add(self, found: Responses, group: Sequence[PairExample]) -> None:
        """Pairs with one chosen answer, whose tokens are learnt once."""
        first = len(found.ids)
        found.answers[first] = group[0].chosen_tokens
        for number, pair in enumerate(group):
            if number == 0 or not self.branches:
                found.ids.append(pair.chosen)
                found.shared.append(0)
            found.chosen.append(first if self.branches else len(found.ids) - 1)
            shared = pair.shared if self.branches else 0
            found.rejected.append(len(found.ids))
            found.ids.append(pair.rejected[shared:])
            found.shared.append(shared)
            found.margins.append(pair.margin)
            answers = (
                (pair.preference.chosen_is_safe, found.chosen[-1]),
                (pair.preference.rejected_is_safe, found.rejected[-1]),
            )
            for is_safe, place in answers:
                if self.has_pair_labels and is_safe is not None:
                    found.labelled.append(place)
                    found.is_safe.append(is_safe)

    def collate(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of one row of the plan, with the counts of its step."""
        (number,) = numbers  # several packed rows in one forward pass would cost quadratic attention
        found = self.responses(self.plan.rows[number])
        num_pairs, num_labelled, num_tokens = self.counts[number // self.plan.rows_per_step]
        rows = pack_responses(found.ids, found.shared)
        language = _chosen_tokens(found, rows["ends"]) if self.learns_language else {}
        return {
            **rows,
            **language,
            "chosen": torch.tensor(found.chosen, dtype=torch.long),
            "rejected": torch.tensor(found.rejected, dtype=torch.long),
            "margin": torch.tensor(found.margins, dtype=torch.float32),
            "labelled": torch.tensor(found.labelled, dtype=torch.long),
            "is_safe": torch.tensor(found.is_safe, dtype=torch.float32),
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


def pack_responses(
    responses: Sequence[Sequence[int]], shared: Sequence[int] = (), *, multiple_of: int = SHAPE_MULTIPLE
) -> dict[str, Tensor]:
    """One row of isolated responses: input_ids and position_ids [1, T], and `ends` [N], where each has its last token.

    The positions of a response begin at its number of `shared` tokens; above 0 it is a branch of the last one that is none.
    Pads fill the row up to a multiple of tokens, as one more response that is not scored; a row without responses is
    pads alone.
    """
    lengths = [len(ids) for ids in responses]
    total = sum(lengths)
    missing = -total % multiple_of if total else multiple_of
    ids = [token for response in responses for token in response] + [UNK_ID] * missing
    firsts = [*(shared or [0] * len(lengths)), 0]
    spans = zip(firsts, [*lengths, missing], strict=True)
    positions = [position for first, length in spans for position in range(first, first + length)]
    return {
        "input_ids": torch.tensor([ids], dtype=torch.long),
        "position_ids": torch.tensor([positions], dtype=torch.long),
        "ends": torch.tensor(lengths, dtype=torch.long).cumsum(0) - 1,
    }


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
    plan = _lay_out(steps, _lengths(pairs, groups, labels, branches=branches), row_tokens)
    return _counted(Batches(pairs, groups, labels, plan, has_pair_labels, learns_language, branches, ()))


def smaller(batches: Batches, row_tokens: int) -> Batches:
    """The same steps in rows of at most so many tokens."""
    plan = batches.plan
    steps = [[index for row in plan.step_rows(step) for index in row] for step in range(plan.num_steps)]
    lengths = _lengths(batches.pairs, batches.groups, batches.labels, branches=batches.branches)
    return _counted(replace(batches, plan=_lay_out(steps, lengths, row_tokens)))


def _groups(pairs: Sequence[PairExample]) -> list[Group]:
    """Neighbours with the same chosen answer to the same prompt."""
    groups: list[Group] = []
    for place, pair in enumerate(pairs):
        last = groups[-1] if groups else ()
        if last and len(last) < _MOST_TOGETHER and pairs[last[0]].chosen == pair.chosen:
            groups[-1] = (*last, place)
        else:
            groups.append((place,))
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


def _lengths(
    pairs: Sequence[PairExample], groups: Sequence[Group], labels: Sequence[LabelExample], *, branches: bool
) -> list[int]:
    """Positions of each group and each single response in a row."""
    repeated = [
        (len(group) - 1) * len(pairs[group[0]].chosen) if branches else 0 for group in groups
    ]  # chosen answers that are computed once
    whole = [sum(pairs[place].tokens - pairs[place].shared * branches for place in group) for group in groups]
    return [length - less for length, less in zip(whole, repeated, strict=True)] + [len(label.ids) for label in labels]


def _lay_out(steps: Sequence[Sequence[int]], lengths: Sequence[int], row_tokens: int) -> StepPlan:
    return lay_out(steps, lengths, capacity=row_tokens, world_size=distributed.count())


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
