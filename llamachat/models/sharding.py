"""A model cut over several processes (FSDP2), for tuning all weights of a base that one card cannot hold with its optimizer.

Blocks are cut by torch's `fully_shard`; embeddings and head, which Llama models may share, are whole in each process. What
is written (checkpoints, artifacts) is whole too, so that any number of processes can go on from it. Every function here
that reads weights is called in all processes: each has a part of them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llamachat import distributed
from llamachat.errors import ConfigError

if TYPE_CHECKING:
    from llamachat.config.sections import Tuning

Tree = TypeVar("Tree")


def shard_if_asked(model: nn.Module, tuning: "Tuning") -> None:
    """Cut the model over the processes where they were launched for that (configs/accelerate/fsdp2.yaml).

    Raises ConfigError for adapters, whose frozen base is whole in each process.
    """
    if not distributed.are_sharded():
        return
    if tuning.method != "full":
        raise ConfigError(
            f"tuning.method: '{tuning.method}', but the launcher asks for FSDP, which here cuts models that are trained whole."
            " With adapters each card holds the base once, in 4 bits with qlora. Launch with configs/accelerate/ddp.yaml,"
            " or set tuning.method to full."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    decoder: Any = model.model  # of LlamaForCausalLM and of our scoring model
    mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.count(),))
    # Cut again after each forward pass, the outermost too: it would keep its weights as an evaluation found them.
    how: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "reshard_after_forward": True,
    }
    for layer in decoder.layers:
        fully_shard(layer, **how)
    fully_shard(decoder, **how, ignored_params={decoder.embed_tokens.weight})


def is_cut(model: nn.Module) -> bool:
    """Whether each process holds only a part of the model."""
    return any(is_cut_tensor(weight) for weight in model.parameters())


def is_cut_tensor(tensor: Tensor) -> bool:
    """Whether each process holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All weights whole in each process within the block, gathered once: for sampling, which runs the model a token at a
    time. Generation over weights that are cut is some 20 times slower (Llama 2, arXiv:2307.09288, section 3.2.3)."""
    from torch.distributed.fsdp import FSDPModule

    cut = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in cut:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in cut:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def whole(tree: Tree) -> Tree:
    """The same mappings and lists with every tensor that is cut made whole, on the CPU; in the first process alone, where
    the others have empty ones in their place."""
    if isinstance(tree, DTensor):
        full = tree.full_tensor().detach()
        return cast(Tree, full.cpu() if distributed.is_first() else full.new_empty(0))
    if isinstance(tree, Mapping):
        return cast(Tree, {key: whole(value) for key, value in tree.items()})
    if isinstance(tree, (list, tuple)):
        return cast(Tree, type(tree)(whole(value) for value in tree))
    return tree


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The weights of a model that is cut, whole (see `whole`); None of any other."""
    return whole(dict(model.state_dict())) if is_cut(model) else None


def like(tensor: Tensor, model_tensor: Tensor) -> Tensor:
    """A whole tensor, cut as this one is; as it is where that one is whole or of another shape (a step count)."""
    if not isinstance(model_tensor, DTensor) or tensor.shape != model_tensor.shape:
        return tensor
    return distribute_tensor(
        tensor.to(model_tensor.device), model_tensor.device_mesh, model_tensor.placements, src_data_rank=None
    )


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write whole weights into the model, each process its part."""
    held = dict(model.state_dict())
    for name, weight in weights.items():
        held[name].copy_(like(weight, held[name]))
