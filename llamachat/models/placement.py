"""Where a model lies and how it computes there: device, number format, attention kernel."""

import os
from pathlib import Path

import torch

from llamachat import distributed
from llamachat.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(name: str) -> str:
    """`name`, or for auto the GPU where there is one; each of several processes has its own."""
    if name != "auto":
        return name
    if not distributed.use_gpus():
        return "cpu"
    return "cuda" if distributed.count() == 1 else f"cuda:{torch.cuda.current_device()}"


def gpus() -> list[int]:
    """Numbers of the GPUs, whose random state a seed of ours must not disturb."""
    return list(range(torch.cuda.device_count()))


def best_attention(dtype: torch.dtype, device: str) -> str:
    """The fastest attention kernel that is installed and takes this dtype."""
    from transformers.utils import is_flash_attn_2_available

    is_possible = device.startswith("cuda") and dtype != torch.float32 and is_flash_attn_2_available()
    return "flash_attention_2" if is_possible else "sdpa"


def dtype_of(name: str) -> torch.dtype:
    """The number format of this name."""
    if name not in DTYPES:
        raise ConfigError(
            f"dtype: '{name}' is not one of {', '.join(DTYPES)}. It is the number format of the weights. Name one of them."
        )
    return DTYPES[name]


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nothing holds; on a CPU what the system can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux: half of what is installed
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
