"""SIGKILL at a chosen moment: a forked child that dies at its n-th file operation."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import count


def killed_at(operation: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that is killed at its n-th file operation; False when it ended before that."""
    child = os.fork()
    if child == 0:
        events = 0

        def hook(event: str, _: object) -> None:
            nonlocal events
            if event == "open" or event.startswith(("os.", "shutil.")):
                events += 1  # before the kill, which is an event itself
                if events == operation + 1:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the action failed in the child"
    return os.WIFSIGNALED(status)


def killed_at_each(prepare: Callable[[int], object], action: Callable[[int], object]) -> Iterator[int]:
    """0, 1, 2, ... after `action` was killed at that file operation, each `prepare`d; the last time it ended unharmed."""
    for operation in count():
        prepare(operation)
        was_killed = killed_at(operation, lambda at=operation: action(at))
        yield operation
        if not was_killed:
            return
