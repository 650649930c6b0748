"""Compare a PPO iteration's speed and memory with TRL's last `PPOTrainer`: `python benchmarks/ppo.py --run runs/tiny`.

Ours has policy, reference, critic and two reward models; TRL 1.12.0 (the last release with PPO) has the first three
and one reward model. Both use the same starting policy and prompts, bf16, full fine-tuning, two optimizer steps and no
checkpointing. There are two workloads: fixed (prompts and answers of 64 tokens, no stop) and natural (the bundled
prompts, up to 256 tokens, stopped by EOS). Rounds alternate between the two, each in its own process; `--processes 2`
divides ours as a step divides itself over two cores (`run.processes`), where TRL keeps one process with two threads.
Prints end-to-end response tokens per second, medians of the rounds' ratios, and the memory peak above the imports of
each side's processes. TRL is installed into a cache folder with pip.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.workers.processes import Worker

ROOT = Path(__file__).resolve().parents[1]
TRL = "trl==1.12.0"
RESPONSES = 64


@dataclass(slots=True)
class Load:
    """A workload: prompts and the lengths of answers."""

    name: str
    response_tokens: int
    prompt_tokens: int | None  # None: the recipe's prompts unchanged
    rates: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "TRL": []})
    mib: dict[str, float] = field(default_factory=lambda: {"ours": 0.0, "TRL": 0.0})

    @property
    def stops(self) -> bool:
        return self.prompt_tokens is None


def trl_folder() -> Path:
    """The folder of TRL 1.12.0, installed by pip on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "llamachat-benchmarks" / TRL.replace("==", "-")
    if not (folder / "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), TRL]
        subprocess.run(command, check=True)
    return folder


def ours() -> None:
    """The other side of `Worker`: run one of our iterations for each line, all with the same workload."""
    from benchmarks.workers.trl_ppo import memory
    from llamachat import distributed

    import_all()
    logging.disable(logging.WARNING)
    imported = memory("VmRSS")
    answers, sys.stdout = sys.stdout, sys.stderr
    training: Any = None
    with distributed.opened(), tempfile.TemporaryDirectory() as scratch:
        scratch = distributed.broadcast_object(scratch)
        for line in sys.stdin:
            training = training or open_ours(json.loads(line), Path(scratch))
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            prompts = training.session.prompts.batch(training.state.iteration, count=RESPONSES, seed=0)
            began = time.perf_counter()
            figures = training.iterate()
            seconds = time.perf_counter() - began
            training.state.iteration += 1
            answer = {
                "seconds": seconds,
                "tokens": figures["throughput/rollout_tokens_per_s"] * figures["time/rollout_s"],
                "prompts": [list(prompt.ids) for prompt in prompts],
                "mib": memory("VmHWM") - imported,
                "split": [figures[f"time/{part}_s"] for part in ("rollout", "score", "update")],
            }
            print(json.dumps(answer), file=answers, flush=True)


def import_all() -> None:
    """Import everything an iteration needs, so that its memory counts as imports."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import ppo.train  # noqa: F401


def open_ours(request: dict[str, Any], scratch: Path) -> Any:
    """A PPO training with the run's policy and reward models, in its own folder."""
    from llamachat.config.sections import Base, Data, DataSource, Rollout, Run, Scoring, Split, Tracking, Tuning
    from llamachat.rollout.decoder import LlamaEngine
    from llamachat.runs.artifacts import StepFolder, read_artifact
    from llamachat.runs.inputs import StepInputs
    from llamachat.tracking.tracker import open_record
    from ppo.config import Config
    from ppo.session import open_ppo
    from ppo.train import start_or_resume

    def sources(folder: str) -> tuple[DataSource, ...]:
        return tuple(DataSource(path=str(path)) for path in sorted((ROOT / "data" / folder).glob("*.jsonl.gz")))

    config = Config(
        responses_per_iteration=RESPONSES,
        responses_per_minibatch=RESPONSES // 2,
        critic=request["critic"],
        validation_prompts=8,
        test_prompts=8,
    )
    run = Path(request["run"])
    inputs = StepInputs(
        step="ppo",
        folder=StepFolder(scratch / "ppo"),
        identity={},
        fingerprint="",
        run=Run(dir=request["run"]),
        base=Base(model=str(ROOT / "assets" / "base"), attention="eager", max_tokens=1024),
        tuning=Tuning(method="full"),
        data=Data(
            sft=(),
            prompts=sources("prompts"),
            adversarial=sources("adversarial"),
            split=Split(test=0.2, validation=0.05, judge=0.1),
        ),
        rollout=Rollout(max_new_tokens=request["response_tokens"]),
        scoring=Scoring(),
        tracking=Tracking(mode="off"),
        policy=read_artifact(run / "sft", "policy"),
        reward_models={which: read_artifact(run / "rm" / which, "reward_model") for which in ("helpfulness", "safety")},
    )
    session = open_ppo(config, inputs)
    if request["prompt_tokens"]:
        session = replace(session, prompts=fixed_prompts(session.prompts, request["prompt_tokens"]))
    tracker = open_record(inputs, "ppo", resume_step=None)
    training = start_or_resume(config, session, tracker.__enter__(), None, "")
    if request["prompt_tokens"]:
        training.session = replace(session, engine=LlamaEngine(session.bank.policy_model(), ()))  # no stop tokens
    return training


def fixed_prompts(prompts: Any, length: int) -> Any:
    """The prompts repeated or truncated to `length` tokens each."""
    train = [replace(prompt, ids=(prompt.ids * length)[:length]) for prompt in prompts.train]
    return replace(prompts, train=train)


def main() -> None:
    parser = argparse.ArgumentParser(description="A PPO iteration of ours against TRL 1.12.0's.")
    parser.add_argument("--run", default="runs/tiny", help="Run with a policy and reward models (`make sft rm`).")
    parser.add_argument("--critic", default="separate", choices=("separate", "shared"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--processes", type=int, default=1, help="Processes that share our iteration.")
    parser.add_argument("--batch-rows", type=int, default=32, help="TRL's rows in one pass.")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        ours()
        return
    policy, reward = (Path(options.run) / step / "artifact" for step in ("sft", "rm/helpfulness"))
    if not (policy.is_dir() and reward.is_dir()):
        print(f"{options.run}: no policy and reward models there. Run `make sft rm` first, or name --run.")
        return
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONPATH": str(ROOT)}
    trl_environment = environment | {"PYTHONPATH": f"{trl_folder()}:{ROOT}"}
    loads = [Load("fixed, 64 + 64 tokens", 64, 64), Load("natural stops, up to 256", 256, None)]
    for load in loads:
        # Not run as a file: its folder would come first on the path and hide the package `ppo`.
        mine = Worker([sys.executable, "-m", "benchmarks.ppo", "--worker"], environment, options.processes)
        trl = Worker([sys.executable, str(ROOT / "benchmarks" / "workers" / "trl_ppo.py")], trl_environment)
        split: list[list[float]] = []
        for number in range(options.rounds + 1):
            request = {
                "run": options.run,
                "critic": options.critic,
                "response_tokens": load.response_tokens,
                "prompt_tokens": load.prompt_tokens,
            }
            own, *others = mine.ask(request)
            own["mib"] += sum(answer["mib"] for answer in others)
            (other,) = trl.ask(
                {
                    "policy": str(policy),
                    "reward": str(reward),
                    "prompts": own["prompts"],
                    "response_tokens": load.response_tokens,
                    "stops": load.stops,
                    "batch_rows": options.batch_rows,
                }
            )
            for name, answer in (("ours", own), ("TRL", other)):
                load.mib[name] = max(load.mib[name], answer["mib"])
                if number:  # skip the first round, which selects kernels and allocates memory
                    load.rates[name].append(answer["tokens"] / answer["seconds"])
            if number:
                split.append(own["split"])
        mine.kill()
        trl.kill()
        print(report(load, split), flush=True)


def report(load: Load, split: list[list[float]]) -> str:
    """Rates, the median of the rounds' ratios, memory, and a breakdown of our time."""
    mine, theirs = load.rates["ours"], load.rates["TRL"]
    ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    whole = [sum(parts) for parts in zip(*split, strict=True)]
    shares = ", ".join(
        f"{name} {part / sum(whole):.0%}" for name, part in zip(("rollout", "score", "update"), whole, strict=True)
    )
    return (
        f"{load.name}: ours {statistics.median(mine):.0f} response tokens/s ({shares}), TRL {statistics.median(theirs):.0f}; "
        f"median ratio {ratio:.2f} ({min(map(float.__truediv__, mine, theirs)):.2f} to "
        f"{max(map(float.__truediv__, mine, theirs)):.2f}); peak above imports {load.mib['ours']:.0f} and "
        f"{load.mib['TRL']:.0f} MiB, {load.mib['ours'] / load.mib['TRL']:.2f}x"
    )


if __name__ == "__main__":
    main()
