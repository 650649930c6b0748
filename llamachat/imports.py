"""Loading torch, transformers, PEFT and TRL, some 5,000 modules."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MARKER = "transformers.modeling_utils"  # if this is loaded, so is most of the rest


@contextmanager
def quick_imports() -> Iterator[None]:
    """Disable the garbage collector while the block imports libraries, which saves a quarter of the time.

    All objects that then exist are left out of later collections (`gc.freeze`). If transformers is loaded or the
    collector is off, this does nothing.
    """
    if _MARKER in sys.modules or not gc.isenabled():
        yield
        return
    gc.collect()  # otherwise garbage would be kept with what is loaded
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
