"""The loss of direct preference optimisation; imports only torch. Shapes: B pairs."""

from torch import Tensor, nn


def dpo_losses(
    policy_logratios_B: Tensor, reference_logratios_B: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """-log sigmoid(beta (policy - reference)), [B] in nats (Rafailov et al. 2023, arXiv:2305.18290, Eq. 7).

    A log-ratio is log p(chosen | prompt) - log p(rejected | prompt). Label smoothing is the probability that a pair is
    in the wrong order (E. Mitchell, "A note on DPO with noisy preferences", 2023).
    """
    assert policy_logratios_B.dim() == 1 and policy_logratios_B.shape == reference_logratios_B.shape
    logits_B = beta * (policy_logratios_B - reference_logratios_B)
    right_B, wrong_B = nn.functional.logsigmoid(logits_B), nn.functional.logsigmoid(-logits_B)
    return -(1.0 - label_smoothing) * right_B - label_smoothing * wrong_B
