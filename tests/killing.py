"""SIGKILL at a chosen moment: a forked child that dies at its n-th file operation."""

import os
import signal
import sys
import traceback
from collections.abc import Callable


def killed_at(operation: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that is killed at its n-th file operation; False when it ended before that."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, _: object) -> None:
            nonlocal count
            if event == "open" or event.startswith(("os.", "shutil.")):
                count += 1  # before the kill, which is an event itself
                if count == operation + 1:
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
