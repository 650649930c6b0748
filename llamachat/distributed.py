"""Several processes that work on one step together, as `accelerate launch` starts them.

Expensive work is divided among them (`scatter_map`, `all_reduce_sum`). Its results are the same in every process, so
all take the same decisions without asking; where a decision depends on a clock or a file, the first process decides
(`broadcast_object`). Only the first process writes. With one process, the usual case, every function here returns at
once and does not import torch.

With FSDP2 (configs/accelerate/fsdp2.yaml) a fully tuned model is divided too (`shard_model`), for a base that one card
cannot hold with its optimizer. What is written (checkpoints, artifacts) is always whole, so that any number of
processes can resume from it; every function that reads the weights of a sharded model must be called in all processes.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from llamachat.errors import INTERRUPTED, LlamachatError, first_line
from llamachat.imports import quick_imports

if TYPE_CHECKING:
    from torch import Tensor, nn

Item = TypeVar("Item")
Result = TypeVar("Result")
Value = TypeVar("Value")
Tree = TypeVar("Tree")

NUMBERS_PER_TRANSFER = 2**26  # a quarter of a GiB
_SHARDED = "LLAMACHAT_FSDP"
# The others wait while the first one writes or draws. Their launcher ends them all when one fails.
PATIENCE = timedelta(hours=24)
# Seconds to wait for the other processes. A launcher starts all at once, and imports are slow.
MEETING_S, MEETING_UNDER_LAUNCHER_S = 45.0, 600.0
_TORCHRUN = "TORCHELASTIC_RUN_ID"
_OF_LAUNCHERS = "LOCAL_WORLD_SIZE"  # set by torchrun and by this project's own launcher
OWN_LAUNCH = "LLAMACHAT_PROCESSES"  # set where a command has started its processes itself
# For processes on a CPU: otherwise glibc returns freed blocks to the system and requests them again, which makes the
# training of a small model 5 to 10% slower. The second value alone would double the time, since it stops glibc from
# adapting the first.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
_OF_A_RANK = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    _OF_LAUNCHERS,
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    OWN_LAUNCH,
)
_SAY_AFTER_S = 5.0


class LaunchError(LlamachatError):
    """The environment names processes that cannot work together."""

    exit_status = 2


def are_launched() -> bool:
    """Whether this process was started as one of several, by the environment that torchrun and accelerate set."""
    return _variable("WORLD_SIZE", 1) > 1


def has_launcher() -> bool:
    """Whether a user's accelerate or torchrun started this process, alone or as one of several."""
    is_named = any(name in os.environ for name in (_TORCHRUN, "ACCELERATE_MIXED_PRECISION"))
    return (are_launched() or is_named) and OWN_LAUNCH not in os.environ


def environment_alone() -> dict[str, str]:
    """The environment for a process that this one starts and that works alone."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_A_RANK and not name.startswith("TORCHELASTIC")
    }


def forget_other_launchers() -> None:
    """Drop what a launcher that is none of ours has left in the environment of a command that works alone.

    accelerate's trainers would wait for the processes that these variables name, and nobody started them.
    """
    if not are_launched():
        for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
            os.environ.pop(name, None)


def launched_index() -> int:
    """This process's number by the environment, which is known before they have met."""
    return _variable("RANK", 0) if are_launched() else 0


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.strip().isdecimal():
        raise LaunchError(
            f"{name}: the environment has '{text}', which is not a number of processes. torchrun and `accelerate launch` set"
            f" it. Use one of them, or `unset {name}`."
        )
    return int(text)


@contextmanager
def _waiting() -> Iterator[None]:
    """Wait for the other processes within the block. Log what is waited for; exit on a signal or a timeout.

    torch waits in C++, where Python runs no signal handler, so a second thread reads the signals.
    """
    place = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29500')}"
    number, world = launched_index(), os.environ["WORLD_SIZE"]
    seconds = MEETING_UNDER_LAUNCHER_S if _OF_LAUNCHERS in os.environ else MEETING_S
    have_met, has_ended = threading.Event(), time.monotonic() + seconds
    signals, sending = socket.socketpair()
    sending.setblocking(False)
    before = signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)

    def end(words: str, status: int) -> None:
        print(f"llamachat: {words}", file=sys.stderr, flush=True)
        os._exit(status)  # no file is open and no step has begun

    def watch() -> None:
        said = time.monotonic() + _SAY_AFTER_S
        while not have_met.is_set():
            ready, _, _ = select.select([signals], [], [], 0.2)
            now = time.monotonic()
            if ready and set(signals.recv(100)) & {signal.SIGINT, signal.SIGTERM}:
                end(f"interrupted, while process {number} waited for the others.", INTERRUPTED)
            elif now > has_ended and not have_met.is_set():
                end(
                    f"WORLD_SIZE: {world} processes are expected at {place}, but not all arrived within {seconds:.0f} s."
                    " Start all of them with torchrun or `accelerate launch`; for one"
                    " process alone `unset WORLD_SIZE RANK LOCAL_RANK`.",
                    LaunchError.exit_status,
                )
            elif now > said and not have_met.is_set():
                said = has_ended
                print(
                    f"process {number}: waiting at {place} for all {world} processes of WORLD_SIZE, for at most"
                    f" {seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )

    watcher = threading.Thread(target=watch, name="meeting", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        have_met.set()
        watcher.join()
        signal.set_wakeup_fd(before)
        signals.close()
        sending.close()


@contextmanager
def opened() -> Iterator[None]:
    """Let the launched processes meet, and part when the block ends well."""
    if not are_launched():
        yield
        return
    with quick_imports():
        import torch
        from accelerate import PartialState

    if not use_gpus():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # what `accelerate launch --cpu` says; a trainer reads it again
    try:
        with _waiting():
            # Picks backend and device as accelerate's own trainers do; without `cpu` none meet where there is no GPU.
            PartialState(cpu=not use_gpus(), timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise LaunchError(
            f"WORLD_SIZE: the environment names {os.environ['WORLD_SIZE']} processes, but they cannot connect"
            f" ({first_line(error)}). Start them with torchrun or `accelerate launch`; for one process alone `unset"
            " WORLD_SIZE RANK LOCAL_RANK`."
        ) from error
    # `shard_model` divides our models: accelerate's trainers would do it a second time.
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        os.environ[_SHARDED] = "true"
    yield
    wait()
    torch.distributed.destroy_process_group()


def count() -> int:
    """How many processes work together."""
    group = _group()
    return 1 if group is None else group.get_world_size()


def index() -> int:
    """The number of this one, from 0."""
    group = _group()
    return 0 if group is None else group.get_rank()


def is_first() -> bool:
    """Whether this process is the one that writes, shows and decides."""
    return index() == 0


def are_sharded() -> bool:
    """Whether accelerate was configured to shard fully tuned models over the processes (FSDP)."""
    return _group() is not None and _SHARDED in os.environ


def wait() -> None:
    """Wait until all processes are here, so that each sees what the first one has written."""
    group = _group()
    if group is not None:
        group.barrier()


def broadcast_object(value: Value) -> Value:
    """Return the first process's value in every process."""
    group = _group()
    if group is None:
        return value
    box: list[Any] = [value]
    group.broadcast_object_list(box, src=0)
    return box[0]


def scatter_map(
    items: Sequence[Item], work: Callable[[list[Item]], Sequence[Result]], *, model: "nn.Module | None" = None
) -> list[Result]:
    """Return `work(items)` in every process, in the order of the items; each process computes its part of them.

    `work` returns one result per item. A process without items does not call it, unless there are no items at all.
    Name the `model` that `work` runs: a sharded one needs all processes in each forward pass, so each does everything.
    """
    group = _group()
    if group is None or not items or (model is not None and is_sharded(model)):
        return list(work(list(items)))
    world = group.get_world_size()
    part = list(shard(items))
    results = list(work(part)) if part else []
    assert len(results) == len(part), "one result per item"
    parts: list[list[Result]] = [[] for _ in range(world)]
    group.all_gather_object(parts, results)
    return [parts[place % world][place // world] for place in range(len(items))]


def shard(items: Sequence[Item]) -> Sequence[Item]:
    """Return this process's part of the items, divided as by `scatter_map`."""
    return items[index() :: count()]


def all_reduce_sum(tensor: "Tensor") -> "Tensor":
    """Return the elementwise sum of all processes' tensors, in their dtype; the tensor itself is not changed."""
    group = _group()
    if group is None:
        return tensor
    total = tensor.detach().clone()
    group.all_reduce(total)
    return total


def sum_gradients(params: Iterable["Tensor"], *, scale: float = 1.0) -> None:
    """Make every gradient `scale` times the sum of all processes' gradients, summed in fp32; none counts as zeros.

    An adapter's go in one transfer, more weights in several: their copy in fp32 is not held at once.
    """
    group = _group()
    if group is None:
        return
    import torch

    for trained in _transfers(params):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = _sum_of_all([grad.reshape(-1) for grad in grads])
        flat *= scale
        for param, grad, part in zip(trained, grads, flat.split([grad.numel() for grad in grads]), strict=True):
            param.grad = part.view_as(grad).to(grad.dtype)


def _sum_of_all(parts: list["Tensor"]) -> "Tensor":
    """Return the sum over all processes in fp32, with the tensors concatenated into one."""
    import torch

    group = _group()
    if group.get_world_size() == 2 and len({part.dtype for part in parts}) == 1 and parts[0].device.type == "cpu":
        # Each sends its gradients in their own dtype and sums in fp32. all_reduce sums in the dtype that it transfers,
        # which would have to be fp32: with gloo three times slower than this for bf16.
        mine, peer = torch.cat(parts), 1 - group.get_rank()
        theirs = torch.empty_like(mine)
        transfers = [group.isend(mine, peer), group.irecv(theirs, peer)]
        for transfer in transfers:
            transfer.wait()
        return mine.float() + theirs
    flat = torch.cat([part.float() for part in parts])
    group.all_reduce(flat)
    return flat


def _transfers(params: Iterable["Tensor"]) -> Iterator[list["Tensor"]]:
    """The weights in groups of about as many numbers, in their order; a larger one alone."""
    group: list[Tensor] = []
    numel = 0
    for param in params:
        if group and numel + param.numel() > NUMBERS_PER_TRANSFER:
            yield group
            group, numel = [], 0
        group.append(param)
        numel += param.numel()
    if group:
        yield group


def broadcast_tensors(tensors: Iterable["Tensor"]) -> None:
    """Overwrite these tensors with the first process's values, in every process."""
    group = _group()
    if group is None:
        return
    for tensor in tensors:
        group.broadcast(tensor.detach(), src=0)


def shard_model(model: "nn.Module") -> None:
    """Divide the blocks of a Llama model over the processes with torch's `fully_shard`.

    Embeddings and head, which Llama models may share, stay whole in each process.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    decoder: Any = model.model  # of LlamaForCausalLM and of our scoring model
    mesh = init_device_mesh(next(model.parameters()).device.type, (count(),))
    # Reshard after each forward pass, the outermost too: it would keep its weights as an evaluation left them.
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "reshard_after_forward": True,
    }
    for layer in decoder.layers:
        fully_shard(layer, **settings)
    fully_shard(decoder, **settings, ignored_params={decoder.embed_tokens.weight})


def is_sharded(model: "nn.Module") -> bool:
    """Whether each process holds only a part of the model."""
    return any(is_sharded_tensor(weight) for weight in model.parameters())


def is_sharded_tensor(tensor: "Tensor") -> bool:
    """Whether each process holds only a part of the tensor."""
    if _group() is None:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@contextmanager
def gathered(model: "nn.Module") -> Iterator[None]:
    """Keep all weights whole in each process within the block, for sampling, which runs the model a token at a time.

    Generation over sharded weights is some 20 times slower (Llama 2, arXiv:2307.09288, section 3.2.3).
    """
    modules: list[Any] = []
    if _group() is not None:
        from torch.distributed.fsdp import FSDPModule

        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def full_tensors(tree: Tree) -> Tree:
    """Return the same mappings and lists with every sharded tensor whole, on the CPU, in the first process.

    The other processes get empty tensors in their place.
    """
    if isinstance(tree, Mapping):
        return cast(Tree, {key: full_tensors(value) for key, value in tree.items()})
    if isinstance(tree, (list, tuple)):
        return cast(Tree, type(tree)(full_tensors(value) for value in tree))
    if not is_sharded_tensor(cast(Any, tree)):
        return tree
    full = cast(Any, tree).full_tensor().detach()
    return cast(Tree, full.cpu() if is_first() else full.new_empty(0))


def full_weights(model: "nn.Module") -> "dict[str, Tensor] | None":
    """Return the whole weights of a sharded model (see `full_tensors`), None for any other."""
    return full_tensors(dict(model.state_dict())) if is_sharded(model) else None


def shard_like(tensor: "Tensor", model_tensor: "Tensor") -> "Tensor":
    """Shard a whole tensor as `model_tensor` is; return it as it is if that one is whole or of another shape."""
    if not is_sharded_tensor(model_tensor) or tensor.shape != model_tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded = cast(Any, model_tensor)
    return distribute_tensor(tensor.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def use_gpus() -> bool:
    """Whether to compute on GPUs: there are some, and accelerate was not launched with --cpu."""
    import torch

    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true")


def imported_torch() -> Any:
    """torch where it is imported already, whole; None before, and while another thread imports it."""
    torch = sys.modules.get("torch")
    return None if torch is None or getattr(torch.__spec__, "_initializing", False) else torch


_alone: list[bool] = []  # not empty within `alone`


@contextmanager
def alone() -> Iterator[None]:
    """Work in this process as if there were no others; they wait for what it begins next."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def _group() -> Any:
    """torch.distributed where several processes have met; torch is not loaded to ask."""
    torch = imported_torch()
    if _alone or torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed if torch.distributed.get_world_size() > 1 else None
