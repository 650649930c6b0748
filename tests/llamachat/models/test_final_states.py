"""The last layer at chosen positions only: states and gradients are those of transformers' whole pass."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llamachat.models.final_states import LastLayer, final_states, use_last_layer
from llamachat.models.loading import load_base
from tests.tiny_llama import base_section, tiny_llama

IDS = torch.randint(3, 400, (2, 45), generator=torch.Generator().manual_seed(0))
PLACES = torch.tensor([44, 3, 89, 50, 3])  # in any order; one is asked for twice


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_are_those_of_the_whole_pass(checkpointing: bool) -> None:
    theirs, ours = tiny_llama().train(), tiny_llama().train()
    use_last_layer(ours)
    assert [type(layer) is LastLayer for layer in ours.model.layers] == [False, True]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    computed: list[int] = []
    ours.model.layers[-1].mlp.register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].numel() // 64))
    if checkpointing:
        ours.gradient_checkpointing_enable()
    expected = theirs.model(input_ids=IDS).last_hidden_state.flatten(0, 1)[PLACES]
    states = final_states(ours.model, PLACES, input_ids=IDS)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    (states * weights).sum().backward()
    (expected * weights).sum().backward()
    other = dict(theirs.named_parameters())
    for name, weight in ours.model.named_parameters():
        gradient = other[f"model.{name}"].grad
        assert gradient is not None and weight.grad is not None, name
        assert float((weight.grad - gradient).norm()) < 1e-4 * float(gradient.norm()), name
    assert set(computed) == {64}  # of 90 positions; few shapes occur
    torch.testing.assert_close(
        ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits
    )  # every position, if none is chosen


def test_a_base_that_is_loaded_on_a_cpu_has_such_a_layer_and_saves_none(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model: Any = load_base(base_section(tmp_path / "base"))
    assert isinstance(model.model.layers[-1], LastLayer)
    model.save_pretrained(tmp_path / "saved")
    assert "LastLayer" not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
