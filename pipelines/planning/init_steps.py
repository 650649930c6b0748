"""The sections of the steps that `init` writes: what each learns from, how long, at what rates, and why.

`TINY` are the values of configs/tiny.yaml, for a base of a few million parameters on a CPU; `LARGE` those of the presets for
real cards. What is sampled has a least number, from which the step still learns something, and a full one.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from pipelines.planning.estimates import KEPT_BY_DISTILLATION as KEPT
from pipelines.planning.init_choices import (
    FEW_EXAMPLES,
    Asked,
    Chosen,
    Effort,
    Method,
    batch_for,
    pairs_of_models,
    pairs_per_step,
    reward_epochs,
    split_shares,
    with_gatt,
)
from pipelines.planning.plan import FEW_STEPS


class Extent(NamedTuple):
    """How many at the least, and how many where the hours allow all."""

    least: int
    full: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What goes with the size of a base."""

    whose: str  # for the reasons
    rates: dict[str, float]
    rate_reasons: dict[str, str]
    tuned_rates: dict[str, float]  # of the tunings within steps; none where that of sft holds
    examples: int  # of an optimizer step, at most
    prompts: Extent  # of rejection sampling
    samples: Extent  # answers to each
    temperatures: tuple[float, ...]  # that are compared
    gatt_dialogs: Extent
    gatt_samples: Extent
    gatt_measured: Extent
    adversarial: Extent
    answers: Extent  # of PPO, all iterations together
    responses: tuple[int, ...]  # of an iteration, the first that gives iterations enough
    least_iterations: int
    minibatches: int  # of an iteration
    validation: Extent  # prompts of PPO
    kl_coef: float
    kl_reason: str


TINY = Scale(
    whose="configs/tiny.yaml",
    rates={"sft": 1e-3, "reward": 3e-4, "ppo": 5e-5, "critic": 2e-4},
    rate_reasons=dict.fromkeys(
        ("sft", "reward", "ppo", "critic"), "as configs/tiny.yaml, for all weights of a small base"
    ),
    tuned_rates={"rs": 3e-4, "gatt": 7e-4, "distill": 2e-4},
    examples=16,
    prompts=Extent(60, 400),
    samples=Extent(4, 16),
    temperatures=(0.7,),
    gatt_dialogs=Extent(160, 1600),
    gatt_samples=Extent(2, 2),
    gatt_measured=Extent(20, 300),
    adversarial=Extent(160, 500),
    answers=Extent(208, 2560),
    responses=(64, 32, 16),
    least_iterations=40,
    minibatches=4,
    validation=Extent(16, 64),
    kl_coef=0.2,
    kl_reason="as configs/tiny.yaml: at 0.1 the answers of a small base become alike",
)
LARGE = Scale(
    whose="the presets in configs/",
    rates={"sft": 2e-4, "reward": 1e-4, "ppo": 1e-5, "critic": 5e-5},
    rate_reasons={
        "sft": "ours, unmeasured: ten times the paper's 2e-5 (3.1), as adapters want",
        "reward": "ours, unmeasured: ten times the paper's 1e-5 (3.2.2), as adapters want",
        "ppo": "ours, unmeasured: ten times the paper's 1e-6 (3.2.3), as adapters want",
        "critic": "ours, unmeasured; the paper names no critic",
    },
    tuned_rates={},
    examples=64,
    prompts=Extent(200, 4000),
    samples=Extent(8, 16),
    temperatures=(0.8, 1.0, 1.2),
    gatt_dialogs=Extent(160, 2000),
    gatt_samples=Extent(1, 4),
    gatt_measured=Extent(20, 200),
    adversarial=Extent(160, 2000),
    answers=Extent(6400, 200 * 512),
    responses=(512, 256, 128, 64),
    least_iterations=100,
    minibatches=8,
    validation=Extent(16, 128),
    kl_coef=0.01,
    kl_reason="paper, 3.2.3 (7B and 13B)",
)
TUNED_STEPS = f"a batch that gives {FEW_STEPS} steps or more"


class StepSections:
    """The sections of the steps, for one amount of work."""

    def __init__(self, asked: Asked, method: Method, effort: Effort) -> None:
        self.asked, self.method, self.effort, self.found = asked, method, effort, asked.found
        self.scale = TINY if asked.is_tiny else LARGE
        self.kept = 1.0 - sum(split_shares(asked.found).values())

    def sft(self) -> dict[str, Chosen]:
        dialogs = self.found.records["sft"]
        is_few = dialogs < FEW_EXAMPLES
        epochs, why = (3, f"under {FEW_EXAMPLES} dialogs") if is_few else (2, "paper, 3.1")
        if not self.effort.again:
            epochs, why = 1, "one pass: more would not end within the hours"
        batch = batch_for(dialogs * self.kept * epochs, self.scale.examples)
        told = f"as {self.scale.whose}" if batch == self.scale.examples else f"{TUNED_STEPS} of these dialogs"
        return {
            "epochs": Chosen(epochs, why),
            "learning_rate": self._rate("sft"),
            "examples_per_step": Chosen(batch, told),
            **self._checkpointing(),
        }

    def reward(self) -> dict[str, Chosen]:
        pairs = max(pairs_of_models(self.found).values())
        epochs = reward_epochs(pairs)
        often = (
            "paper, 3.2.2: more overfits" if epochs == 1 else "ours: of so few pairs the paper's one pass is too short"
        )
        rated = f"paper, Table 27; {self.found.rated} pairs are rated"
        return {
            "epochs": Chosen(epochs, often),
            "learning_rate": self._rate("reward"),
            "pairs_per_step": Chosen(
                pairs_per_step(pairs, is_tiny=self.asked.is_tiny),
                f"{TUNED_STEPS} of about {pairs:.0f} pairs; paper: 512",
            ),
            "margin": Chosen("small", rated) if self.found.rated else Chosen("none", "your pairs have no ratings"),
            **self._mixes(),
            **self._checkpointing(),
        }

    def rejection_sampling(self) -> dict[str, Chosen]:
        there_are = max(1, int(self._prompts() * self.kept))
        prompts = min(self._count(self.scale.prompts), there_are)
        samples = self._count(self.scale.samples)
        sweeps = len(self.scale.temperatures) > 1 and self.effort.share >= 0.25
        temperatures = self.scale.temperatures if sweeps else self.scale.temperatures[:1]
        return {
            "prompts": Chosen(prompts, f"{self._why(prompts, self.scale.prompts)}; there are about {there_are}"),
            "samples_per_prompt": Chosen(samples, "ours; in the paper's figure 7 most of the gain comes by 16"),
            **({"temperature": Chosen("sweep", "paper, 3.2.3: tuned anew before each round")} if sweeps else {}),
            "sweep_temperatures": Chosen(list(temperatures), "ours, out of those of the paper's figure 8"),
            "sweep_prompts": Chosen(
                self.effort.count(8, 24), "for the figures of reward against the number of answers"
            ),
            "sweep_samples": Chosen(self.effort.count(4, 16)),
            "validation_prompts": Chosen(self.effort.count(8, 24)),
            "test_prompts": Chosen(self.effort.count(30, 200), "at most; the table at the end"),
            "sft": Chosen(self._tuned("rs", prompts, 2), f"{TUNED_STEPS} of the winners, one a prompt"),
        }

    def gatt(self) -> dict[str, Chosen]:
        dialogs = self._count(self.scale.gatt_dialogs)
        small = {
            "families": Chosen(
                ["calls_user", "quoted", "small_letters", "figure", "hobby"],
                "those that a base of a few million parameters can keep",
            ),
            "most_constraints": Chosen(1),
            "sft_share": Chosen(0.08, "of your dialogs, learnt beside against forgetting"),
        }
        return {
            "dialogs": Chosen(dialogs, self._why(dialogs, self.scale.gatt_dialogs)),
            "turns": Chosen(4, "user turns at most; longer dialogs are joined from several of yours"),
            "samples_per_turn": Chosen(self._count(self.scale.gatt_samples)),
            **(small if self.asked.is_tiny else {}),
            "evaluation_turns": Chosen([1, 2, 4], "ours; the paper's table 30 has 2, 4, 6, 20"),
            "evaluation_dialogs": Chosen(self._count(self.scale.gatt_measured)),
            "sft": Chosen(self._tuned("gatt", dialogs, 1), TUNED_STEPS),
        }

    def distillation(self) -> dict[str, Chosen]:
        there_are = max(1, int(self.found.records["adversarial"] * self.kept))
        prompts = min(self._count(self.scale.adversarial), there_are)
        return {
            "prompts": Chosen(prompts, f"{self._why(prompts, self.scale.adversarial)}; there are about {there_are}"),
            "samples_per_prompt": Chosen(self.effort.count(2, 4)),
            "validation_prompts": Chosen(self.effort.count(8, 24)),
            "test_prompts": Chosen(self.effort.count(30, 200)),
            "sft": Chosen(
                self._tuned("distill", round(prompts * KEPT), 2), f"{TUNED_STEPS} of the answers that are kept"
            ),
        }

    def ppo(self) -> dict[str, Chosen]:
        scale, answers = self.scale, self._count(self.scale.answers)
        sizes = [size for size in scale.responses if answers / size >= scale.least_iterations]
        responses = sizes[0] if sizes else scale.responses[-1]
        iterations = max(1, answers // responses)
        minibatch = min(responses // scale.minibatches, batch_for(answers, responses))
        guard = self.effort.ppo_hours
        limit = {
            "max_hours": Chosen(guard, "a guard, over what is planned: when they are over the best policy is published")
        }
        memory = {"tokens_per_microbatch": Chosen(1024, "ours, for memory")}
        return {
            "iterations": Chosen(
                iterations,
                f"{answers} answers: {self._why(answers, scale.answers)}; paper, 3.2.3: 200 to 400 iterations",
            ),
            "responses_per_iteration": Chosen(responses, "paper: 512"),
            "responses_per_minibatch": Chosen(minibatch, "paper: 64 of 512"),
            "learning_rate": self._rate("ppo"),
            "critic_learning_rate": self._rate("critic"),
            "kl_coef": Chosen(scale.kl_coef, scale.kl_reason),
            "validation_every": Chosen(
                max(1, min(10, iterations // 4)), "the best policy on validation prompts is published"
            ),
            "validation_prompts": Chosen(self._count(scale.validation)),
            "test_prompts": Chosen(self.effort.count(30, 200), "at most; the table at the end"),
            **(limit if guard is not None else {}),
            **({} if self.asked.is_tiny else memory),
            **self._checkpointing(),
        }

    def evaluation(self) -> dict[str, Chosen]:
        dialogs = self.effort.count(12, 120) if with_gatt(self.found, self.effort) else 0
        checked = Chosen(["calls_user", "quoted", "small_letters"], "those of gatt that can be checked")
        return {
            "test_prompts": Chosen(self.effort.count(40, 400), "at most; those of the test side"),
            "dialogs": Chosen(
                dialogs, "with an instruction in the first turn" if dialogs else "without Ghost Attention"
            ),
            **({"families": checked} if self.asked.is_tiny and dialogs else {}),
            "turns": Chosen([1, 2, 4]),
            "curve_prompts": Chosen(self.effort.count(8, 32)),
            "curve_samples": Chosen(self.effort.count(4, 16)),
            "temperatures": Chosen([0.7, 1.0]),
        }

    def tracking(self) -> dict[str, Chosen]:
        return {
            "eval_every": Chosen(50, "optimizer steps"),
            "sample_every": Chosen(100),
            "save_every": Chosen(50, "what a kill costs at most"),
        }

    def _count(self, extent: Extent) -> int:
        return self.effort.count(extent.least, extent.full)

    def _why(self, number: int, extent: Extent) -> str:
        if number >= extent.full:
            return f"as {self.scale.whose}"
        return f"as many as the hours allow; {self.scale.whose}: {extent.full}" if self.effort.share < 1 else "all"

    def _rate(self, name: str) -> Chosen:
        return Chosen(self.scale.rates[name], self.scale.rate_reasons[name])

    def _tuned(self, step: str, examples: int, epochs: int) -> dict[str, Any]:
        """Values over the section sft for a tuning on so many dialogs."""
        batch = batch_for(examples * epochs, self.scale.examples)
        rate = {"learning_rate": self.scale.tuned_rates[step]} if step in self.scale.tuned_rates else {}
        return {"epochs": epochs, "examples_per_step": batch, **rate}

    def _mixes(self) -> dict[str, Chosen]:
        """The paper's mixes of both kinds of pairs, where there are not both."""
        if self.found.has("safety") and self.found.has("helpfulness"):
            return {}
        key = "other_share" if self.found.has("helpfulness") else "helpfulness_share"
        return {key: Chosen(0.0, "there are no other pairs to mix in")}

    def _checkpointing(self) -> dict[str, Chosen]:
        if not self.asked.gpu:
            return {}
        is_on = self.method.checkpointing
        why = "recomputes activations: slower by a third, for memory" if is_on else "the card has room for activations"
        return {"gradient_checkpointing": Chosen(is_on, why)}

    def _prompts(self) -> int:
        """What a policy can be asked: prompts of their own, else the questions of dialogs and pairs."""
        own = self.found.records.get("prompts", 0) + self.found.records.get("adversarial", 0)
        return own or sum(self.found.records.get(key, 0) for key in ("sft", "helpfulness", "safety"))
