"""One case of `benchmarks/memory.py` in its own process: measure the peak of the project's steps on random weights.

Reads a case as JSON and prints one line of JSON. A toy model first runs through the same steps, so that code, kernels
and thread pools are loaded; then the model is loaded, its weights are read, and the growth from there to the peak is
measured. On a CPU that is resident memory (the peak is reset through /proc/self/clear_refs, and `benchmarks/memory.py`
configures malloc to return freed blocks at once), on a GPU the memory allocated by torch.
"""

import gc
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from benchmarks.memory import ROOT, Case, base_of, ppo_config, reward_config, rollout_of, sft_config, tuning_of
from llamachat.chat_format import TokenizedExample
from llamachat.chat_format.dialog import Message
from llamachat.config.sections import Data, DataSource, Run, Scoring, Tracking
from llamachat.data.packing import StepPlan
from llamachat.data.pairs import PairExample
from llamachat.data.records import Preference
from llamachat.runs.artifacts import StepFolder
from llamachat.runs.inputs import StepInputs
from ppo.config import Config as PpoConfig

if TYPE_CHECKING:
    from llamachat.training.session import Training
    from llamachat.training.trainer import Collate

PROMPTS = Data(sft=(), prompts=(DataSource(path=str(ROOT / "data" / "prompts" / "general.jsonl.gz")),))
STEPS = 2  # optimizer steps: from the second on, moments exist next to the activations
MICROBATCHES = 2  # per step: from the second on, gradients exist too
Steps = Callable[[], float]  # returns the seconds of the last step


@dataclass(frozen=True, slots=True)
class Measured:
    """Growth in bytes from after loading to the peak, and seconds of the last optimizer step, iteration or rollout."""

    grown: int
    step_s: float


def measured(case: Case, folder: Path) -> Measured:
    steps = _OPEN[case.step](case, folder)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        step_s = steps()
        return Measured(torch.cuda.max_memory_reserved() - before, step_s)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step_s = steps()
    return Measured(_status("VmHWM") - before, step_s)


def _now() -> float:
    """The current time after synchronising the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def _status(key: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) * 1024


def _touched(model: Any) -> None:
    """Read every weight, since memory-mapped weights only become resident when read."""
    for weight in model.parameters():
        weight.detach().sum()


def _ids(length: int) -> tuple[int, ...]:
    return tuple(3 + place % 250 for place in range(length))


def _inputs(step: str, case: Case, folder: Path, **more: Any) -> StepInputs:
    others: dict[str, Any] = {"data": Data(sft=()), **more}
    return StepInputs(
        step=step,
        folder=StepFolder(folder / step),
        identity={},
        fingerprint="",
        run=Run(dir=str(folder)),
        base=base_of(case, folder),
        tuning=tuning_of(case),
        tracking=Tracking(mode="off"),
        **others,
    )


def _open_sft(case: Case, folder: Path) -> Steps:
    from llamachat.data.packing import collate_packed, collate_padded
    from llamachat.models.loading import attach_adapter, load_base
    from llamachat.models.sequence_attention import use_sequence_attention
    from llamachat.models.start_checks import proved_start
    from sft.examples import Examples
    from sft.tuning import Tuning

    base, tuning, config = base_of(case, folder), tuning_of(case), sft_config(case)
    model: Any = load_base(base, device="auto", is_nf4=case.method == "qlora")
    if case.method != "full":
        model = attach_adapter(model, tuning, seed=0)
    if model.device.type == "cpu":
        use_sequence_attention(model, trains_together=True)
    _touched(model)
    chat_format = proved_start(base, tuning, None)[1]
    dialog = TokenizedExample(_ids(case.tokens), (True,) * case.tokens)

    def collate(numbers: Any) -> dict[str, torch.Tensor]:
        if case.rows == 1:
            return collate_packed([dialog])
        return collate_padded([dialog] * len(numbers), rows=case.rows)

    plan = StepPlan(
        rows=[(0,)] * (STEPS * MICROBATCHES * case.rows),
        num_steps=STEPS,
        rows_per_step=MICROBATCHES * case.rows,
        rows_per_microbatch=case.rows,
        world_size=1,
        tokens_per_step=(0,) * STEPS,
    )
    inputs = _inputs("sft", case, folder)
    training = Tuning(config, inputs, model, chat_format, Examples([dialog], [], [], {}), plan)
    return lambda: _train(training, collate)


def _train(training: "Training", collate: "Collate") -> float:
    """Run all steps without evaluations or checkpoints; return the seconds of the last one."""
    from llamachat.models.start_checks import fast_tokenizer
    from llamachat.training.trainer import Watch, collator, row_numbers, trainer_arguments

    ends: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        arguments = trainer_arguments(
            training.config, training.plan, folder=place, seed=0, log_every=1, save_every=10**6
        )
        training.trainer(
            arguments | {"save_strategy": "no"},
            data_collator=collator(collate),
            train_dataset=row_numbers(len(training.plan.rows)),
            processing_class=fast_tokenizer(training.chat_format, place),
            checkpoints=place / "checkpoints",
            before_save=lambda: None,
            watch=Watch(
                [0] * STEPS, names=training.names, on_log=lambda *_: None, on_step=lambda _: ends.append(_now())
            ),
        ).train()
    return ends[-1] - ends[-2]


def _open_reward(case: Case, folder: Path) -> Steps:
    from llamachat.models.reward_model import build_reward_model
    from llamachat.models.sequence_attention import use_sequence_attention
    from reward.batches import plan_batches
    from reward.pairs import Examples
    from reward.ranking import Ranking

    config = reward_config(case)
    start = build_reward_model(base_of(case, folder), tuning_of(case), policy=None, seed=0, device="auto")
    if start.device.type == "cpu":
        use_sequence_attention(start.model, trains_together=True)
    _touched(start.model)
    ids = _ids(case.tokens)
    text = Message("assistant", "Nothing of it is read here.")
    pair = PairExample(
        chosen=ids,
        rejected=ids[::-1],
        margin=0.0,
        chosen_tokens=len(ids),
        rejected_tokens=len(ids),
        preference=Preference(prompt=(), chosen=text, rejected=text),
        domain="helpfulness",
        source="",
    )
    batches = plan_batches(
        [pair] * (STEPS * MICROBATCHES),
        [],
        pairs_per_step=MICROBATCHES,
        epochs=1,
        seed=0,
        row_tokens=2 * case.tokens,
        has_pair_labels=False,
    )

    examples = Examples(train=[pair], labels=[], validation=[], test=[], dialogs=[], test_labels=[], dropped={})
    training = Ranking(config, "rm/helpfulness", "helpfulness", start.model, start.chat_format, examples, batches)
    return lambda: _train(training, batches.collate)


def _open_rollout(case: Case, folder: Path) -> Steps:
    from llamachat.models.loading import attach_adapter, load_base
    from llamachat.rollout.decoder import LlamaEngine
    from llamachat.rollout.engine import Sampling

    model: Any = load_base(base_of(case, folder), device="auto", is_nf4=case.method == "qlora").eval()
    if case.method != "full":
        model = attach_adapter(model, tuning_of(case), seed=0).eval()
    model.requires_grad_(False)  # as in a bank without trained roles
    _touched(model)
    prompts = [_ids(case.tokens)] * case.rows
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=case.new_tokens, seed=0)

    def run() -> float:
        started = _now()
        LlamaEngine(model, ()).generate(prompts, samples_per_prompt=1, sampling=sampling)
        return _now() - started

    return run


def _open_ppo(case: Case, folder: Path) -> Steps:
    inputs = _inputs(
        "ppo",
        case,
        folder,
        data=PROMPTS,
        rollout=rollout_of(case),
        scoring=Scoring(combine="single", helpfulness=str(folder / "reward")),
    )
    return open_iterations(ppo_config(case), inputs, prompt_tokens=case.tokens)


def open_iterations(config: PpoConfig, inputs: StepInputs, *, prompt_tokens: int) -> Steps:
    """Return a function that runs `STEPS` PPO iterations on prompts of this length with answers of maximum length."""
    from llamachat.rollout.decoder import LlamaEngine
    from llamachat.tracking.tracker import open_record
    from ppo.session import open_ppo
    from ppo.train import start_or_resume

    session = open_ppo(config, inputs)
    prompts = session.prompts
    sides = {
        side: [replace(prompt, ids=_ids(prompt_tokens)) for prompt in getattr(prompts, side)[:4]]
        for side in ("train", "validation", "test")
    }
    # The engine is created within the measurement, without stop tokens.
    session = replace(session, prompts=replace(prompts, **sides), engine=cast(Any, None))
    for module in session.bank._modules():
        _touched(module)

    def run() -> float:
        tracker = open_record(inputs, "ppo", resume_step=None)
        engine = LlamaEngine(session.bank.policy_model(), ())
        training = start_or_resume(config, replace(session, engine=engine), tracker.__enter__(), None, "")
        figures: dict[str, float] = {}
        for _ in range(STEPS):
            figures = training.iterate()
            training.state.iteration += 1
        return figures["time/step_s"]

    return run


_OPEN: dict[str, Callable[[Case, Path], Steps]] = {
    "sft": _open_sft,
    "rm": _open_reward,
    "rollout": _open_rollout,
    "ppo": _open_ppo,
}


def main() -> None:
    logging.disable(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    request = json.loads(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr
    case, folders = Case(**request["case"]), [Path(folder) for folder in request["folders"]]
    *toys, folder = folders
    for toy in toys:
        measured(case, toy)
    print(json.dumps(measured(case, folder).grown), file=answers, flush=True)


if __name__ == "__main__":
    main()
