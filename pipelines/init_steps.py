"""The sections of the steps that `init` writes: what each learns from, how long, at what rates, and why."""

from typing import Any

from pipelines.init_choices import (
    AIM,
    FEW_EXAMPLES,
    Asked,
    Chosen,
    Effort,
    Method,
    batch_for,
    pairs_of_models,
    pairs_per_step,
    reward_epochs,
    scores,
    split_shares,
    with_gatt,
)
from pipelines.plan import FEW_STEPS


class StepSections:
    """The sections of the steps: what they learn from, how long, at what rates."""

    def __init__(self, asked: Asked, method: Method, effort: Effort) -> None:
        self.asked, self.method, self.effort = asked, method, effort
        self.found, self.is_tiny = asked.found, asked.is_tiny
        shares = split_shares(asked.found)
        self.kept = 1.0 - sum(shares.values())

    def sft(self) -> dict[str, Chosen]:
        dialogs = self.found.records["sft"]
        is_few = dialogs < FEW_EXAMPLES
        epochs = 3 if is_few else 2
        why = f"under {FEW_EXAMPLES} dialogs" if is_few else "paper, 3.1"
        if not self.effort.again:
            epochs, why = 1, "one pass: two would not end within the hours"
        batch = batch_for(dialogs * self.kept * epochs, 16 if self.is_tiny else 64)
        told = "paper, 3.1" if batch == 64 else f"the paper's 64 would give under {FEW_STEPS} steps of these dialogs"
        if self.is_tiny:
            told = "as configs/tiny.yaml" if batch == 16 else f"16 would give under {AIM} steps of these dialogs"
        return {
            "epochs": Chosen(epochs, why),
            "learning_rate": self._rate(1e-3, 2e-4, "ten times the paper's 2e-5 (3.1)"),
            "examples_per_step": Chosen(batch, told),
            **self._checkpointing(),
        }

    def reward(self) -> dict[str, Chosen]:
        pairs = max(pairs_of_models(self.found).values())
        epochs, batch = reward_epochs(pairs), pairs_per_step(pairs, is_tiny=self.is_tiny)
        margin = (
            Chosen("small", "paper, Table 27") if self.found.rated else Chosen("none", "your pairs have no ratings")
        )
        return {
            "epochs": Chosen(
                epochs, "paper, 3.2.2: more overfits" if epochs == 1 else "few pairs; the paper's one pass is too short"
            ),
            "learning_rate": self._rate(3e-4, 1e-4, "ten times the paper's 1e-5 (3.2.2)"),
            "pairs_per_step": Chosen(
                batch, f"the paper's 512 would give under {FEW_STEPS} steps of about {pairs:.0f} pairs"
            ),
            "margin": margin,
            **self._checkpointing(),
        }

    def rejection_sampling(self) -> dict[str, Chosen]:
        full_prompts, full_samples = (400, 16) if self.is_tiny else (4000, 16)
        prompts = min(
            self.effort.count(60 if self.is_tiny else 200, full_prompts), max(1, int(self._prompts() * self.kept))
        )
        samples = self.effort.count(4 if self.is_tiny else 8, full_samples)
        sweeps = self.effort.share >= 0.25 and not self.is_tiny
        chosen = {
            "prompts": Chosen(prompts, self._of("4000, a preset's", prompts, full_prompts)),
            "samples_per_prompt": Chosen(samples, "most of the gain comes by 16 (the paper's figure 7)"),
        }
        if sweeps:
            chosen["temperature"] = Chosen("sweep", "paper, 3.2.3: tuned anew before each round")
        temperatures = [0.8, 1.0, 1.2] if sweeps else [0.7 if self.is_tiny else 1.0]
        chosen |= {
            "sweep_temperatures": Chosen(temperatures, "also those of the figures"),
            "sweep_prompts": Chosen(self.effort.count(8, 24 if self.is_tiny else 64)),
            "sweep_samples": Chosen(self.effort.count(4, 16)),
            "validation_prompts": Chosen(self.effort.count(8, 24 if self.is_tiny else 64)),
            "test_prompts": Chosen(self.effort.count(30, 200)),
            "sft": Chosen(self._tuned(prompts, 2, 3e-4), f"at least {FEW_STEPS} steps of the winners, one a prompt"),
        }
        return chosen

    def gatt(self) -> dict[str, Chosen]:
        dialogs = self.effort.count(160, 1600 if self.is_tiny else 2000)
        chosen = {
            "dialogs": Chosen(dialogs, self._of("2000", dialogs, 2000)),
            "turns": Chosen(4, "user turns of a dialog at most; longer ones are joined from several of yours"),
            "samples_per_turn": Chosen(2 if self.is_tiny else self.effort.count(1, 4)),
        }
        if self.is_tiny:
            families = ["calls_user", "quoted", "small_letters", "figure", "hobby"]
            chosen["families"] = Chosen(families, "those that a model of a few million parameters can keep")
            chosen["most_constraints"] = Chosen(1)
            chosen["sft_share"] = Chosen(0.08, "of your dialogs learnt beside, against forgetting")
        chosen["evaluation_turns"] = Chosen([1, 2, 4])
        chosen["evaluation_dialogs"] = Chosen(self.effort.count(20, 300 if self.is_tiny else 200))
        chosen["sft"] = Chosen(self._tuned(dialogs, 1, 7e-4), f"at least {FEW_STEPS} steps")
        return chosen

    def distillation(self) -> dict[str, Chosen]:
        most = max(1, int(self.found.records["adversarial"] * self.kept))
        prompts = min(self.effort.count(160, 500 if self.is_tiny else 2000), most)
        return {
            "prompts": Chosen(prompts, f"of about {most} adversarial prompts to train on"),
            "samples_per_prompt": Chosen(self.effort.count(2, 4)),
            "validation_prompts": Chosen(self.effort.count(8, 24)),
            "test_prompts": Chosen(self.effort.count(30, 200)),
            "sft": Chosen(self._tuned(prompts, 1, 2e-4)),
        }

    def ppo(self) -> dict[str, Chosen]:
        answers = self.effort.count(160, 2560) if self.is_tiny else self.effort.count(6400, 200 * 512)
        sizes, ratio = ((64, 32, 16), 4) if self.is_tiny else ((512, 256, 128, 64), 8)
        responses = next((size for size in sizes if answers / size >= (40 if self.is_tiny else 100)), sizes[-1])
        iterations = max(1, answers // responses)
        minibatch = min(responses // ratio, batch_for(answers, responses))
        chosen = {
            "iterations": Chosen(
                iterations, self._of("paper, 3.2.3: 200 to 400", iterations, 40 if self.is_tiny else 200)
            ),
            "responses_per_iteration": Chosen(
                responses,
                "paper: 512"
                if responses == 512
                else "paper: 512, which takes longer than the hours allow"
                if not self.is_tiny
                else "",
            ),
            "responses_per_minibatch": Chosen(minibatch, "paper: an eighth" if ratio == 8 else ""),
            "learning_rate": self._rate(5e-5, 1e-5, "ten times the paper's 1e-6 (3.2.3)"),
            "critic_learning_rate": self._rate(2e-4, 5e-5, "ours; the paper names no critic"),
            "kl_coef": Chosen(0.2, "as configs/tiny.yaml: at 0.1 answers become alike")
            if self.is_tiny
            else Chosen(0.01, "paper, 3.2.3 (7B and 13B)"),
            "validation_prompts": Chosen(self.effort.count(16, 64 if self.is_tiny else 128)),
            "validation_every": Chosen(
                max(1, min(10, iterations // 4)), "the best policy on validation prompts is published"
            ),
            "test_prompts": Chosen(self.effort.count(30, 200)),
        }
        if self.effort.ppo_hours is not None:
            chosen["max_hours"] = Chosen(
                self.effort.ppo_hours, "a guard, a third over the plan's: then the best policy is published"
            )
        if not self.is_tiny:
            chosen["tokens_per_microbatch"] = Chosen(1024, "ours, for memory")
        return chosen | self._checkpointing()

    def evaluation(self) -> dict[str, Chosen]:
        tiny = {"families": Chosen(["calls_user", "quoted", "small_letters"], "as gatt's, those that can be checked")}
        return {
            "test_prompts": Chosen(self.effort.count(40, 400), "at most; those of the test side"),
            "dialogs": Chosen(
                self.effort.count(12, 120) if with_gatt(self.found, self.effort) else 0,
                "with an instruction in the first turn",
            ),
            "turns": Chosen([1, 2, 4]),
            **(tiny if self.is_tiny else {}),
            "curve_prompts": Chosen(self.effort.count(8, 32) if scores(self.found) else 0),
            "curve_samples": Chosen(self.effort.count(4, 16)),
            "temperatures": Chosen([0.7, 1.0]),
        }

    def tracking(self) -> dict[str, Chosen]:
        cadence = 50 if self.effort.share > 0.2 else 40
        return {"eval_every": Chosen(cadence), "sample_every": Chosen(2 * cadence), "save_every": Chosen(cadence)}

    def _rate(self, tiny: float, adapters: float, why: str) -> Chosen:
        return Chosen(tiny, "as configs/tiny.yaml") if self.is_tiny else Chosen(adapters, f"ours, for adapters: {why}")

    def _of(self, whose: str, number: int, full: int) -> str:
        if self.is_tiny:
            return "" if number < full else "as configs/tiny.yaml"
        return whose if number >= full else f"{whose} would not end within the hours, or has no more prompts"

    def _tuned(self, examples: int, epochs: int, tiny_rate: float) -> dict[str, Any]:
        """Values over the section sft for a tuning on so many dialogs."""
        chosen: dict[str, Any] = {
            "epochs": epochs,
            "examples_per_step": batch_for(examples * epochs, 16 if self.is_tiny else 64),
        }
        return chosen | ({"learning_rate": tiny_rate} if self.is_tiny else {})

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
