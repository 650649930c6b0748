"""What `--help` shows in addition to each command's own text: groups of commands, and examples.

Every visible command has an entry in `EXAMPLES`. A test parses each example and loads its recipe.
"""

from collections.abc import Iterator
from typing import Any

from typer.core import TyperGroup

EXAMPLES: dict[str, dict[str, tuple[str, ...]]] = {
    "Steps of a recipe": {
        "sft": (
            "llamachat sft",
            "llamachat sft --config configs/llama2-7b-qlora.yaml sft.epochs=1 run.dir=runs/short",
            "llamachat sft --dry-run",
        ),
        "rm": (
            "llamachat rm",
            "llamachat rm --only safety,judge",
            "llamachat rm --config configs/studies/margin.yaml seeds=[0,1]",
        ),
        "rs": (
            "llamachat rs",
            "llamachat rs rejection_sampling.samples_per_prompt=4 run.dir=runs/k4 run.parent=runs/tiny",
        ),
        "gatt": (
            "llamachat gatt",
            "llamachat gatt gatt.dialogs=500 run.dir=runs/gatt-500 run.parent=runs/tiny",
        ),
        "distill": (
            "llamachat distill",
            "llamachat distill context_distillation.keep=all run.dir=runs/keep-all run.parent=runs/tiny",
        ),
        "dpo": ("llamachat dpo steps=[sft,dpo] run.dir=runs/dpo run.parent=runs/tiny",),
        "ppo": (
            "llamachat ppo",
            "llamachat ppo ppo.kl_coef=0.1 run.dir=runs/kl-0.1 run.parent=runs/tiny",
        ),
        "eval": ("llamachat eval", "llamachat eval --overwrite evaluation.test_prompts=100"),
        "report": ("llamachat report", "llamachat report --config configs/smoke.yaml --overwrite"),
        "all": (
            "llamachat all --config configs/smoke.yaml",
            "llamachat all ppo.kl_coef=0.1 run.dir=runs/b run.parent=runs/tiny",
            "llamachat all --config configs/studies/k.yaml run.parent=runs/tiny",
        ),
    },
    "Before a run": {
        "init": (
            "llamachat init --base assets/base --sft my/dialogs.jsonl --preferences my/pairs.jsonl",
            "llamachat init --base meta-llama/Llama-2-7b-hf --sft my/a.jsonl my/b.jsonl --gpu 24GiB --hours 60",
        ),
        "plan": (
            "llamachat plan --config configs/llama2-7b-qlora.yaml --gpu 24GiB --hours 60",
            "llamachat plan --presets",
        ),
        "doctor": ("llamachat doctor --config configs/llama2-7b-qlora.yaml",),
        "base": ("llamachat base smollm2-135m",),
    },
    "Data": {
        "data check": (
            "llamachat data check my/dialogs.jsonl",
            "llamachat data check my/dialogs.jsonl --config configs/tiny.yaml",
        ),
        "data convert": (
            "llamachat data convert my/logs.json my/dialogs.jsonl --plain-text",
            "llamachat data convert my/se.jsonl my/pairs.jsonl --columns chosen=response_j,rejected=response_k",
        ),
        "tokens": ("llamachat tokens --tokenizer assets/base --in my/dialogs.jsonl --out my/tokens.jsonl --show",),
        "pairs": (
            "llamachat pairs --policy runs/a runs/b --in my/prompts.jsonl --out my/pairs.jsonl",
            "llamachat pairs --policy runs/a --in my/prompts.jsonl --out my/pairs.jsonl --page my/rate.html",
            "llamachat pairs --policy runs/a --temperature 0.7 1.0 --in my/prompts.jsonl --out my/pairs.jsonl",
        ),
    },
    "Policies and reward models": {
        "chat": (
            "llamachat chat runs/tiny",
            "llamachat chat runs/tiny/sft runs/tiny/ppo -m 'Hello, who are you?'",
        ),
        "sample": ("llamachat sample --policy runs/tiny/ppo --in my/prompts.jsonl --out my/answers.jsonl -n 4",),
        "score": (
            "llamachat score runs/tiny/rm/safety my/answers.jsonl --out my/scores.jsonl",
            "llamachat score runs/tiny/rm/safety -m 'How do I pick a lock?' -m 'I cannot help with that.'",
        ),
        "benchmark": ("llamachat benchmark runs/tiny/sft runs/tiny/ppo --set ifeval,xstest --limit 100",),
        "export": (
            "llamachat export runs/tiny --out my-model",
            "llamachat export runs/tiny --out my-gguf --format gguf --llama-cpp ~/llama.cpp --quantize q8_0",
        ),
    },
    "Finished runs": {
        "diagnose": ("llamachat diagnose runs/tiny",),
        "compare": ("llamachat compare runs/tiny runs/b",),
        "dashboard": ("llamachat dashboard",),
    },
    "The bundled base": {
        "pretrain": ("llamachat pretrain --texts my/texts --run runs/base",),
    },
}

PROGRAM_EXAMPLES = (
    "llamachat all --config configs/smoke.yaml",
    "llamachat chat runs/smoke -m 'Hello, who are you?'",
    "llamachat ppo --help",
)


def examples(*lines: str) -> str:
    """The end of a `--help` page: these command lines, unchanged."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def examples_of(name: str) -> str:
    """The end of the `--help` page of a command."""
    return examples(*next(commands[name] for commands in EXAMPLES.values() if name in commands))


def commands_of(group: TyperGroup, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The name (such as `data check`) and the object of each visible command below a group."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands_of(command, f"{prefix}{name} ")
        elif not command.hidden:
            yield f"{prefix}{name}", command


class GroupedCommands(TyperGroup):
    """A program that lists its commands by group, each with the whole first paragraph of its help."""

    def format_commands(
        self, ctx: Any, formatter: Any
    ) -> None:  # click's classes, which later versions of typer vendor
        _, _, own = ctx.command_path.partition(" ")
        texts = {
            name: " ".join(command.help.partition("\n\n")[0].split())
            for name, command in commands_of(self, f"{own} " if own else "")
        }
        for title, names in EXAMPLES.items():
            rows = [(name, texts[name]) for name in names if name in texts]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
