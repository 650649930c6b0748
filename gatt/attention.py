"""Measure how strongly a dialog attends to the instruction in its first turn (Llama 2, arXiv:2307.09288, figure 10).

As in the paper, this is the maximum attention weight over all layers and heads, with adjacent tokens binned together.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from llamachat.chat_format import ChatFormat, TrainOn
from llamachat.chat_format.dialog import Message
from llamachat.tracking.pictures import COLOURS, harmless, panel_grid, save_png, style_panel

if TYPE_CHECKING:
    from llamachat.models.loading import LanguageModel

BINS = 48


@torch.no_grad()
def strongest_attention(model: "LanguageModel", ids: Sequence[int]) -> Tensor:
    """Maximum attention weight over layers and heads from each token to each earlier one, [T, T], on the CPU.

    The model must be loaded with eager attention, since other kernels do not return the weights.
    """
    output = cast(Any, model)(
        input_ids=torch.tensor([list(ids)], device=model.device), output_attentions=True, use_cache=False
    )
    layers = [layer[0].float().amax(dim=0) for layer in output.attentions]
    return torch.stack(layers).amax(dim=0).cpu()


def binned(attention_TT: Tensor, bins: int = BINS) -> Tensor:
    """Maximum weight between each two bins of tokens, [bins, bins]."""
    return functional.adaptive_max_pool2d(attention_TT[None, None], min(bins, len(attention_TT)))[0, 0]


def to_instruction(attention_TT: Tensor, chat_format: ChatFormat, messages: Sequence[Message]) -> list[float]:
    """For each answer, the mean over its tokens of the maximum weight to the tokens of the system text."""
    first, end_of_system = _system_block(chat_format, messages)
    strengths = []
    for place in range(2, len(messages), 2):
        start = len(chat_format.encode_prompt(messages[:place]))
        end = len(chat_format.encode_dialog(messages[: place + 1], train_on=TrainOn.LAST_ANSWER).input_ids)
        strengths.append(float(attention_TT[start:end, first:end_of_system].amax(dim=1).mean()))
    return strengths


def _system_block(chat_format: ChatFormat, messages: Sequence[Message]) -> tuple[int, int]:
    """Start and end of the tokens that the system text adds to the first turn."""
    with_system, without = (chat_format.encode_prompt(turn) for turn in (messages[:2], messages[1:2]))
    first = next(place for place, (one, other) in enumerate(zip(with_system, without, strict=False)) if one != other)
    return first, first + len(with_system) - len(without)


@harmless
def draw_attention(
    maps: Sequence[tuple[str, Tensor]], by_answer: Sequence[tuple[str, Sequence[float]]], path: Path
) -> None:
    """Draw each policy's attention map of one dialog, and its answers' attention to the instruction by turn."""
    figure, places = panel_grid(len(maps) + 1, panel=(4.0, 3.9))
    image = None
    for place, (title, map_TT) in zip(places, maps, strict=False):
        image = place.imshow(binned(map_TT), cmap="magma", vmin=0.0, vmax=1.0, aspect="auto", origin="upper")
        place.set_title(f"{title}: one dialog", fontsize=10, loc="left")
        place.set_xlabel("attended to (bins of tokens; the instruction first)", fontsize=8)
        place.set_ylabel("attending (bins of tokens)", fontsize=8)
        place.tick_params(labelsize=7)
    if image is not None:
        figure.colorbar(image, ax=places[: len(maps)], shrink=0.8, label="strongest attention of any layer and head")
    for (name, values), colour in zip(by_answer, (COLOURS[-1], COLOURS[0]), strict=True):
        turns = range(1, len(values) + 1)
        places[-1].plot(turns, values, marker="o", markersize=3.5, linewidth=1.7, color=colour, label=name)
    places[-1].set_xticks(sorted({turn for _, values in by_answer for turn in range(1, len(values) + 1)}))
    style_panel(places[-1], "answers' attention to the instruction", x="turn", has_legend=True)
    save_png(figure, path)
