"""Configuration of `ppo`: its own section of the recipe.

Values that the paper states are those of Llama 2 (arXiv:2307.09288), section 3.2.3, for 7B with full tuning; it
states no critic, advantage estimator or value loss, so those values are ours. Sampling and scoring
are configured in the sections `rollout` and `scoring`.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llamachat.config.section import Section, operational

# Part of the fingerprint: raised when the same configuration and data would give other weights.
VERSION = 6

# Tokens per packed row. Rows of 1024 take up to a tenth more time per token with the bundled model (ours, measured).
CPU_ROW_TOKENS = 2048


class CollapseGuard(Section):
    """How far the answers to validation prompts may move from those of iteration 0 before training ends. Ours.

    A bound counts as crossed only if the change from iteration 0 exceeds three standard errors over prompts.
    """

    commonest_answer: float = Field(
        default=0.05, ge=0, le=1, description="Maximum increase of the most frequent answer's share of all answers."
    )
    distinct_2: float = Field(
        default=0.8, ge=0, le=1, description="Minimum ratio of distinct-2 to that of iteration 0; 0: no bound."
    )
    shortest: float = Field(
        default=0.7, ge=0, le=1, description="Minimum ratio of the mean length to that of iteration 0; 0: no bound."
    )
    longest: float = Field(default=2.0, ge=1, description="Maximum ratio of the mean length to that of iteration 0.")


class Config(Section):
    """Proximal policy optimisation of the chat policy against the reward models."""

    iterations: int = Field(
        default=200,
        ge=1,
        description="Maximum number of iterations; each samples answers, scores them and updates the policy. Paper: 200 to 400, early stopping.",
    )
    responses_per_iteration: int = Field(
        default=512, ge=1, description="Answers sampled per iteration. Paper: batch size 512."
    )
    responses_per_minibatch: int = Field(
        default=64, ge=1, description="Answers per optimizer step. Paper: mini-batch size 64."
    )
    responses_per_prompt: int = Field(
        default=1,
        ge=1,
        description="Answers to each prompt in an iteration; advantages: rloo compares them and needs at least 2. Ours.",
    )
    epochs: int = Field(
        default=1, ge=1, description="Passes over an iteration's answers. Paper: one gradient step per mini-batch."
    )
    learning_rate: float = Field(
        default=1e-6,
        gt=0,
        description="Constant learning rate of AdamW. Paper: 1e-6 for full tuning; LoRA needs 10 to 100 times as much.",
    )
    critic_learning_rate: float = Field(
        default=5e-6,
        gt=0,
        description="The critic's constant learning rate; with critic: shared, that of its value head. Ours.",
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="Weight decay of matrices; norms do not decay. Paper: 0.1."
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW beta 1. Paper: 0.9.")
    adam_beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW beta 2. Paper: 0.95.")
    adam_epsilon: float = Field(default=1e-5, gt=0, description="AdamW epsilon. Paper: 1e-5.")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Maximum gradient norm; larger gradients are clipped. Paper: 1.0."
    )
    clip_range: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Clip range: the ratio of new to old policy is clipped to 1 +- this. Paper: 0.2.",
    )
    kl_coef: float = Field(
        default=0.01,
        ge=0,
        description="Beta, the weight of the KL to the starting policy. Paper: 0.01 for 7B and 13B, 0.005 for 34B and 70B.",
    )
    kl_control: Literal["fixed", "adaptive"] = Field(
        default="fixed",
        description="Whether beta is constant (fixed, the paper's) or controlled to reach kl_target (adaptive, Ziegler et al. 2019).",
    )
    kl_target: float = Field(
        default=6.0, gt=0, description="With kl_control: adaptive, the target KL, in nats per answer. Ours."
    )
    kl_gain: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="With kl_control: adaptive, how fast beta changes: by at most 0.2 of this per iteration. Ziegler: 0.1.",
    )
    kl_guard: Annotated[float, Field(gt=0)] | None = Field(
        default=50.0,
        description="Training ends when the KL to the starting policy exceeds this, in nats per answer, on validation prompts or on an iteration's answers; the best policy evaluated before is published. null: no limit. Ours.",
    )
    collapse_guard: CollapseGuard | None = Field(
        default=CollapseGuard(),
        description="Bounds on how repetitive, short or long the answers to validation prompts may become; past a bound, training ends and the best earlier policy is kept. null: none. Ours.",
    )
    unfinished_ramp: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="In this last share of rollout.max_new_tokens, the shaped score of a finished answer falls gradually to scoring.unfinished_score; 0: only truncated answers get that score. Ours.",
    )
    advantages: Literal["gae", "rloo"] = Field(
        default="gae",
        description="The advantage estimator: generalised advantage estimation with a critic (gae, ours), or the answer's reward minus the mean of the other answers to its prompt, without a critic (rloo: Ahmadian et al. 2024).",
    )
    discount: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Discount factor gamma of advantages: gae. Not in the paper; ours.",
    )
    gae_lambda: float = Field(
        default=0.95,
        ge=0,
        le=1,
        description="Lambda of advantages: gae. 1 trusts the rewards, 0 the critic. Not in the paper; ours.",
    )
    value_clip_range: float = Field(
        default=0.2, gt=0, description="Clip range of the value: within this of the old value, in whitened units. Ours."
    )
    value_coef: float = Field(
        default=0.1,
        ge=0,
        description="With critic: shared, the weight of the value loss relative to the policy loss. Not in the paper; ours.",
    )
    critic: Literal["separate", "shared"] = Field(
        default="separate",
        description="The critic: its own weights, initialised from the reward model (separate), or a head on the policy's trunk, initialised to predict 0 (shared: faster, less memory). Ours.",
    )
    critic_warmup: int = Field(
        default=0,
        ge=0,
        description="Number of first iterations that train only the critic; they count as iterations. Ours.",
    )
    validation_every: int = Field(
        default=10,
        ge=1,
        description="Iterations between evaluations on validation prompts, which may end the training. Ours.",
    )
    validation_prompts: int = Field(
        default=128, ge=1, description="Number of held-out prompts in each evaluation, always the same ones. Ours."
    )
    patience: int | None = Field(
        default=5,
        ge=1,
        description="End after this many consecutive evaluations without a higher win rate against the starting policy, and keep the best policy; null: never. Paper: early stopping on held-out prompts; the number is ours.",
    )
    test_prompts: int = Field(
        default=200, ge=1, description="Number of test prompts for comparing the first and the final policy. Ours."
    )
    max_hours: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Time budget of the training in hours, after which the best policy is published; null: no limit. Ours.",
    )
    save_every: int = operational(5, ge=1, description="Iterations between checkpoints.")
    tokens_per_microbatch: Literal["auto"] | Annotated[int, Field(ge=16)] = operational(
        "auto",
        description="Tokens of one forward pass in scoring and updates, including padding; auto uses the memory available.",
    )
    gradient_checkpointing: bool = operational(
        False, description="Recompute activations in the backward pass: about a third slower, with far less memory."
    )

    @model_validator(mode="after")
    def _minibatches_are_equal(self) -> Self:
        if self.responses_per_iteration % self.responses_per_minibatch:
            raise ValueError(
                f"responses_per_iteration ({self.responses_per_iteration}) is not a multiple of responses_per_minibatch"
                f" ({self.responses_per_minibatch}), so the last optimizer step of an iteration would be smaller"
            )
        return self

    @model_validator(mode="after")
    def _prompts_have_as_many_answers(self) -> Self:
        if self.responses_per_iteration % self.responses_per_prompt:
            raise ValueError(
                f"responses_per_iteration ({self.responses_per_iteration}) is not a multiple of responses_per_prompt"
                f" ({self.responses_per_prompt}), so one prompt would have fewer answers than the others"
            )
        if self.advantages == "rloo" and self.responses_per_prompt < 2:
            raise ValueError(
                "advantages: rloo compares an answer with the other answers to its prompt: set responses_per_prompt to 2"
                " or more, such as 4"
            )
        if self.advantages == "rloo" and self.critic_warmup:
            raise ValueError("advantages: rloo has no critic, so critic_warmup must be 0")
        return self

    @model_validator(mode="after")
    def _policy_is_trained(self) -> Self:
        if self.critic_warmup >= self.iterations:
            raise ValueError(
                f"critic_warmup ({self.critic_warmup}) leaves none of the {self.iterations} iterations to the policy"
            )
        return self


def critic_kind(config: Config) -> Literal["separate", "shared", "none"]:
    """The critic in use: none with advantages: rloo."""
    return "none" if config.advantages == "rloo" else config.critic
