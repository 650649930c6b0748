"""The last layer at chosen positions only: states and gradients are those of transformers' whole pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llamachat.models.final_states import TrimmedLayer, final_states, trim_last_layer
from llamachat.models.loading import load_base
from tests.tiny_llama import base_section, move_adapter, tiny_llama

IDS = torch.randint(3, 400, (2, 45), generator=torch.Generator().manual_seed(0))
PLACES = torch.tensor([44, 3, 89, 50, 3])  # in any order; one is asked for twice


def wrapped(kind: str) -> Any:
    """A tiny Llama, plain or with an adapter that matters."""
    model: Any = tiny_llama()
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        move_adapter(model)
    return model.train()


@pytest.mark.parametrize(("kind", "checkpointing"), [("plain", False), ("plain", True), ("lora", False)])
def test_states_and_gradients_are_those_of_the_whole_pass(kind: str, checkpointing: bool) -> None:
    theirs, ours = wrapped(kind), wrapped(kind)
    trim_last_layer(ours)
    theirs_llama, llama = theirs.get_decoder(), ours.get_decoder()
    assert [type(layer) is TrimmedLayer for layer in llama.layers] == [False, True]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    computed: list[int] = []
    llama.layers[-1].mlp.register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].numel() // 64))
    if checkpointing:
        ours.gradient_checkpointing_enable()
    expected = theirs_llama(input_ids=IDS).last_hidden_state.flatten(0, 1)[PLACES]
    states = final_states(llama, PLACES, input_ids=IDS)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    (states * weights).sum().backward()
    (expected * weights).sum().backward()
    other = dict(theirs_llama.named_parameters())
    trained = {name: weight for name, weight in llama.named_parameters() if weight.requires_grad}
    assert trained
    for name, weight in trained.items():
        gradient = other[name].grad
        assert gradient is not None and weight.grad is not None, name
        assert float((weight.grad - gradient).norm()) < 1e-4 * float(gradient.norm()), name
    assert set(computed) == {64}  # of 90 positions; few shapes occur
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)  # all positions
    assert final_states(llama, PLACES[:0], input_ids=IDS).shape == (0, 64)


def test_the_last_layer_of_a_base_that_is_loaded_on_a_cpu_is_trimmed(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model: Any = load_base(base_section(tmp_path))
    assert isinstance(model.model.layers[-1], TrimmedLayer)
