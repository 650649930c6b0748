"""Loading torch, transformers, PEFT and TRL, some 5,000 modules."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


_LAST = "transformers.modeling_utils"


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import inside with the garbage collector off, which saves a third of the time.

    What is loaded is never freed, so later collections leave it out. Once all are loaded, this does nothing.
    """
    if _LAST in sys.modules or not gc.isenabled():
        yield
        return
    gc.collect()  # otherwise garbage would be kept with what is loaded
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
