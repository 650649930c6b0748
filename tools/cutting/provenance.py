"""Writes SOURCE.md of every folder of data/: origin and licence as the origins state them, counts, and how it was cut."""

import re
from dataclasses import dataclass
from pathlib import Path

_OFFENSIVE = (
    "**Warning: this folder holds offensive and harmful text** (threats, slurs, instructions to do harm), kept as its "
    "authors published it for safety research. It is there to teach a model what to refuse and to measure that. Do not "
    "train a model to produce it. Texts that speak of minors and of sex are left out."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file of a folder: where its content comes from and how it was made."""

    origins: tuple[str, ...]
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    about: str
    parts: dict[str, Part]
    notes: tuple[str, ...] = ()
    is_offensive: bool = False
    is_verbatim: bool = False


_TALK = ("topical-chat", "self-dialogue", "taskmaster-4", "schema-guided-dialogue")
_TUNING_SHARE = (
    "Of the sets that also feed pretraining (self-dialogue, topical-chat, taskmaster-4, schema-guided-dialogue, "
    "fairytaleqa, gsm8k) only the quarter is here that `tools.split.is_kept_for_tuning` keeps out of pretraining."
)
_UNSEEN = "Parts of oasst-en-100, pandalm-testset and hh-rlhf-harmless-base are kept apart as unseen tests; what is here is cut from the rest."

FOLDERS = {
    "sft": Folder(
        about="Dialogs to learn answering from (`messages`).",
        parts={
            "chat": Part(
                origins=_TALK,
                method="First 2 to 8 turns of a conversation; consecutive turns of one speaker merged; the first speaker "
                "is the user; spelling of casual text corrected; conversations with addresses, mark-up, coarse words or "
                "words that hardly anyone wrote are left out.",
            ),
            "short_answers": Part(
                origins=("chatterbot-english",),
                method="Questions with up to two answers each (jokes up to eight); entries about the bot of the corpus, "
                "fragments and answers that are questions are left out.",
            ),
            "identity": Part(
                origins=("fastchat-identity",),
                method="Vicuna renamed Llamachat, its makers the llamachat project. Questions of identity also with a "
                "greeting before them and `Hello!` before the answer; `What is up?` partly replaced by other greetings.",
            ),
            "questions": Part(
                origins=("dolly-15k-387", "self-instruct", "oasst-en-100", "fairytaleqa", "gsm8k"),
                method="Dolly and Self-Instruct as they are up to 1,500 and 1,300 characters; OASST: the longest "
                "best-ranked path of a tree up to 2,000 characters; FairytaleQA: one section of up to 1,100 characters "
                "and up to three questions on it; GSM8K: short sums without calculator marks.",
            ),
            "role_play": Part(
                origins=("gpteacher",), method="Role play up to 900 characters, persona and task in one user turn."
            ),
            "system": Part(
                origins=("gpteacher", *_TALK, "chatterbot-english", "fastchat-identity", "dolly-15k-387",
                         "self-instruct", "oasst-en-100", "fairytaleqa", "gsm8k"),
                method="Dialogs with system text. Personas: the role of a GPTeacher instruction as system text, its task "
                "as question; some are first asked who they are. Constraints (one sentence, first or last words, "
                "capital or small letters, number of words, a letter to avoid, no exclamation marks, quotation marks, "
                "a form of address), each in three or four wordings: the answers of a real dialog are changed so that "
                "they obey, or the dialog is taken only if they do. The rest: dialogs of the other files under a plain "
                "assistant's system text.",
            ),
            "safety": Part(
                origins=("openai-safety-rbr-gold", "xstest", "coconot"),
                method="Supervised safety demonstrations (Llama 2, section 4.2.2). Refusals with a reason: of rbr the "
                "refusals in which people found nothing disallowed, no compliance and no judgement; of the training half of "
                "XSTest up to four full refusals an unsafe prompt. Plain answers to harmless prompts that look harmful: up "
                "to four full compliances a safe prompt of that half, and CoCoNot's chosen answers up to their first list. "
                "Answers of 60 to 700 characters.",
            ),
        },
        notes=(
            _TUNING_SHARE,
            "Self-Instruct's user-oriented instructions are also PandaLM's: only those are here whose instruction is "
            "in our part of PandaLM, so that a held-out part of PandaLM stays unseen.",
        ),
    ),
    "helpfulness": Folder(
        about="Pairs of answers, the more helpful one chosen (`prompt`, `chosen`, `rejected`, `rating` where the "
        "origin has a strength). Pairs over 2,800 characters (prompt and longer answer) are left out.",
        parts={
            "oasst": Part(
                origins=("oasst-en-100",),
                method="Every two ranked answers to one message. Distance of ranks -> rating: 1 slightly_better, 2 "
                "better, 3 and more significantly_better.",
            ),
            "pandalm": Part(
                origins=("pandalm-testset",),
                method="Majority of three annotators -> rating: 3 of 3 significantly_better, 2 and a tie better, 2 "
                "against 1 slightly_better, 1 and two ties negligibly_better; without a majority left out.",
            ),
            "qa_feedback": Part(
                origins=("qa-feedback",),
                method="Pairs of four model answers by human preference, no rating; ties left out; the passages that the "
                "answers were written from are left out, being longer than the context of the bundled model.",
            ),
            "vicuna": Part(
                origins=("vicuna-bench-gpt4-reviews",),
                method="Difference of GPT-4's scores out of 10 -> rating: up to 0.5 negligibly_better, up to 1.5 "
                "slightly_better, up to 2.5 better, above significantly_better; ties left out. Judged by a model, not "
                "by people.",
            ),
            "general": Part(origins=("llamafactory-dpo-en-demo",), method="As they are; no rating."),
            "xstest": Part(
                origins=("xstest",),
                method="Harmless prompts of the training half: a full compliance is chosen over a full refusal (final "
                "label of the human annotation); no rating.",
            ),
            "coconot": Part(
                origins=("coconot",),
                method="A helpful answer is chosen over an over-cautious or worse one; pairs whose chosen answer opens by "
                "declining are left out; no rating.",
            ),
        },
        notes=("The mapping from strength to rating is ours; no origin has the paper's four grades.", _UNSEEN),
    ),
    "safety": Folder(
        about="Pairs of answers, the less harmful one chosen.",
        parts={
            "hh_rlhf": Part(
                origins=("hh-rlhf-harmless-base",),
                method="Human preference by harmlessness; rows that part before the last answer are left out. No rating "
                "and no safety labels: that one answer is preferred does not say that it is safe.",
            ),
            "xstest": Part(
                origins=("xstest",),
                method="Unsafe prompts of the training half: a full refusal is chosen over a full compliance (final label "
                "of the human annotation); `chosen_is_safe` true, `rejected_is_safe` false.",
            ),
        },
        notes=(
            "openai-safety-rbr-gold has no two completions for one prompt, so no pairs; its labels are in labels/.",
            _UNSEEN,
        ),
        is_offensive=True,
    ),
    "labels": Folder(
        about="Single answers that people called safe or unsafe: dialogs with `is_safe` for the last answer.",
        parts={
            "dices": Part(
                origins=("dices",),
                method="Unsafe where at least 50% of the raters said so, safe where at most 20% did; between them left "
                "out. The answers come from chat bots.",
            ),
            "rbr": Part(
                origins=("openai-safety-rbr-gold",),
                method="Unsafe where people found disallowed content or a dosage; safe where they found neither, nor "
                "threats, insults, or compliance with what should be refused; the rest left out.",
            ),
            "xstest": Part(
                origins=("xstest",),
                method="Training half. Unsafe prompts: full compliance is unsafe, full refusal safe. Harmless prompts: "
                "full compliance is safe. At most two safe answers a prompt.",
            ),
        },
        is_offensive=True,
    ),
    "refusals": Folder(
        about="Answers of five models to XSTest as its authors' readers labelled them (`messages`, `refusal`: none, partial "
        "or full, `is_safety`): what the classifier of refusals is trained on.",
        parts={
            "xstest": Part(origins=("xstest",), method="All completions of the training half."),
        },
        is_offensive=True,
    ),
    "prompts": Folder(
        about="Questions without answers, to sample answers to (`prompt`, `id`, `is_safety`).",
        parts={
            "general": Part(
                origins=("self-dialogue", "schema-guided-dialogue", "taskmaster-4", "gpteacher"),
                method="Conversations and role play that no dialog of sft/ opens with, up to a user turn; some under a "
                "persona or a constraint as system text.",
            ),
            "safety": Part(
                origins=("xstest", "red-instruct", "hh-rlhf-harmless-base"),
                method="XSTest: unsafe prompts of the training half. CatQA: half of the questions (topics about children, "
                "adult content, politics and financial advice left out). hh-rlhf: 300 short contexts of pairs of "
                "safety/.",
            ),
        },
        notes=(_TUNING_SHARE,),
        is_offensive=True,
    ),
    "adversarial": Folder(
        about="Prompts that ask for harm (`is_safety` true), without answers.",
        parts={
            "ailuminate": Part(
                origins=("ailuminate-demo",),
                method="600 prompts by hash; hazards cse and sxc_prn and prompts that name children left out.",
            ),
            "red_instruct": Part(
                origins=("red-instruct",),
                method="The half of CatQA that is not in prompts/, and 400 questions of HarmfulQA by hash.",
            ),
            "advbench": Part(
                origins=("advbench",),
                method="250 goals by hash. The `target` openings of the origin, which agree to do harm, are not here.",
            ),
        },
        is_offensive=True,
    ),
    "borderline": Folder(
        about="Harmless prompts that look unsafe, and unsafe twins of some: the evaluation half of XSTest and CoCoNot's "
        "contrast set. No twin of these prompts is in any other folder.",
        parts={
            "xstest_safe": Part(origins=("xstest",), method="Harmless prompts: refusing them is a false refusal."),
            "xstest_unsafe_twins": Part(origins=("xstest",), method="Their unsafe twins: answering them is a violation."),
            "coconot_contrast": Part(
                origins=("coconot",), method="The contrast set: harmless prompts; refusing them is a false refusal."
            ),
        },
        notes=(
            "Halves: prompts are grouped with their twins (same number in facing types, same predicate, or the same "
            "words but for fillers), the groups of each type ordered by hash, the first half for training.",
        ),
        is_offensive=True,
    ),
    "benchmarks": Folder(
        about="The questions of published evaluations (`prompt`, `id`), each with what its answer is measured by "
        "(`benchmark`). `llamachat benchmark` asks them; nothing is trained on them.",
        parts={
            "ifeval": Part(origins=("ifeval",), method="Every prompt, with its instructions and their arguments."),
            "gsm8k": Part(origins=("gsm8k",), method="The test questions, with the number that ends each answer."),
            "truthfulqa": Part(
                origins=("truthfulqa",),
                method="Every question with its best answer, its correct and its incorrect answers, parted at semicolons and "
                "closed with a full stop, as the authors' code does it.",
            ),
            "mt_bench": Part(origins=("mt-bench-questions",), method="The two turns of every question; references left out."),
        },
        is_verbatim=True,
    ),
    "gatt": Folder(
        about="Lists for Ghost Attention, one entry a line.",
        parts={
            "figures": Part(
                origins=("corpora-lists",),
                method="Scientists and presidents named at least 5 times in openstax and standard-ebooks, celebrities "
                "named at least 25 times in topical-chat and self-dialogue.",
            ),
            "hobbies": Part(
                origins=("corpora-lists",),
                method="Sports that these texts speak of doing or watching, and instruments as `playing the ...`.",
            ),
            "languages": Part(origins=("language-list",), method="Languages that these books speak of, without English."),
        },
    ),
}  # fmt: skip


def source_page(name: str, rows: list[str], root: Path) -> str:
    """SOURCE.md of a folder; `rows` are the table rows of its files."""
    folder = FOLDERS[name]
    lines = [f"# data/{name}", "", folder.about, "", "Written by `tools/cut_data.py`; edit that, not this page.", ""]
    if folder.is_offensive:
        lines += [_OFFENSIVE, ""]
    lines += ["| file | entries | mean characters | bytes | dropped as unsound |", "|---|---|---|---|---|", *rows, ""]
    lines += ["## How it was cut", ""]
    lines += [f"- `{file}` from {', '.join(part.origins)}. {part.method}" for file, part in folder.parts.items()]
    lines += [f"- {note}" for note in folder.notes]
    ascii_only = (
        "Curly quotes, dashes and the like are ASCII; nothing else of the kept text was changed but what is said above."
    )
    lines += [
        "- Texts are word for word those of the origin." if folder.is_verbatim else f"- {ascii_only}",
        "",
        "## Origins",
        "",
    ]
    for origin in dict.fromkeys(origin for part in folder.parts.values() for origin in part.origins):
        lines += [f"### {origin}", "", *_statement(root / origin), ""]
    return "\n".join(lines)


def _statement(origin: Path) -> list[str]:
    """Origin, licence and notes as the folder of the origin states them."""
    stated = (origin / "SOURCE.md").read_text(encoding="utf-8").splitlines()
    lines = [f"- {line}" for line in stated if re.match(r"(origin|licence|note):", line)]
    if (origin / "LICENSE").exists():
        lines.append(f"- licence text: `data/licences/{origin.name}.txt`")
    return lines


def licences(root: Path) -> dict[str, str]:
    """Origin -> licence text, of every origin that has one."""
    origins = {origin for folder in FOLDERS.values() for part in folder.parts.values() for origin in part.origins}
    paths = {origin: root / origin / "LICENSE" for origin in sorted(origins)}
    return {origin: path.read_text(encoding="utf-8") for origin, path in paths.items() if path.exists()}
