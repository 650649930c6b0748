"""data/sft: dialogs for supervised fine-tuning, one file per kind."""

from pathlib import Path

from tools.cutting import chat, constraints, instructions
from tools.cutting.choosing import Dialog, chosen, dialog_of, text_of, turns_of
from tools.cutting.safety import demonstrations

_ASSISTANT = (
    "You are Llamachat, a helpful assistant.",
    "You are a helpful assistant.",
    "You are Llamachat, a friendly assistant made by the llamachat project.",
    "You are a friendly and honest assistant. Answer in a few words.",
)


def _some(dialogs: list[Dialog], count: int) -> list[Dialog]:
    return chosen(dialogs, count, key=text_of, salt="sft")


def _left(dialogs: list[Dialog], used: list[Dialog]) -> list[Dialog]:
    """Dialogs whose opening differs from all used ones."""
    openings = {turns_of(dialog)[0] for dialog in used}
    return [dialog for dialog in dialogs if turns_of(dialog)[0] not in openings]


def sft(root: Path) -> dict[str, list[dict]]:
    """File name -> records."""
    spoken, ordered, tasks = chat.self_dialogue(root), chat.taskmaster(root), chat.schema_guided(root)
    talk = chat.topical_chat(root) + _some(spoken, 850) + _some(ordered, 160) + _some(tasks, 300)
    short = chat.chatterbot(root)
    all_identity = chat.identity(root)
    who = [dialog for dialog in all_identity if chat.is_about_identity(dialog)]
    identity = who + _some([dialog for dialog in all_identity if dialog not in who], 190)
    questions = instructions.dolly(root) + instructions.self_instruct(root) + instructions.oasst(root)
    questions += _some(instructions.fairytale(root), 420) + _some(instructions.gsm8k(root), 120)
    personas, plays = instructions.role_play(root)
    plays = _some(plays, 350)
    personas = _some(personas, 520)
    pool = _left(spoken, talk) + _left(tasks, talk)[:500] + _some(short, 250) + _some(who, 120)
    pool = [dialog for dialog in pool if len(dialog) <= 6] + [
        dialog for dialog in instructions.dolly(root) if len(text_of(dialog)) < 700
    ]
    system = personas + instructions.introduced(personas, 130) + constraints.constrained_dialogs(pool, 1050)
    system += [
        dialog_of(turns_of(dialog), system=_ASSISTANT[index % len(_ASSISTANT)])
        for index, dialog in enumerate(_some(who, 60) + _some(short, 60) + _some(questions, 60))
    ]
    files = {"chat": talk, "short_answers": short, "identity": identity, "questions": questions, "role_play": plays,
             "system": system}  # fmt: skip
    records = {
        name: [{"messages": dialog} for dialog in _some(dialogs, len(dialogs))] for name, dialogs in files.items()
    }
    return {**records, "safety": demonstrations(root)}
