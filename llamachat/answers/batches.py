"""The batches of a step that samples: those that lie in its store, and the others as they are made, until its hours are over."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from llamachat.answers.store import Store
from llamachat.training.hours import Hours

B = TypeVar("B", bound=Sequence[Any])


@dataclass(frozen=True, slots=True)
class Batch(Generic[B]):
    """One batch, whole: `made` has been through JSON, as in `Store.kept`."""

    number: int
    asked: B
    made: Mapping[str, Any]
    is_held_out: bool
    is_new: bool  # made by this command


@dataclass(slots=True)
class Batches(Generic[B]):
    """Batches to learn from, and those of the validation side after them.

    When the hours are over no further batch to learn from is begun, but the validation side is asked all the same: it is
    small, and the tuning is measured by it.
    """

    store: Store
    hours: Hours
    train: Sequence[B]
    held_out: Sequence[B]
    num_left_out: int = field(default=0, init=False)  # of what is asked, not of batches

    @property
    def num_batches(self) -> int:
        return len(self.train) + len(self.held_out)

    @property
    def num_done(self) -> int:
        """Those that need not be made."""
        return sum(self.store.has(_name(number)) for number in range(1, self.num_batches + 1))

    def go(self, make: Callable[[int, B], Any]) -> Iterator[Batch[B]]:
        """Each batch, made where it is not there yet; the first one is made however few the hours are."""
        for number, asked in enumerate((*self.train, *self.held_out), start=1):
            name, is_held_out = _name(number), number > len(self.train)
            is_new = not self.store.has(name)
            if is_new and not is_held_out and self.hours.ended_by is not None:
                self.num_left_out += len(asked)
                continue
            made = self.store.kept(name, lambda n=number, a=asked: make(n, a))
            if is_new and number < len(self.train):
                self.hours.are_over(f"batch {number} of {len(self.train)}")
            if is_new:
                self.hours.save(self.store.folder)
            yield Batch(number, asked, made, is_held_out, is_new)

    def left_out(self, what: str) -> dict[str, int]:
        """What was not asked any more, by reason; to be read after `go`."""
        if not self.num_left_out:
            return {}
        return {f"{what} left out: {self.hours.key} are over": self.num_left_out}


def _name(number: int) -> str:
    return f"batch-{number:05d}"
