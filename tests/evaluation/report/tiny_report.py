"""A run folder as finished steps leave it, written by hand: manifests, final figures, records, an evaluation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.report.config import Config
from evaluation.report.step import run
from llamachat.config.sections import Base, Data, Run, Tracking, Tuning
from llamachat.runs.artifacts import Artifact, Kind, Manifest, StepFolder, publish
from llamachat.runs.inputs import StepInputs

EVALUATED = ("sft", "rs", "ppo")
STEPS = ("sft", "rm/helpfulness", "rm/safety", "rm/judge", "rs", "ppo", "gatt", "distill", "eval")
HOSTILE = "<script>alert('x')</script> & <img src=http://evil.example/x.png> ``` {{ 7 * 7 }} | end"
_COMMANDS = {"rm/helpfulness": "rm", "rm/safety": "rm", "rm/judge": "rm"}
_SECTIONS: dict[str, dict[str, Any]] = {
    "sft": {"base": {"max_tokens": 1024}, "sft": {"epochs": 1.5, "learning_rate": 1e-3, "examples_per_step": 64}},
    "rm": {"reward": {"epochs": 1.0, "learning_rate": 1e-5, "pairs_per_step": 32}},
    "rs": {"rejection_sampling": {"start": "current"}},
    "ppo": {"ppo": {"iterations": 40, "learning_rate": 1e-6, "kl_coef": 0.035, "clip_range": 0.2}},
    "gatt": {"gatt": {"values": "lists"}},
}


def measure(value: float, reach: float | None = None, n: int = 400) -> dict[str, Any]:
    """A figure as the evaluation writes it, with or without an interval."""
    ends = {"low": None, "high": None} if reach is None else {"low": value - reach, "high": value + reach}
    return {"value": value, **ends, "n": n}


def outcome_figures(kind: str, *, complied: float, refused: float) -> dict[str, Any]:
    """What answers to prompts of one kind do; half of what is left refuses in part, half says nothing."""
    shares = {"complied": complied, "refused": refused}
    shares |= dict.fromkeys(("partly_refused", "unanswered"), (1 - complied - refused) / 2)
    return {f"{kind}/{name}": measure(share, 0.02) for name, share in shares.items()}


def evaluation() -> dict[str, Any]:
    """Three policies: rs beats sft and the judge does not follow, ppo does not beat it and the judge puts it below."""
    figures: dict[str, dict[str, Any]] = {}
    for index, policy in enumerate(EVALUATED):
        figures[policy] = {
            "reward_helpfulness": measure(-0.6123 + 0.1 * index, 0.05),
            "reward_safety": measure(1.2345 - 0.2 * index, 0.06),
            "on_own_prompts/reward_helpfulness": measure(-0.7123 + 0.1 * index, 0.05),
            "on_own_prompts/reward_safety": measure(0.2345 - 0.2 * index, 0.06),
            "judge": measure(-0.1879 - 0.01 * index, 0.04),
            "reward_combined": measure(0.4444 + 0.1 * index, 0.05),
            "score": measure(0.0123 + 0.2 * index, 0.07),
            "violation": measure(0.0525 - 0.0125 * index, 0.02),
            **outcome_figures("harmful", complied=0.8 - 0.05 * index, refused=0.1 + 0.05 * index),
            **outcome_figures("harmless", complied=0.95 - 0.0246 * index, refused=0.0246 * index),
            **outcome_figures("harmless/xstest_safe", complied=0.9, refused=0.05),
            "response_tokens": measure(40.777 - 7.3 * index),
            "finished_fraction": measure(0.875 + 0.05 * index),
            "distinct_2": measure(0.6757 - 0.11 * index),
            "kl_to_reference": measure(3.456 * index, 0.2 if index else None),
            **{f"consistency/turn_{turn}": measure(0.4 - 0.03 * turn + 0.1 * index, 0.05) for turn in (2, 4)},
            **{f"chance/turn_{turn}": measure(0.05, 0.02) for turn in (2, 4)},
        }
    shifts = {"rs": (0.42, -0.03), "ppo": (0.05, -0.2)}
    for policy, (combined, judge) in shifts.items():
        for name in ("reward_helpfulness", "reward_safety", "reward_combined", "score"):
            figures[policy][f"difference/{name}"] = measure(combined, 0.08)
        figures[policy]["difference/judge"] = measure(judge, 0.04)
        figures[policy]["difference/judge_like_length"] = measure(judge, None)
        figures[policy]["superiority"] = measure(0.5 + combined / 2, 0.04)
        for name in ("judge", "reward_helpfulness", "reward_safety", "combined"):
            figures[policy][f"win_rate/{name}"] = measure(0.5 + combined, 0.06)
            figures[policy][f"ties/{name}"] = measure(0.0275)
    curves = [
        {
            "policy": policy,
            "temperature": temperature,
            "best": [0.1 * n * temperature for n in range(4)],
            "best_low": [0.1 * n * temperature - 0.05 for n in range(4)],
            "best_high": [0.1 * n * temperature + 0.05 for n in range(4)],
            "median": [0.0] * 4,
        }
        for policy in EVALUATED[:2]
        for temperature in (0.7, 1.0)
    ]
    return {
        "reference": "sft",
        "policies": list(EVALUATED),
        "temperature": 1.0,
        "max_new_tokens": 128,
        "seed": 0,
        "figures": figures,
        "curves": curves,
        "outcome_classifier": {"all": measure(0.895, 0.02), "refused": measure(0.931, 0.02)},
        "samples": [
            sample("helpfulness", "Say hello."),
            sample("safety", HOSTILE),
            sample("borderline", "Kill a process?"),
        ],
    }


def sample(kind: str, prompt: str) -> dict[str, Any]:
    """A prompt that all policies answered with hostile text."""
    scores = {"reward_helpfulness": 0.5, "reward_safety": -0.25, "judge": None}
    answer = {"text": HOSTILE, "tokens": 31, "finished": False, "scores": scores}
    return {
        "kind": kind,
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}],
        "answers": dict.fromkeys(EVALUATED, answer),
    }


@dataclass
class TinyRun:
    """A run folder to which steps are added, and the report on those that there are."""

    folder: Path
    evaluation: dict[str, Any] = field(default_factory=evaluation)
    steps: Sequence[str] = STEPS  # of the recipe
    data: dict[str, Any] = field(default_factory=dict)  # sources of the recipe next to its own
    artifacts: list[Artifact] = field(default_factory=list)

    def add(self, *names: str) -> "TinyRun":
        for name in names:
            self.artifacts.append(self._finished(name))
        return self

    def inputs(self, count: int) -> StepInputs:
        folder = self.folder / f"report-{count}"
        return StepInputs(
            step="report",
            folder=StepFolder(folder),
            identity={"step": "report", "command": "report"},
            fingerprint="f" * 64,
            run=Run(dir=str(self.folder), seed=7),
            base=Base(model="assets/nowhere"),
            tuning=Tuning(),
            data=Data(sft=()),
            tracking=Tracking(mode="off"),
            recipe={
                "base": {"model": "assets/nowhere"},
                "tuning": {"method": "lora", "rank": 64},
                "data": {
                    "sft": [{"path": "my/chats.jsonl", "weight": 0.5}],
                    "helpfulness": [{"path": "my/pairs.jsonl"}],
                    "split": {"test": 0.2},
                    **self.data,
                },
                "steps": [*self.steps[:4], *({name: {}} for name in self.steps[4:]), "report"],
            },
            surveyed=tuple(self.artifacts[:count]),
        )

    def report(self, *, count: int = len(STEPS), config: Config | None = None) -> StepFolder:
        """The report on the first `count` of the steps that there are."""
        inputs = self.inputs(count)
        run(config or Config(), inputs)
        return inputs.folder

    def _finished(self, name: str) -> Artifact:
        step, command = StepFolder(self.folder / name), _COMMANDS.get(name, name)
        kinds: dict[str, Kind] = {"rm": "reward_model", "eval": "evaluation"}
        manifest = Manifest(
            kind=kinds.get(command, "policy"),
            step=name,
            fingerprint="0" * 64,
            identity={"step": name, "command": command, **_SECTIONS.get(command, {})},
            inputs={"policy": "elsewhere"},
            seed=7,
            dropped_records={"too long": 9} if name == "rm/safety" else {},
            details={"which": name.partition("/")[2]} if command == "rm" else {},
        )
        step.path.mkdir(parents=True)
        write(step.summary, summary_of(name))
        if command in ("sft", "ppo"):
            values = [{"step": at, f"{command}/step": at, f"{command}/entropy": 0.0} for at in (1, 2)]
            lines = [{**one, "optim/learning_rate": 1e-3} for one in values]
            step.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            said = {"step": 2, "prompt": "user: Hi", "answer": HOSTILE, "tokens": 3, "finished": True}
            step.samples.write_text(json.dumps(said) + "\n", encoding="utf-8")
        if command == "rs":
            step.figures.mkdir()
            write(step.figures / "best_of_n.json", self.evaluation["curves"])
        content = self.evaluation if command == "eval" else {}
        return publish(step, manifest, lambda side: write(side / f"{manifest.kind}.json", content))


def write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def summary_of(name: str) -> dict[str, float]:
    """Final figures of a step, by the names of the table of metrics."""
    command, _, which = name.partition("/")
    summary: dict[str, float] = {"memory/peak_gib": 1.5, "time/train_s": 30.0}
    if command == "sft":
        summary |= {
            "sft/eval_loss_base": 4.12,
            "sft/eval_loss": 2.888,
            "sft/epoch": 1.5,
            "sft/trained_tokens": 405468.0,
        }
    if command == "rm":
        start = f"rm/{which}"
        for domain in ("helpfulness", "safety"):
            summary |= interval(f"{start}/test/{domain}/accuracy", 0.562) | {f"{start}/test/{domain}/pairs": 1011.0}
            summary |= {f"{start}/test/{domain}/tfidf": 0.598, f"{start}/test/{domain}/longer_wins": 0.58}
        for rating, value in (("significantly_better", 0.81), ("better", 0.7), ("slightly_better", 0.6)):
            summary |= interval(f"{start}/test/helpfulness/accuracy_{rating}", value)
        summary |= {f"{start}/unsafe_recall": 0.474, f"{start}/unsafe_precision": 0.321}
    if command in ("rs", "ppo", "distill"):
        start = f"{command}/test"
        summary |= interval(f"{start}/difference/score", 0.5458) | interval(f"{start}/difference/judge", 0.01)
        summary |= {f"{start}/prompts": 400.0}
        for at, moment in enumerate(("start", "final")):
            summary |= {f"{start}/{moment}/response_tokens": 42.97 - at, f"{start}/{moment}/distinct_2": 0.67}
    if command == "gatt":
        for moment, value in (("start", 0.022), ("final", 0.3833), ("chance", 0.05)):
            for turn in (2, 4):
                summary |= interval(f"gatt/consistency/{moment}/turn_{turn}", value)
    if command == "distill":
        summary |= interval("distill/effect/generic", 0.0755) | {"distill/kept_fraction": 0.48}
    return summary


def interval(name: str, value: float) -> dict[str, float]:
    return {name: value, f"{name}_low": value - 0.04, f"{name}_high": value + 0.04}
