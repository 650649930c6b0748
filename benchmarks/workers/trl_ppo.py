"""TRL 1.12.0's `PPOTrainer` in its own process: one iteration for each line of JSON on standard input.

Started by `benchmarks/ppo.py`, with TRL 1.12.0 before the installed TRL on the path. A line requests an iteration:
{"policy", "reward", "prompts": [[ids]], "response_tokens", "stops", "batch_rows"}; the reply is a line with seconds,
response tokens, and the memory peak of this process above its imports, in MiB.
"""

import json
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def iteration(request: dict[str, Any]) -> dict[str, float]:
    """Run one PPO iteration with TRL; only `train()` is timed, not the creation of models and trainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # pyright: ignore[reportMissingImports]

    def model(auto: Any, folder: str, **more: Any) -> Any:
        return auto.from_pretrained(folder, dtype=torch.bfloat16, **more)

    tokenizer = AutoTokenizer.from_pretrained(request["policy"], padding_side="left")
    tokenizer.pad_token = "<unk>"
    rows, prompts = request["batch_rows"], request["prompts"]
    counted: list[int] = []
    truncate = ppo_trainer.truncate_response

    def counting(stop: int, pad: int, responses: Any) -> Any:
        kept = truncate(stop, pad, responses)
        counted.append(int((kept != pad).sum()))
        return kept

    ppo_trainer.truncate_response = counting
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=len(prompts) // rows,
            num_mini_batches=2,
            num_ppo_epochs=1,
            total_episodes=len(prompts),
            local_rollout_forward_batch_size=rows,
            response_length=request["response_tokens"],
            stop_token="eos" if request["stops"] else None,
            temperature=1.0,
            num_sample_generations=0,
            learning_rate=1e-6,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=model(AutoModelForCausalLM, request["policy"]),
            ref_model=model(AutoModelForCausalLM, request["policy"]),
            reward_model=model(AutoModelForSequenceClassification, request["reward"], num_labels=1),
            value_model=model(AutoModelForSequenceClassification, request["reward"], num_labels=1),
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    tokens = sum(counted) if request["stops"] else len(prompts) * request["response_tokens"]
    ppo_trainer.truncate_response = truncate
    return {"seconds": seconds, "tokens": tokens}


def main() -> None:
    answers = sys.stdout
    with redirect_stdout(sys.stderr):
        import torch
        import trl
        from trl.experimental.ppo import PPOTrainer  # noqa: F401  # pyright: ignore[reportMissingImports]

        torch.manual_seed(0)
        assert trl.__version__ == "1.12.0", trl.__version__
        imported = memory("VmRSS")
        for line in sys.stdin:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            result = iteration(json.loads(line))
            print(json.dumps(result | {"mib": memory("VmHWM") - imported}), file=answers, flush=True)


if __name__ == "__main__":
    main()
