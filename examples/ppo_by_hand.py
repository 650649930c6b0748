"""PPO by hand: a policy, a reference, a rule that scores answers, and three iterations with RLOO, without a critic.

    python examples/ppo_by_hand.py runs/tiny/sft

>>> policy, reference = (load_policy("assets/base", dtype="float32", is_trainable=one) for one in (True, False))
>>> prompts = read_records("data/prompts/general.jsonl.gz", Prompt)[:4]
>>> means = train(policy, reference, prompts, score=lambda text: -float(len(text)), max_new_tokens=12)
>>> len(means)
3
"""

import sys
from collections.abc import Callable, Sequence

import torch

from llamachat import load_policy, read_records
from llamachat.answers.packed import PackedRow, TokenSequence, packed_rows, response_mask
from llamachat.config.sections import Rollout
from llamachat.data.records import Prompt
from llamachat.maths.logprobs import k1, token_logprobs
from llamachat.models.loading import Policy
from llamachat.rollout import open_engine
from llamachat.rollout.engine import Sampling
from ppo.advantages import leave_one_out, token_rewards
from ppo.losses import policy_loss

K = 4  # answers to each prompt


def train(
    policy: Policy, reference: Policy, prompts: Sequence[Prompt], *, score: Callable[[str], float], max_new_tokens: int
) -> list[float]:
    """Train the policy for three iterations; return the mean score of each iteration's answers."""
    chat_format, means = policy.chat_format, []
    engine = open_engine(policy.model, chat_format, Rollout())
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=2e-5)
    encoded = [tuple(chat_format.encode_prompt(prompt.messages)) for prompt in prompts]
    for iteration in range(3):
        engine.refresh(policy.model)
        sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=max_new_tokens, seed=iteration)
        groups = engine.generate(encoded, samples_per_prompt=K, sampling=sampling)
        answers = [TokenSequence(ids, one.token_ids) for ids, of in zip(encoded, groups, strict=True) for one in of]
        scores_B = torch.tensor([score(chat_format.decode_answer(answer.response)) for answer in answers])
        means.append(float(scores_B.mean()))

        mask_BR = response_mask(answers, policy.model.device)
        rows = packed_rows(answers, range(len(answers)), row_tokens=1024, device=policy.model.device)
        old_BR, ref_BR = torch.zeros(mask_BR.shape), torch.zeros(mask_BR.shape)
        with torch.no_grad():
            for row in rows:
                row.put(old_BR, logprobs(policy, row))
                row.put(ref_BR, logprobs(reference, row))
        kl_BR = k1(old_BR, ref_BR, response_mask_BR=mask_BR)
        rewards_BR = token_rewards(scores_B, kl_BR=kl_BR, response_mask_BR=mask_BR, kl_coef=0.05)
        advantages_B1 = leave_one_out(rewards_BR.sum(dim=1), responses_per_prompt=K).unsqueeze(1)
        for _ in range(2):  # epochs
            for row in rows:
                policy_loss(
                    logprobs(policy, row).unsqueeze(0),
                    row.taken(old_BR),
                    advantages_BR=row.taken(advantages_B1.expand(mask_BR.shape)),
                    response_mask_BR=row.taken(mask_BR),
                    clip_range=0.2,
                    tokens=int(mask_BR.sum()),
                ).loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return means


def logprobs(policy: Policy, row: PackedRow) -> torch.Tensor:
    """log p of the response tokens of a packed row, [N], in nats."""
    hidden_ND = policy.model.model(**row.batch, use_cache=False).last_hidden_state[0, row.places_N]
    return token_logprobs(hidden_ND, row.tokens_N, head=policy.model.get_output_embeddings()).logprobs


if __name__ == "__main__":
    trained, frozen = (load_policy(sys.argv[1], dtype="float32", is_trainable=one) for one in (True, False))
    questions = read_records("data/prompts/general.jsonl.gz", Prompt)[:32]
    print(train(trained, frozen, questions, score=lambda text: -float(len(text.split())), max_new_tokens=48))
