"""`llamachat doctor`: what this machine lacks for a recipe, checked before anything large is downloaded.

A finding is ok, a note (nothing fails), or FAIL with the fix. The network is used only for HEAD
requests and a tokenizer's small files; being offline is a note.
"""

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from llamachat.chat_format.proof import load_proved_format
from llamachat.config.gpus import Gpu
from llamachat.config.sections import hub_set, split_revision
from llamachat.errors import LlamachatError
from llamachat.memory.estimates import BYTES, KNOWN_BASES, shape_of
from llamachat.models.files import check_model_folder, nonfinite_tensors, weight_files
from llamachat.models.hub import is_cached, reach_data, reach_model, tokenizer_folder
from llamachat.runs.artifacts import is_published
from llamachat.runs.hub_commits import commit_of
from llamachat.runs.user_cache import cached
from llamachat.tables import plural
from pipelines.planning.estimates import card, estimate_step, measure_data
from pipelines.planning.fit import fits, way_to_fit
from pipelines.planning.hardware import (
    PYPROJECT,
    PYTHON_NEEDED,
    Device,
    Torch,
    find_devices,
    find_torch,
    installed_bytes,
    requirements,
    shortfalls,
)
from pipelines.planning.side_by_side import side_by_side
from pipelines.recipe.recipe import Recipe, load

Verdict = Literal["ok", "note", "FAIL"]
NAMED = ("torch", "transformers", "trl", "peft", "bitsandbytes")
_HAS_WEIGHTS = ("policy", "reward_model")
CHECKPOINTS = 3  # two that are kept, and the one being written
_TORCH_PAGE = "(https://pytorch.org/get-started)"
BF16_SINCE = (8, 0)  # compute capability of the first cards with bf16 arithmetic (Ampere)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table."""

    check: str
    verdict: Verdict
    problem: str
    fix: str = ""


def examine(config: Path, overrides: Sequence[str]) -> list[Finding]:
    """All findings about this machine and the recipe."""
    findings = [*_environment()]
    devices, torch = find_devices(), find_torch()
    try:
        recipe = load(config, overrides)
    except LlamachatError as error:
        findings.append(Finding("recipe", "FAIL", str(error), "Fix each line as it says."))
        return [*findings, *_cards(devices, torch)]
    findings.append(Finding("recipe", "ok", f"{config}: {', '.join(step.name for step in recipe.steps)}"))
    needs_bf16 = recipe.base.dtype == "bfloat16"
    is_4bit = any(step.tuning.method == "qlora" for step in recipe.steps)
    findings += _cards(devices, torch, needs_bf16=needs_bf16, is_4bit=is_4bit)
    checks = {"memory": _memory(recipe, devices), "disk": _disk(recipe), "base": _base(recipe), "data": _data(recipe)}
    for name, check in checks.items():
        try:
            findings += check
        except LlamachatError as error:
            findings.append(Finding(name, "FAIL", *_problem_and_fix(error)))
    return findings


def report(findings: Sequence[Finding]) -> str:
    """The findings as a table, then a summary of the failures."""
    width = max(80, min(shutil.get_terminal_size((120, 25)).columns, 140))
    indent = max(len(finding.check) for finding in findings) + 8
    lines: list[str] = []
    for finding in findings:
        words = finding.problem + (f" -> {finding.fix}" if finding.fix else "")
        parts = [line for part in words.splitlines() for line in textwrap.wrap(part, width - indent)]
        lines.append(f"{finding.check:<{indent - 6}}{finding.verdict:<6}{parts[0]}")
        lines += [" " * indent + part for part in parts[1:]]
    failing = Counter(finding.check for finding in findings if finding.verdict == "FAIL")
    if not failing:
        return "\n".join([*lines, "Nothing that was checked will fail."])
    failed_checks = ", ".join(f"{check} ({times} times)" if times > 1 else check for check, times in failing.items())
    end = f"{plural(failing.total(), 'check')} failed: {failed_checks}. The fix follows '->' on each FAIL line."
    return "\n".join([*lines, end])


def _environment() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < PYTHON_NEEDED:
        way = "Set PYTHON=/path/to/python3.11 for make."
        yield Finding("python", "FAIL", f"{python}; {'.'.join(map(str, PYTHON_NEEDED))} or newer is needed", way)
    else:
        yield Finding("python", "ok", python)
    lacking = shortfalls(PYPROJECT)
    for line in lacking:
        yield Finding("libraries", "FAIL", line, "Install it here, or run `make setup`, which makes .venv.")
    if not lacking:
        versions = {name: installed for name, (_, installed) in requirements(PYPROJECT).items()}
        named_versions = ", ".join(f"{name} {versions[name]}" for name in NAMED)
        yield Finding("libraries", "ok", f"all {len(versions)} meet their lower bounds ({named_versions})")


def _cards(
    devices: Sequence[Device], torch: Torch | None, *, needs_bf16: bool = True, is_4bit: bool = False
) -> Iterator[Finding]:
    if not devices:
        yield Finding("gpu", "note", "no NVIDIA card found (nvidia-smi): everything runs on the CPU")
        return
    yield from (Finding("gpu", "ok", str(device)) for device in devices)
    problem, fix = "", f"Install a build of torch for CUDA {_TORCH_PAGE} in this environment."
    if torch is None:
        problem, fix = "torch cannot be imported", "See 'libraries'; set up the environment again."
    elif torch.cuda is None:
        problem = f"torch {torch.version} is built without CUDA and cannot use the card"
    elif torch.capability is None:  # most often the driver is older than torch's CUDA
        problem = f"torch {torch.version} (CUDA {torch.cuda}) cannot use the card with driver {devices[0].driver}"
        fix = f"Update the driver, or install a build of torch for an older CUDA {_TORCH_PAGE}; CUDA_VISIBLE_DEVICES must name the card."
    elif torch.oldest is not None and torch.capability < torch.oldest:
        problem = (
            f"torch {torch.version} has no kernels for the card: its compute capability is {_dotted(torch.capability)}"
        )
        problem += f", and the oldest one that it supports is {_dotted(torch.oldest)}"
        fix = f"Use a newer card, or an older torch or CUDA build that has them {_TORCH_PAGE}."
    elif torch.capability < BF16_SINCE and needs_bf16:
        problem = f"the card (compute capability {_dotted(torch.capability)}) has no bfloat16 arithmetic"
        if not is_4bit:
            yield Finding(
                "cuda", "note", problem, "bfloat16 is emulated, slowly: set base.dtype: float32, or use a newer card."
            )
            return
        problem += ", the only number format of QLoRA here (float16 would need loss scaling)"
        fix = "Use a card of compute capability 8.0 or later, or set tuning.method: lora and base.dtype: float32."
    if problem or torch is None:
        yield Finding("cuda", "FAIL", problem, fix)
    else:
        yield Finding("cuda", "ok", f"torch {torch.version}, CUDA {torch.cuda}, driver {devices[0].driver}")


def _dotted(capability: Sequence[int]) -> str:
    return ".".join(map(str, capability))


def _memory(recipe: Recipe, devices: Sequence[Device]) -> Iterator[Finding]:
    """Each step's estimate, compared with the card of this machine or else with its memory."""
    meant, gpu = card(recipe), None
    room, free = installed_bytes(), float("inf")
    usable = fix = f"this machine has {room / 2**30:.1f}"
    if devices:
        device = min(devices, key=lambda device: device.total_gib)
        gpu = Gpu(device.name, device.total_gib, None, len(devices) if meant and meant.count > 1 else 1)
        room, free = gpu.usable_bytes, min(device.free_gib for device in devices) * 2**30
        usable = f"at most {room / 2**30:.1f} of {gpu.gib:.1f} GiB of {gpu} (this machine's) should be needed"
        fix = way_to_fit(recipe, gpu)
        if meant and meant.count > len(devices):
            problem = f"the recipe is meant for {meant.count} cards; this machine has {len(devices)}, and the checks below are for these"
            way = f"Set num_processes: {len(devices)} in the file under configs/accelerate that you launch with."
            yield Finding("cards", "note", problem, way)
    else:
        recipe = recipe.changed(run=recipe.run.model_copy(update={"gpu": None}))
        where = f"Run it on {meant}" if meant else "Run it on a machine with more memory or a card"
        fix = f"{where}, or use a smaller base."
        there = fits(recipe, meant) if meant else None
        if meant and there:
            peak = f"about {there.peak_bytes / 2**30:.1f} GiB at the peak ({there.worst}), estimated"
            problem = f"the recipe is meant for {meant}, which this machine lacks; there it would {'' if there.fits else 'not '}fit: {peak}"
            yield Finding("card", "note", problem, "" if there.fits else way_to_fit(recipe, meant))
    needs: dict[Verdict, list[str]] = {"ok": [], "note": [], "FAIL": []}
    for step in recipe.steps:
        estimate = estimate_step(recipe, step, gpu)
        if estimate is None:
            yield Finding("memory", "note", f"{step.name}: no estimate until the base's config.json is local")
        elif estimate.memory:
            peak = estimate.peak_bytes
            verdict: Verdict = "FAIL" if peak > room else "note" if peak > free else "ok"
            needs[verdict].append(f"{step.name} {peak / 2**30:.1f}")
    ends: dict[Verdict, tuple[str, str]] = {
        "ok": (usable, ""),
        "note": (f"only {free / 2**30:.1f} GiB are free now", "Stop other programs on the card."),
        "FAIL": (usable, fix),
    }
    for verdict, steps in needs.items():
        if steps:
            end, way = ends[verdict]
            need = f"{', '.join(steps)} GiB{'' if gpu else ' on the CPU'}, estimated"
            yield Finding("memory", verdict, f"{need}; {end}", way)


def _disk(recipe: Recipe) -> Iterator[Finding]:
    """Compare checkpoints, results and downloads with the free space of each file system."""
    shape = shape_of(recipe.base.model)
    if shape is None:
        yield Finding("disk", "note", "the required space is unknown until the base's config.json is local")
        return
    run, width = Path(recipe.run.dir), BYTES[recipe.base.dtype]
    needs: list[tuple[Path, float, str]] = []
    steps = [step for step in recipe.steps if step.product.makes.kind in _HAS_WEIGHTS]
    trained = {step.name: shape.trained_weights(step.tuning) for step in steps if not is_published(recipe.folder(step))}
    if trained:
        of_states = width + (8 if width == 4 else 12)
        groups = side_by_side(recipe, [step for step in steps if step.name in trained])
        # A finished step drops its checkpoints, so those of steps that run at once count.
        at_once = [sum(sorted(trained[step.name] for step in group.steps)[-group.jobs :]) for group in groups]
        most = sum(trained.values()) if recipe.run.keep_checkpoints else max(at_once)
        needs.append((run, CHECKPOINTS * of_states * most, "checkpoints"))
        results = f"results of {plural(len(trained), 'step')}"
        needs.append((run, width * sum(trained.values()), results))
    known = KNOWN_BASES.get(split_revision(recipe.base.model)[0])
    if known is not None and not Path(recipe.base.model).exists() and not is_cached(recipe.base.model):
        from huggingface_hub import constants

        needs.append((Path(constants.HF_HUB_CACHE), shape.weights * known.file_width, "download of the base"))
    by_disk: dict[int, list[tuple[Path, float, str]]] = {}
    for path, size, what in needs:
        existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        by_disk.setdefault(existing.stat().st_dev, []).append((existing, size, what))
    for group in by_disk.values():
        need, free = sum(size for _, size, _ in group), shutil.disk_usage(group[0][0]).free
        parts = ", ".join(f"{what} {size / 2**30:.1f}" for _, size, what in group)
        problem = f"{free / 2**30:.1f} GiB free at {group[0][0]}; about {need / 2**30:.1f} needed ({parts})"
        fix = "Free some space, set run.dir to another disk, or HF_HOME for downloads." if need > free else ""
        yield Finding("disk", "FAIL" if fix else "ok", problem, fix)


def _base(recipe: Recipe) -> Iterator[Finding]:
    """Access, architecture and tokenizer of the base, in the order in which each would stop a run."""
    name = recipe.base.model
    is_local = Path(name).is_dir()
    if not is_local:
        reach = reach_model(name)
        if reach.state == "open":
            yield Finding("access", "ok", f"this machine may download '{name}'")
        elif is_cached(name, ("config.json",)) and is_cached(name):
            yield Finding("access", "note", f"{reach.reason}; '{name}' is read from the cache")
        elif reach.state == "offline":
            yield Finding("access", "note", f"{reach.reason}: access to '{name}' is not checked", reach.fix)
            known = "is known to work" if split_revision(name)[0] in KNOWN_BASES else "has not been tested"
            yield Finding("base", "note", f"'{name}' {known}; its tokenizer is checked when it can be downloaded")
            return
        else:
            yield Finding("access", "FAIL", reach.reason, reach.fix)
            return
    try:
        folder = tokenizer_folder(name)
        check_model_folder(folder)
    except LlamachatError as error:
        yield Finding("base", "FAIL", *_problem_and_fix(error))
        return
    if is_local and not list(folder.glob("*.safetensors")):
        way = "Copy the whole model, or convert its weights to safetensors: pickled weights are not read."
        yield Finding("base", "FAIL", f"'{name}' has no *.safetensors", way)
    else:
        known = "known to work" if split_revision(name)[0] in KNOWN_BASES else "a Llama model"
        yield Finding("base", "ok", f"'{name}' is {known}")
        yield from _weights(folder, name)
        if not is_local and split_revision(name)[1] is None and (commit := commit_of(name)):
            problem = f"'{name}' is read at the hub's newest commit, now {commit}"
            yield Finding("base", "note", problem, f"Set base.model: {name}@{commit} to pin it.")
    try:
        _, warning = load_proved_format(
            folder, chat_format=recipe.base.chat_format, allow_unproved=recipe.base.allow_unproved_tokenizer
        )
    except LlamachatError as error:
        yield Finding("tokenizer", "FAIL", *_problem_and_fix(error))
        return
    proved = f"its token ids are those of the chat format '{recipe.base.chat_format}'"
    yield Finding("tokenizer", "note" if warning else "ok", warning or proved)


def _weights(folder: Path, name: str) -> Iterator[Finding]:
    """Whether all local weights are finite; a file is read again only after it has changed."""
    faults: list[str] = []
    for file in weight_files(folder):
        if file.is_file():
            state = file.resolve().stat()
            stamp = {
                "path": str(file.resolve()),
                "size": state.st_size,
                "changed": state.st_mtime_ns,
                "inode": state.st_ino,
            }
            faults += cached("nonfinite", stamp, partial(nonfinite_tensors, file))
    if faults:
        more = f" and {len(faults) - 3} more tensors" if len(faults) > 3 else ""
        problem = f"'{name}' contains NaN or infinite weights: {', '.join(faults[:3])}{more}"
        yield Finding("weights", "FAIL", problem, "Download the model again, or use another base.")
    else:
        yield Finding("weights", "ok", "all local weights are finite")


def _data(recipe: Recipe) -> Iterator[Finding]:
    keys = dict.fromkeys(key for step in recipe.steps for key in step.product.data)
    unreached: dict[tuple[str, str], list[str]] = {}  # by the reason and the fix
    for source in (source for key in keys for source in getattr(recipe.data, key)):
        hub_data = hub_set(source.path)
        if hub_data is not None:
            reach = reach_data(hub_data.name)
            if reach.state == "offline":
                unreached.setdefault((reach.reason, reach.fix), []).append(f"'{hub_data.name}'")
            elif reach.state == "open":
                problem = f"the hub has '{hub_data.name}'; its split '{hub_data.split}' is read at the start"
                yield Finding("data", "ok", problem, reach.fix)
            else:
                yield Finding("data", "FAIL", reach.reason, reach.fix)
            continue
        size = measure_data([source.model_copy(update={"weight": 1.0})])
        if size is not None and not size.records:
            yield Finding("data", "FAIL", f"{source.path} has no lines", "Write or download it again.")
        else:
            yield Finding("data", "ok", source.path + (f": about {size.records:,.0f} records" if size else ""))
    for (reason, fix), names in unreached.items():
        yield Finding("data", "note", f"{reason}; not checked: {', '.join(names)}", fix)


def _problem_and_fix(error: LlamachatError) -> tuple[str, str]:
    """Our errors end with what to do: the last sentence is the fix."""
    problem, dot, fix = str(error).rpartition(". ")
    return (f"{problem}.", fix) if dot else (str(error), "")
