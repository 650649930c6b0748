"""The values of a recipe that `init` writes, each with its reason: from what the files hold, the card, and an effort."""

from typing import Any

from pipelines.planning.init_choices import (
    Asked,
    Chosen,
    Effort,
    Method,
    Values,
    answer_tokens,
    pairs_of_models,
    pairs_per_step,
    reward_epochs,
    scores,
    split_shares,
    with_distill,
    with_gatt,
)
from pipelines.planning.init_data import Found
from pipelines.planning.init_steps import StepSections


def values(asked: Asked, method: Method, effort: Effort) -> Values:
    """The whole recipe, section by section."""
    found = asked.found
    learnt = StepSections(asked, method, effort)
    sections: Values = {
        "run": _run(asked),
        "base": _base(asked, method),
        "tuning": _tuning(asked, method),
        "data": _data(found),
        "steps": Chosen(steps(found, effort, is_tiny=asked.is_tiny)),
        "sft": learnt.sft(),
    }
    if scores(found):
        sections["reward"] = learnt.reward()
        sections["scoring"] = {"combine": _combine(found)}
    sections["rollout"] = _rollout(asked, method)
    if scores(found):
        sections["rejection_sampling"] = learnt.rejection_sampling()
    if with_gatt(found, effort):
        sections["gatt"] = learnt.gatt()
    if with_distill(found):
        sections["context_distillation"] = learnt.distillation()
    if scores(found):
        sections["ppo"] = learnt.ppo()
        sections["evaluation"] = learnt.evaluation()
    sections["tracking"] = learnt.tracking()
    return sections


def plain(sections: Values) -> dict[str, Any]:
    """The values alone."""
    return {
        name: section.value if isinstance(section, Chosen) else {key: chosen.value for key, chosen in section.items()}
        for name, section in sections.items()
    }


def steps(found: Found, effort: Effort, *, is_tiny: bool) -> list[Any]:
    """The steps that the data allow, in the paper's order."""
    # At temperature 1 a model of a few million parameters often does not come to an end.
    cooler = {"rollout": {"temperature": 0.7}}

    def named(step: str) -> Any:
        return {step: cooler} if is_tiny else step

    chosen: list[Any] = ["sft"]
    if scores(found):
        chosen += [*reward_models(found, is_tiny=is_tiny), named("rs")]
    if with_gatt(found, effort):
        chosen.append(named("gatt"))
    if with_distill(found):
        chosen.append(named("distill"))
    if scores(found):
        chosen += ["ppo", named("eval")]
    return [*chosen, "report"]


def reward_models(found: Found, *, is_tiny: bool) -> list[Any]:
    """The models that the pairs allow, each with what gives it steps enough where the section's values do not."""
    pairs = pairs_of_models(found)
    usual = _of_a_model(max(pairs.values()), is_tiny=is_tiny)
    entries: list[Any] = []
    for which, count in pairs.items():
        own = {key: value for key, value in _of_a_model(count, is_tiny=is_tiny).items() if value != usual[key]}
        entries.append({f"rm/{which}": own} if own else f"rm/{which}")
    return entries


def _of_a_model(pairs: float, *, is_tiny: bool) -> dict[str, int]:
    return {"epochs": reward_epochs(pairs), "pairs_per_step": pairs_per_step(pairs, is_tiny=is_tiny)}


def _run(asked: Asked) -> dict[str, Chosen]:
    chosen = {"dir": Chosen(asked.run_dir, "each step has its folder in it"), "seed": Chosen(0)}
    if asked.gpu:
        chosen["gpu"] = Chosen(asked.gpu, "what `plan` counts memory and hours for")
    why = "hours of one command; the step at work when they are over ends at its best weights, and the same command goes on"
    return chosen | ({"max_hours": Chosen(asked.hours, why)} if asked.hours else {})


def _base(asked: Asked, method: Method) -> dict[str, Chosen]:
    longer = asked.found.longer_than(method.max_tokens)
    total = len(asked.found.sizes.records)
    why = f"of {total} dialogs and pairs {longer} are longer by estimate: of those the oldest turns go, or they are dropped, counted"
    return {
        "model": Chosen(asked.base),
        "dtype": Chosen("bfloat16"),
        "attention": Chosen("auto", "flash_attention_2 where it is installed")
        if asked.gpu
        else Chosen("eager", "faster than sdpa over short packed rows on a CPU"),
        "max_tokens": Chosen(
            method.max_tokens, why if longer else f"none of {total} dialogs and pairs is longer, by estimate"
        ),
    }


def _tuning(asked: Asked, method: Method) -> dict[str, Chosen]:
    if method.name == "full":
        return {"method": Chosen("full", "a base this small is tuned whole, as the paper tunes its own")}
    why = {
        "lora": "adapters on the base in 16 bits: the card holds it",
        "qlora": "adapters on the base in 4 bits: in 16 bits it does not fit the card",
    }[method.name]
    return {
        "method": Chosen(method.name, why if asked.gpu else "adapters: all weights would need many times the memory"),
        "rank": Chosen(method.rank, "ours, as in configs/; a step's adapter has one rank all through"),
        "alpha": Chosen(2 * method.rank, "ours: twice the rank"),
        "targets": Chosen("all-linear", "as QLoRA found necessary"),
    }


def _data(found: Found) -> dict[str, Chosen]:
    chosen = {
        key: Chosen([{"path": path} for path in paths], f"{found.records[key]} records")
        for key, paths in found.files.items()
    }
    shares = split_shares(found)
    why = "shares kept from training, by a hash of the first user turn"
    if scores(found):
        why += (
            "; judge: a reward model that only tells" if shares["judge"] else "; too few pairs for a judge of their own"
        )
    return chosen | {"split": Chosen(shares, why)}


def _combine(found: Found) -> Chosen:
    if not (found.has("safety") and found.has("helpfulness")):
        return Chosen("single", "there is one reward model: no gate without a safety model")
    if found.labelled:
        return Chosen(
            "llama2_gate", f"{found.labelled} answers are labelled safe or unsafe, so the safety score has a zero"
        )
    return Chosen("weighted", "no answer of data.safety has a label, so the gate's threshold would mean nothing")


def _rollout(asked: Asked, method: Method) -> dict[str, Chosen]:
    chosen = {
        "max_new_tokens": Chosen(
            answer_tokens(asked, method), "95 of 100 answers of your data are not longer, by estimate"
        )
    }
    return chosen | (
        {"cache_gib": Chosen(2.0, "ours: keys and values of the answers sampled at once")} if asked.gpu else {}
    )
