"""Random files, recipes and command lines, given to the command line in this process, and what must hold of each call.

`python -m tests.fuzzing.cases --calls 10000 --seed 1` prints the calls that break a rule, `--kind KIND --case NUMBER` repeats one.
The rules: no traceback, a documented exit status with words, no input changed, at most a minute, and every record that
goes in comes out or is counted.
"""

import argparse
import contextlib
import gzip
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import yaml

from llamachat.config.sections import Tuning
from pipelines.cli.main import main
from tests.fuzzing.rows import FORMATS, GATHERED, POOLS, mutated, numbered, places, scrambled, write_data
from tests.recipes import write_base as write_shape
from tests.recipes import write_lines

LONGEST = 60  # seconds of one call
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}


class Hang(BaseException):
    """A call that takes too long; no code that handles errors may catch it."""


@dataclass(frozen=True)
class Call:
    """One command, what it printed, and how it ended; `traceback` is "" where it ended in words."""

    arguments: Sequence[str]
    status: int
    out: str
    err: str
    traceback: str
    seconds: float

    def faults(self) -> Iterator[str]:
        if self.traceback:
            yield f"traceback: {self.traceback}"
        elif "Traceback (most recent call last)" in self.out + self.err:
            yield f"traceback in words: {(self.out + self.err)[-600:]}"
        elif self.status not in (0, 1, 2):
            yield f"status {self.status}"
        elif self.status and not (self.out + self.err).strip():
            yield f"status {self.status} without a word"


def call(arguments: Sequence[str], limit: int = LONGEST) -> Call:
    """Run a command of the command line here."""

    def ring(*_: object) -> None:
        raise Hang

    # As on a terminal: half a character cannot be printed, in an error it is escaped.
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors, newline="") for errors in ("strict", "backslashreplace")
    )
    trace, status = "", -1
    root = logging.getLogger()
    handlers, root.handlers[:] = root.handlers[:], []
    # By the processor's time, since a busy machine is no hang, and ten times that by the clock, for what waits.
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, limit), signal.SIGALRM: (signal.ITIMER_REAL, 10 * limit)}
    before = {number: signal.signal(number, ring) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    begin = time.monotonic()
    stdin, sys.stdin = sys.stdin, io.StringIO("")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(arguments)
    except Hang:
        trace = f"hang of {limit} s: {_place(sys.exc_info()[2])}"
    except BaseException as error:
        trace = f"{type(error).__name__}: {str(error)[:200]} @ {_place(error.__traceback__)}"
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
        root.handlers[:], sys.stdin = handlers, stdin
    return Call(arguments, status, _text(out), _text(err), trace, time.monotonic() - begin)


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer = stream.detach()
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode("utf-8", "replace")


def _place(trace: Any) -> str:
    frames = [frame for frame in traceback.extract_tb(trace) if "/tests/fuzzing" not in frame.filename]
    return " <- ".join(f"{Path(frame.filename).name}:{frame.lineno}:{frame.name}" for frame in frames[:-4:-1])


def data_case(r: Random, world: "World") -> Iterator[str]:
    """Check and convert a file, and compare the counts."""
    data = write_data(r, world.scratch)
    kind, form = r.choice(["", "", "", "dialog", "preference", "prompt"]), r.choice(["auto"] * 8 + FORMATS)
    options = [*(["--kind", kind] if kind else []), *(["--format", form] if form != "auto" else [])]
    checked = yield from world.ran(["data", "check", str(data.path), *options], [data.path])
    counts = re.search(r": (\d+) good \w+, (\d+) bad lines?, (\d+) repeated", checked.out)
    empty = re.search(r"rows of a known set without a record: (\d+)", checked.out)
    is_plain = data.pool not in GATHERED and data.lines is not None
    # A document of JSON that breaks off or holds Infinity is one bad line.
    is_bad = data.is_document and counts is not None and counts[1] == "0"
    is_whole = not re.search(r"^[^:]+: file: ", checked.out, re.M) and not is_bad
    if counts and is_plain and is_whole:
        seen = int(counts[1]) + int(counts[2]) + (int(empty[1]) if empty else 0)
        if seen < (data.lines or 0):
            yield f"check: {data.lines} lines, {seen} accounted for\n{checked.out[-400:]}"
    out = world.scratch / r.choice(["out.jsonl", "out.jsonl.gz"])
    extra = r.choice([[], [], ["--plain-text"], ["--strict"]])
    done = yield from world.ran(["data", "convert", str(data.path), str(out), *options, *extra], [data.path])
    if done.status != 0:
        if out.exists():
            yield "convert: failed, and wrote"
        return
    text = (gzip.open if out.suffix == ".gz" else open)(out, "rt", encoding="utf-8").read()
    written = text.count("\n")
    reported = re.search(rf"^{re.escape(str(out))}: (\d+) ", done.out, re.M)
    table = done.out.partition("dropped because it")[2].splitlines()[1:]
    lost = sum(int(line.split()[-1]) for line in table if line.split() and line.split()[-1].isdigit())
    if reported is None or int(reported[1]) != written:
        yield f"convert: {written} lines, reported {reported and reported[1]}"
    if is_plain and written + lost < (data.lines or 0):
        yield f"convert: {data.lines} records, {written} written, {lost} counted\n{done.out[-600:]}"
    named = {int(number) for number in re.findall(rf"^{re.escape(str(data.path))}:(\d+): ", done.out, re.M)}
    gone = [line for line, mark in data.whole.items() if mark not in text and line not in named]
    if is_plain and len(gone) > max(0, lost - len(named)):
        yield f"convert: rows {gone} neither written nor named nor counted\n{done.out[-600:]}"
    again = yield from world.ran(["data", "check", str(out), *(["--kind", kind] if kind else [])], [out])
    if again.status != 0 or f": {written} good " not in again.out:
        yield f"convert: what it wrote does not pass the check\n{again.out[-600:]}"


# -- the world: a base, a policy, a reward model, a finished run, data, a recipe


class World:
    """What commands may name, each made when it is first needed. `scratch` is emptied before each case."""

    def __init__(self, folder: Path, sentencepiece: Callable[[], bytes]) -> None:
        self.folder, self.scratch, self.calls = folder.resolve(), folder.resolve() / "scratch", 0
        self.fixed = self.folder / "fixed"
        self.fixed.mkdir()
        self.statuses: Counter[tuple[str, int]] = Counter()
        self._sentencepiece = sentencepiece
        self.files: dict[str, Path] = {}
        for pool, count in (("dialogs", 60), ("pairs", 40), ("prompts", 30), ("labels", 20), ("rated", 20)):
            rows = [numbered(POOLS[pool][0], line) for line in range(count)]
            self.files[pool] = write_lines(self.fixed / f"{pool}.jsonl", rows)
        self.recipe = self._recipe(write_shape(self.fixed / "shape"))
        self.keys = [*{str(path[-1]) for path in places(self.recipe)}, "extends", "", "1", "format", "columns", "limit"]

    @cached_property
    def roles(self) -> Any:
        from llamachat.chat_format import load_chat_format
        from llamachat.chat_format.tokenizer import SentencePieceBackend, Tokenizer
        from tests.llamachat.models.tiny_roles import World as Roles

        model = self._sentencepiece()
        folder = self.fixed / "roles"
        folder.mkdir()
        return Roles(folder, load_chat_format("llama2", Tokenizer(SentencePieceBackend(model))), model)

    @cached_property
    def base(self) -> Path:
        return Path(self.roles.base.model)

    @cached_property
    def policy(self) -> Path:
        return self.roles.policy(Tuning()).path

    @cached_property
    def reward_model(self) -> Path:
        return self.roles.reward_model("safety", Tuning(), Tuning()).path

    @cached_property
    def config(self) -> Path:
        from tests.sft.tiny_sft import toy_dialogs, write_dialogs, write_recipe

        dialogs = write_dialogs(self.fixed / "toy.jsonl", toy_dialogs(24))
        return write_recipe(self.fixed / "toy.yaml", self.base, dialogs, {"sft": {"epochs": 1}})

    @cached_property
    def run(self) -> Path:
        run = self.fixed / "run"
        trained = call(["sft", "--config", str(self.config), f"run.dir={run}"], limit=600)
        assert trained.status == 0, trained
        return run

    def _recipe(self, base: Path) -> dict[str, Any]:
        recipe = yaml.safe_load((Path(__file__).parents[2] / "configs" / "tiny.yaml").read_text())
        pools = {"sft": "dialogs", "helpfulness": "pairs", "safety": "pairs", "labels": "labels"}
        data = {
            name: [{"path": str(self.files[pools.get(name, "prompts")])}] for name in recipe["data"] if name != "split"
        }
        recipe["run"] = {"dir": "runs/tiny", "seed": 0}
        recipe["base"] |= {"model": str(base)}
        return {**recipe, "data": {**data, "split": recipe["data"]["split"]}}

    def _stamp(self) -> dict[Path, tuple[int, int]]:
        files = ((path, path.lstat()) for path in self.fixed.rglob("*") if not path.is_dir())
        return {path: (state.st_size, state.st_mtime_ns) for path, state in files}

    def ran(self, arguments: Sequence[str], inputs: Sequence[Path] = ()) -> Iterator[str]:
        """Run a command; yields what is wrong, and returns the call."""
        before = [sha256(path.read_bytes()).digest() for path in inputs]
        done = call(arguments)
        self.calls += 1
        self.statuses[arguments[0], done.status] += 1
        for fault in done.faults():
            yield f"{fault}\n    {list(arguments)}"
        if before != [sha256(path.read_bytes()).digest() if path.is_file() else b"" for path in inputs]:
            yield f"an input changed: {list(arguments)}"
        return done

    def case(self, r: Random, kind: str) -> Iterator[str]:
        """One random case; yields what is wrong."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        os.chdir(self.scratch)
        before = self._stamp()
        yield from CASES[kind](r, self)
        after = self._stamp()
        yield from (f"a file that others read changed: {path}" for path in before if after.get(path) != before[path])


NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    3.5,
    1e-9,
    1e308,
    float("nan"),
    float("inf"),
    10**30,
    "9" * 5000,
    "1e-5",
    "0x10",
    True,
]
WORDS: list[Any] = [
    *(
        None,
        "",
        " ",
        "~",
        "null",
        "auto",
        "a/b",
        "a/b:c",
        "/nonexistent/x",
        "/dev/null",
        ".",
        "..",
        "\0",
        "\ud83d",
        "x" * 300,
    ),
    *(
        "$HOME",
        "*a",
        "&a",
        "!x",
        "[",
        "{",
        "#",
        "\x1b[1m",
        "lora",
        "qlora",
        "sdpa",
        "float16",
        "oasst",
        "rm",
        "rm/x",
        "sft",
    ),
    *(
        [],
        {},
        [1],
        [[]],
        {"a": {"b": 1}},
        ["sft", "sft"],
        {"sft": None},
        "\u0663",
        "2020-01-01",
        "24GiB",
        "8x a100",
        "cpu",
    ),
]


def recipe_case(r: Random, world: World) -> Iterator[str]:
    """A recipe that is changed here and there, as a file or by overrides."""
    values = [*NUMBERS, *WORDS, *(str(path) for path in world.files.values())]
    recipe, how = world.recipe, r.random()
    if how < 0.5:
        recipe = mutated(r, recipe, values, world.keys)
    text = yaml.safe_dump(recipe, allow_unicode=r.random() < 0.5, sort_keys=False)
    raw = text.encode("utf-8", "surrogatepass")
    if 0.5 <= how < 0.7:
        raw = scrambled(r, raw)
    file = world.scratch / "recipe.yaml"
    file.write_bytes(raw)
    yield from world.ran([*_with_recipe(r), "--config", str(file), *_overrides(r, world, values, how)], [file])


def _overrides(r: Random, world: World, values: Sequence[Any], how: float) -> list[str]:
    paths = [path for path in places(world.recipe) if len(path) < 5]
    overrides = []
    for _ in range(r.choice([1, 1, 2]) if how > 0.7 else r.choice([0, 0, 1])):
        names = [str(name) for name in r.choice(paths)]
        if r.random() < 0.2:
            names[r.randrange(len(names))] = r.choice(["", "x", "-1", "99", "\u0663", "0", *world.keys])
        value = r.choice(values)
        overrides.append(
            ".".join(names) + r.choice(["=", "=", "=", "==", ""]) + (str(value) if value is not None else "")
        )
    return [one.replace("\0", "") if r.random() < 0.9 else one for one in overrides]


def _with_recipe(r: Random) -> list[str]:
    dry = [
        [name, "--dry-run"] for name in ("all", "sft", "rm", "ppo", "rs", "gatt", "distill", "dpo", "eval", "report")
    ]
    return r.choice([["plan"]] * 8 + [["doctor"], ["dashboard"], ["plan", "--gpu", "24GiB"], ["chat"], *dry])


def damage_case(r: Random, world: World) -> Iterator[str]:
    """A finished run of which one file is damaged."""
    run = world.scratch / "run"
    shutil.copytree(world.run, run, symlinks=True)
    file = r.choice([path for path in sorted(run.rglob("*")) if path.is_file()])
    kind = r.randrange(6)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.write_bytes(b"")
    elif kind == 2 or file.suffix not in (".json", ".jsonl"):
        file.write_bytes(scrambled(r, file.read_bytes()))
    else:
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        index = r.randrange(len(lines))
        keys = [str(path[-1]) for path in places(json.loads(lines[index]))] or ["x"]
        lines[index] = json.dumps(mutated(r, json.loads(lines[index]), [*NUMBERS, *WORDS], keys))
        file.write_text("\n".join(lines) + "\n")
    recipe = ["--config", str(world.config), f"run.dir={run}"]
    commands = [
        *([["plan", *recipe], ["doctor", *recipe], ["dashboard", *recipe], ["diagnose", str(run)]] * 2),
        *(["compare", str(run), str(world.run), "--out", "c"], ["compare", str(world.run), str(run), "--out", "c"]),
        *(["chat", str(run), "-m", "hi", "--max-new-tokens", "2"], ["export", str(run), "--out", "e"]),
        *(["sft", *recipe, "--dry-run"], ["export", "--out", "e", *recipe], ["tokens", "--tokenizer", str(run / "sft/artifact"),
          "--in", str(world.files["dialogs"]), "--out", "t.jsonl"]),
    ]  # fmt: skip
    for command in r.sample(commands, 2):
        name = f"{file.relative_to(run)} damaged ({kind})"
        for fault in world.ran(command):
            yield f"{name}: {fault}"


def words_case(r: Random, world: World) -> Iterator[str]:
    """A command line whose options are random."""
    data = write_data(r, world.scratch).path if r.random() < 0.3 else None
    places_ = [*world.files.values(), world.base, world.policy, world.reward_model, world.run, world.config]
    inputs = [str(data)] * 20 if data else []
    odd = [str(one) for one in [*NUMBERS, *WORDS] if one is not None]

    def file(name: str) -> str:
        return r.choice([str(world.files[name])] * 12 + inputs + [*map(str, places_), *odd])

    def place(path: Path) -> str:
        return str(path) if r.random() < 0.8 else r.choice([*map(str, places_), *odd])

    def out(name: str) -> str:
        return r.choice(
            [name] * 12 + ["a/b/" + name, "", ".", "..", "x" * 300, *map(str, places_), "\ud83d", "\0", *inputs]
        )

    def some(**options: str) -> list[str]:
        numbers = [str(one) for one in NUMBERS]
        pairs = [("--" + name.replace("_", "-"), r.choice([value, *numbers])) for name, value in options.items()]
        return [word for pair in pairs if r.random() < 0.25 for word in pair]

    sampling = some(temperature="0.7", top_p="0.9", top_k="5", seed="3")
    short = ["--max-new-tokens", r.choice(["2", "2", "2", "2", "0", "-1", "9" * 9])]
    over = r.choice([[], [], ["--overwrite"]])
    text = lambda: r.choice(["hi", "", "word " * 500, "[INST]", "</s>", "\0", "\ud83d", "\u2581", "<<SYS>>"])  # noqa: E731
    # fmt: off
    init = [word for name, pool in (("preferences", "pairs"), ("safety", "pairs"), ("prompts", "prompts"),
            ("adversarial", "prompts")) if r.random() < 0.4 for word in (f"--{name}", file(pool))]
    commands: Sequence[Callable[[], list[str]]] = [
        lambda: ["init", "--base", place(world.base), "--sft", file("dialogs"), *init, "--out", out("i.yaml"), *over,
                 *some(gpu=r.choice(["24GiB", "8x a100-80gb", "0GiB", "nanGiB", "x"]), hours="5", run_dir=r.choice(odd))],
        lambda: ["tokens", "--tokenizer", place(world.base), "--in", file("dialogs"), "--out", out("t.jsonl"), *over,
                 *r.choice([[], ["--show"], ["--train-on", "last_answer"]])],
        lambda: ["sample", "--policy", place(world.policy), "--in", file("prompts"), "--out", out("s.jsonl"), *over,
                 *sampling, *short, *some(batch_size="4")],
        lambda: ["score", place(world.reward_model), file(r.choice(list(world.files))), *over,
                 *r.choice([[], ["--out", out("s.jsonl")]]), *some(device="cpu")],
        lambda: ["score", place(world.reward_model), "-m", text(), "-m", text()],
        lambda: ["chat", place(world.policy), "-m", text(), *sampling, *short, *some(system="s")],
        lambda: ["pairs", "--policy", place(world.policy), "--in", file("prompts"), "--out", out("p.jsonl"), *over,
                 *sampling, *short, *some(limit="3", key=out("k.jsonl"))],
        lambda: ["compare", place(world.run), place(world.run), "--out", out("c"), *over],
        lambda: ["diagnose", place(world.run)],
        lambda: ["export", place(world.policy), "--out", out("e"), *over, *some(shard_gb="1", dtype="float32", onto="original"),
                 *r.choice([[], ["--format", "adapter"], ["--format", "gguf"], ["--quantize", "q8_0"]])],
        lambda: ["plan", "--config", place(world.config), *some(gpu="24GiB", hours="5")],
        lambda: ["data", "check", r.choice([*odd, *map(str, places_)])],
        lambda: ["data", "convert", file("rated"), out("c.jsonl"), *over],
        lambda: r.sample(["data", "check", "plan", "--help", "-m", "=", "a=b", "--", "--config", "", "compare", "\0"], 3),
    ]
    # fmt: on
    yield from _one_command(world, r.choice(commands)(), [data] if data else [])


def _one_command(world: World, command: Sequence[str], inputs: Sequence[Path]) -> Iterator[str]:
    """Run it; the records of an output are counted, and a replaced file is put back."""
    files = replaceable(command, [*world.files.values(), world.config])
    before = [(path, path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    done = yield from world.ran(command, inputs)
    result = Path(command[command.index("--out") + 1]) if "--out" in command else None
    if done.status == 0 and result and result.suffix == ".jsonl" and result.is_file() and command[0] != "pairs":
        source = Path(command[2] if command[0] == "score" else command[command.index("--in") + 1])
        if source in world.files.values() and _lines(result) != _lines(source):
            yield f"{_lines(source)} records in, {_lines(result)} out: {command}\n{done.err[-300:]}"
    for path, content, time_ns in before:
        path.write_bytes(content)
        os.utime(path, ns=(time_ns, time_ns))


def replaceable(command: Sequence[str], files: Sequence[Path]) -> list[Path]:
    """The files that a command may replace: an output with `--overwrite` that it does not read as well."""
    if "--overwrite" not in command:
        return []
    after = [index + 1 for index, word in enumerate(command) if word in ("--out", "--key")]
    outputs = {command[index] for index in ([3] if command[:2] == ["data", "convert"] else after)}
    return [path for path in files if str(path) in outputs and command.count(str(path)) == 1]


def _lines(path: Path) -> int:
    return sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))


CASES: dict[str, Callable[[Random, World], Iterator[str]]] = {
    "data": data_case,
    "recipe": recipe_case,
    "damage": damage_case,
    "words": words_case,
}


def run_cases(world: World, *, calls: int, seed: int, kinds: Sequence[str] = ()) -> Counter[str]:
    """Print what is wrong, the first time that it is seen; how often each fault was."""
    faults: Counter[str] = Counter()
    number = slow = 0
    while world.calls < calls:
        case = seed * 1_000_000 + number
        kind = Random(-case).choice(kinds or list(CASES))
        begin = time.monotonic()
        for fault in world.case(Random(case), kind):
            name = re.sub(r"\d+|'[^']*'", "N", fault.splitlines()[0])[-160:]
            faults[name] += 1
            if faults[name] <= 2:
                print(f"--kind {kind} --case {case}: {fault}", flush=True)
        slow = max(slow, time.monotonic() - begin)
        number += 1
    print(f"{world.calls} calls of {number} cases, the slowest case {slow:.1f} s, {sum(faults.values())} faults")
    print("\n".join(f"  {count} x {name}" for name, count in faults.most_common()))
    print("  " + ", ".join(f"{name} {status}: {count}" for (name, status), count in sorted(world.statuses.items())))
    return faults


if __name__ == "__main__":
    from tests.fakes import train_sentencepiece

    parser = argparse.ArgumentParser(description="Give the command line random input, and print what it does wrong.")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", nargs="*", choices=list(CASES), default=[])
    parser.add_argument("--case", type=int, help="Repeat this one, of the one --kind.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {**OFFLINE, "HOME": folder}
        world = World(Path(folder), train_sentencepiece)
        if options.case is not None:
            sys.exit("\n".join(world.case(Random(options.case), options.kind[0])) or None)
        sys.exit(bool(run_cases(world, calls=options.calls, seed=options.seed, kinds=options.kind)))
