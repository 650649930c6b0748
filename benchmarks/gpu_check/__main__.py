"""Check a CUDA card in about three minutes, with random weights and without downloads: `make gpu-check`.

Compares results on the card with references: 4-bit products with weights dequantized on the CPU, packed rows with
separate sequences, captured decode steps with eager ones, training memory with the plan. Prints speeds, writes a JSON
file, and exits with status 1 on any mismatch. `--cpu` runs a toy model on the CPU, to test the check itself.
"""

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.gpu_check import numerics
from benchmarks.gpu_check.figures import Figure, figures_of, line, write
from benchmarks.gpu_check.sizes import TOY, sizes_for
from benchmarks.gpu_check.steps import card, speeds, step
from benchmarks.memory import write_models

PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


def facts() -> dict[str, str]:
    """Versions and the card's name."""
    known = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            known[package] = "none"
    gpu = card()
    known["CUDA of torch"] = str(torch.version.cuda)
    if gpu:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        known["card"] = f"{gpu.name}, {gpu.gib:.1f} GiB, compute capability {capability}"
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        known["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return known


def check(folder: Path, *, is_toy: bool) -> Iterator[Figure]:
    """Yield all figures; models are written to the folder."""
    gpu = card()
    is_toy = is_toy or gpu is None
    sizes = TOY if gpu is None or is_toy else sizes_for(gpu)
    yield Figure("layers of the model", sizes.shape.layers)
    write_models(folder, sizes.shape, device="cuda" if gpu else "cpu")
    peak = bandwidth = None
    if gpu and not is_toy:
        peak, bandwidth = speeds()
        yield Figure("bf16 product", peak / 1e12, "TFLOP/s")
        yield Figure("copy", bandwidth / 2**30, "GiB/s")
        if gpu.tflops:
            peak = gpu.tflops * 1e12
            yield Figure("bf16 product by the data sheet", gpu.tflops, "TFLOP/s")
    sections = {
        "4-bit products": partial(numerics.nf4, folder, sizes),
        "packed rows": partial(numerics.packing, folder, sizes),
        "decoding, merged": partial(numerics.decoding, folder, sizes, is_nf4=False, bandwidth=bandwidth),
        "decoding over 4 bits": partial(numerics.decoding, folder, sizes, is_nf4=True, bandwidth=bandwidth),
    }
    sections |= {case.step: partial(step, case, folder, sizes, gpu, is_toy=is_toy, peak=peak) for case in sizes.cases}
    for name, section in sections.items():
        yield from figures_of(name, section)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description="Check a CUDA card against references.")
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"), help="File for the results.")
    parser.add_argument("--cpu", action="store_true", help="Run a toy model on the CPU instead.")
    parser.add_argument("--toy", action="store_true", help="Run a toy model on the card.")
    options = parser.parse_args(arguments)
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not options.cpu and not torch.cuda.is_available():
        print(
            "gpu-check: torch sees no CUDA card (`make doctor` says why). --cpu runs the check on the CPU.",
            file=sys.stderr,
        )
        return 2
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    started, known, figures = time.monotonic(), facts(), []
    print("\n".join(f"{name}: {value}" for name, value in known.items()))
    with tempfile.TemporaryDirectory(prefix="llamachat-gpu-check-") as folder:
        for figure in check(Path(folder), is_toy=options.toy):
            figures.append(figure)
            print(line(figure), flush=True)
    write(options.json, known, figures)
    wrong = sum(not figure.is_right for figure in figures)
    print(
        f"{wrong} mismatches in {len(figures)} figures, {time.monotonic() - started:.0f} s; written to {options.json}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
