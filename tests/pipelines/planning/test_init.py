"""`llamachat init`: what it writes loads, fits the card and the hours, and plans without warnings; what it refuses, and how."""

import json
import re
from pathlib import Path

import pytest
import yaml

from llamachat.chat_format.dialog import Dialog
from llamachat.config.gpus import parse_gpu
from llamachat.data.loading import read_records
from pipelines.cli.main import main
from pipelines.planning.estimates import estimate_step
from pipelines.planning.fit import fits
from pipelines.planning.plan import warn
from pipelines.recipe.recipe import Recipe, load
from tests.recipes import write_base, write_dialogs, write_pairs

ROOT = Path(__file__).resolve().parents[3]
SEVEN = "meta-llama/Llama-2-7b-hf"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_dialogs(tmp_path / "dialogs.jsonl", 600)
    write_pairs(tmp_path / "pairs.jsonl", 400)
    (tmp_path / "base").symlink_to(ROOT / "assets" / "base")


def init(*options: str, base: str = "base", sft: str = "dialogs.jsonl") -> int:
    return main(["init", "--base", base, "--sft", sft, *options])


def init_recipe(*options: str, base: str = "base") -> Recipe:
    assert init(*options, "--out", "made.yaml", "--overwrite", base=base) == 0
    return load("made.yaml")


def warnings_of(recipe: Recipe, gpu: str | None = None) -> list[str]:
    card = parse_gpu(gpu) if gpu else None
    return [text for step in recipe.steps for text in warn(step, estimate_step(recipe, step, card))]


def names(recipe: Recipe) -> list[str]:
    return [step.name for step in recipe.steps]


# -- what the data allow


def test_dialogs_alone_are_tuned_on(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = init_recipe("--hours", "1")
    assert names(recipe) == ["sft", "gatt", "report"]
    assert warnings_of(recipe) == []
    assert "  left out     eval: there are no pairs (--preferences)\n" in capsys.readouterr().out


def test_columns_with_other_names_go_into_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"talk": json.loads(line)["messages"]} for line in Path("dialogs.jsonl").read_text().splitlines()]
    Path("talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert init(sft="talks.jsonl") == 2
    options = ["--preferences", "pairs.jsonl", "--columns", "messages=talk", "--hours", "2", "--out", "named.yaml"]
    assert init(*options, sft="talks.jsonl") == 0
    recipe = load("named.yaml")
    assert (recipe.data.sft[0].columns, recipe.data.helpfulness[0].columns) == ({"messages": "talk"}, None)
    dialogs = read_records(recipe.data.sft[0], Dialog)
    assert [one.messages[0].content for one in dialogs] == [row["talk"][0]["content"] for row in rows]
    capsys.readouterr()
    for columns in ("messages=talks", "messages", "messages=talk,messages=x"):
        assert init("--columns", columns, "--out", "no.yaml", sft="talks.jsonl") == 2
        assert "--columns: " in capsys.readouterr().err and not Path("no.yaml").exists()


def test_pairs_bring_one_reward_model_and_no_gate() -> None:
    recipe = init_recipe("--preferences", "pairs.jsonl", "--hours", "2")
    assert names(recipe) == ["sft", "rm/helpfulness", "rs", "ppo", "gatt", "eval", "report"]
    assert recipe.sections.scoring.combine == "single" and recipe.sections.reward.margin == "none"
    assert (recipe.run.dir, recipe.run.max_hours) == ("runs/made", 2)
    assert init_recipe("--preferences", "pairs.jsonl", "--run-dir", "elsewhere").run.dir == "elsewhere"
    assert warnings_of(recipe) == []


def test_safety_pairs_bring_the_gate_where_they_have_labels_and_weights_where_not(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in write_pairs(tmp_path / "safety.jsonl", 300).read_text().splitlines()]
    bad = [{"prompt": [{"role": "user", "content": f"Do harm {n}."}]} for n in range(300)]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    options = ["--preferences", "pairs.jsonl", "--safety", "safety.jsonl", "--adversarial", "bad.jsonl"]
    recipe = init_recipe(*options)
    assert names(recipe) == ["sft", "rm/helpfulness", "rm/safety", "rs", "ppo", "gatt", "distill", "eval", "report"]
    assert recipe.sections.scoring.combine == "weighted" and recipe.run.max_hours is None
    labelled = [{**line, "rating": "better", "chosen_is_safe": True, "rejected_is_safe": False} for line in lines]
    (tmp_path / "safety.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labelled))
    recipe = init_recipe(*options)
    assert recipe.sections.scoring.combine == "llama2_gate" and recipe.sections.reward.margin == "small"
    assert warnings_of(recipe) == []


def test_many_pairs_bring_a_judge_and_several_files_stand_after_one_option(tmp_path: Path) -> None:
    write_pairs(tmp_path / "more.jsonl", 2000)
    recipe = init_recipe("--preferences", "pairs.jsonl", "more.jsonl", "--hours", "5")
    assert "rm/judge" in names(recipe) and recipe.data.split.judge > 0
    assert [source.path for source in recipe.data.helpfulness] == ["pairs.jsonl", "more.jsonl"]
    assert warnings_of(recipe) == []


# -- the card and the hours


@pytest.mark.parametrize(
    ("gpu", "method"), [("80GiB", "lora"), ("rtx-4090", "qlora"), ("12GiB", "qlora"), ("8x24GiB", "qlora")]
)
def test_the_preset_of_the_card_is_taken_and_ends_within_the_hours(gpu: str, method: str) -> None:
    recipe = init_recipe("--preferences", "pairs.jsonl", "--gpu", gpu, "--hours", "10", base=SEVEN)
    fit = fits(recipe, parse_gpu(gpu))
    assert fit is not None and fit.fits and fit.hours is not None and fit.hours <= 10
    assert recipe.tuning.method == method and (recipe.run.gpu, recipe.run.max_hours) == (gpu, 10)
    preset = load(f"{ROOT}/configs/llama2-7b-{method}.yaml")
    for section, key in (("sft", "learning_rate"), ("ppo", "kl_coef"), ("tuning", "rank"), ("reward", "learning_rate")):
        assert getattr(getattr(recipe.sections, section), key) == getattr(getattr(preset.sections, section), key)
    assert warnings_of(recipe, gpu) == []


def test_hours_shorten_the_longest_steps_and_leave_the_others() -> None:
    options = ["--preferences", "pairs.jsonl", "--gpu", "24GiB"]
    few, more, all_of_it = (
        init_recipe(*options, *hours, base=SEVEN) for hours in (["--hours", "4"], ["--hours", "8"], [])
    )
    assert few.sections.ppo.iterations < more.sections.ppo.iterations < all_of_it.sections.ppo.iterations == 200
    fewest, fewer, most = (one.sections.rejection_sampling.prompts or 0 for one in (few, more, all_of_it))
    assert 0 < fewest < fewer <= most <= 1000, "there are no more questions"
    assert few.sections.sft.epochs == all_of_it.sections.sft.epochs == 2


def test_a_card_or_a_machine_that_is_too_small_is_refused_with_a_card_that_holds_the_base(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.planning.init.installed_bytes", lambda: 24 * 2**30)
    assert init(base=SEVEN) == 2
    said = capsys.readouterr().err
    assert f"--gpu: this machine without a card (24.0 GiB) is too small for '{SEVEN}'" in said
    assert init("--gpu", "4GiB", base=SEVEN) == 2
    said = capsys.readouterr().err
    assert "--gpu: 4 GiB is too small for 'meta-llama/Llama-2-7b-hf'" in said and "a smaller base, such as" in said
    named = re.search(r"smallest known one that fits: ([\w-]+)\)", said)
    assert named and not Path("recipe.yaml").exists()
    assert init("--gpu", named[1], base=SEVEN) == 0


def test_hours_that_are_too_few_are_refused_with_how_many_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert init("--preferences", "pairs.jsonl", "--hours", "0.001") == 2
    needed = re.search(r"--hours: 0.001 is too short.* Pass --hours ([\d.]+) or more", capsys.readouterr().err)
    assert needed and init("--preferences", "pairs.jsonl", "--hours", needed[1]) == 0
    assert init("--hours", "-1", "--overwrite") == 2


# -- what it says, and what it refuses


def test_it_says_what_it_chose_and_what_next_and_the_recipe_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert init("--preferences", "pairs.jsonl", "--out", "my/recipe.yaml") == 0
    said = capsys.readouterr().out
    assert "data.sft     600 records from dialogs.jsonl" in said and "none rated" in said
    assert "left out     distill: it needs safety pairs (--safety)" in said and "configs/tiny.yaml" in said
    for command in ("doctor", "plan", "all"):
        assert f"  llamachat {command} --config my/recipe.yaml\n" in said + "\n"
    assert main(["plan", "--config", "my/recipe.yaml"]) == 0 and "rm/helpfulness" in capsys.readouterr().out
    text = Path("my/recipe.yaml").read_text()
    assert (
        text.startswith("# Written by `llamachat init` from configs/tiny.yaml") and "#   left out     distill: " in text
    )
    assert "run" in yaml.safe_load(text)


@pytest.mark.parametrize("name", ["a\nb: [.jsonl", "a\x1b[31m.jsonl", "# \u2028 'x\".jsonl"])
def test_a_file_of_any_name_gives_a_recipe_that_loads(name: str) -> None:
    Path("dialogs.jsonl").rename(name)
    assert init(sft=name) == 0
    assert main(["plan", "--config", "recipe.yaml"]) == 0


def test_a_recipe_is_not_written_over_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    assert init() == 0
    before = Path("recipe.yaml").read_text()
    assert init("--hours", "1") == 2
    assert "'recipe.yaml' already exists" in capsys.readouterr().err
    assert Path("recipe.yaml").read_text() == before
    assert init("--hours", "1", "--overwrite") == 0 and Path("recipe.yaml").read_text() != before


def refusals(folder: Path) -> dict[str, tuple[list[str], dict[str, str], str]]:
    write_base(folder / "other")
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    (folder / "empty").mkdir()
    (folder / "data").mkdir()
    lines = (folder / "dialogs.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace('"assistant"', '"gpt"')
    (folder / "bad.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "nothing.jsonl").write_text("")
    (folder / "link.jsonl").symlink_to("gone.jsonl")
    (folder / "table.csv").write_text("question,answer\na,b\n")
    (folder / "prose.txt").write_text("Hello there.\nHow are you?\n")
    no_file = "--sft: the data file 'dialog.jsonl' does not exist. Did you mean 'dialogs.jsonl'?"
    as_sft = "--sft: 'pairs.jsonl' holds 400 preferences, but dialogs are needed here."
    as_pairs = "--preferences: 'dialogs.jsonl' holds 600 dialogs, but preferences are needed here."
    return {
        "no such file": ([], {"sft": "dialog.jsonl"}, no_file),
        "pairs as dialogs": ([], {"sft": "pairs.jsonl"}, f"{as_sft} Pass it with --preferences"),
        "dialogs as pairs": (["--preferences", "dialogs.jsonl"], {}, f"{as_pairs} Pass it with --sft"),
        "a bad record": ([], {"sft": "bad.jsonl"}, "bad.jsonl:3: messages[1].role: is 'gpt'"),
        "no record": ([], {"sft": "nothing.jsonl"}, "--sft: 'nothing.jsonl' is empty, but it should hold records."),
        "a table": ([], {"sft": "table.csv"}, "--sft: 'table.csv' is a table (CSV), but a data file is JSON Lines"),
        "prose": ([], {"sft": "prose.txt"}, "--sft: prose.txt: 2 of 2 records are invalid"),
        "a folder of files": ([], {"sft": "data"}, "--sft: 'data' is a folder, but records are read from one file."),
        "a file twice": (["--sft", "./dialogs.jsonl"], {}, "--sft: 'dialogs.jsonl' was already passed with --sft."),
        "one file for two models": (
            ["--preferences", "pairs.jsonl", "--safety", str(folder / "pairs.jsonl")],
            {},
            "pairs.jsonl' was already passed with --preferences. Its records would count twice",
        ),
        "a set of the hub": ([], {"sft": "owner/name"}, "--sft: 'owner/name' is not a local file."),
        "a card nobody knows": (["--gpu", "rtx-9999"], {}, "--gpu: 'rtx-9999' is not a known card."),
        "another architecture": ([], {"base": "other"}, "'other' has the architecture 'mistral'"),
        "a name in no encoding": ([], {"sft": "\udcff.jsonl"}, "--sft: '\\udcff.jsonl' is not UTF-8 text"),
        "a run of such a name": (["--run-dir", "\udcff"], {}, "--run-dir: '\\udcff' is not UTF-8 text"),
        "a link to nowhere": (
            [],
            {"sft": "link.jsonl"},
            "'link.jsonl' is a link to 'gone.jsonl', which does not exist.",
        ),
        "no model": ([], {"base": "empty"}, "--base: the folder 'empty' has no config.json"),
        "no base": ([], {"base": "bas"}, "--base: the model folder 'bas' does not exist. Did you mean 'base'?"),
        "no recipe's name": (["--out", "recipe.txt"], {}, "--out: 'recipe.txt' is not a .yaml file."),
        "a folder": (["--out", "folder.yaml"], {}, "--out: 'folder.yaml' is a folder"),
        "under a file": (["--out", "dialogs.jsonl/recipe.yaml"], {}, "'dialogs.jsonl/recipe.yaml' cannot be"),
    }


def test_a_preset_is_never_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    presets = {path: path.read_bytes() for path in (ROOT / "configs").glob("*.yaml")}
    Path("link.yaml").symlink_to(ROOT / "configs" / "llama2-7b-lora.yaml")
    for out in (*map(str, presets), "link.yaml"):
        assert init("--out", out, "--overwrite") == 2
        assert "is an input of this command" in capsys.readouterr().err
    assert presets and presets == {path: path.read_bytes() for path in presets}


def test_what_is_refused_is_2_and_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name, (options, keywords, text) in refusals(tmp_path).items():
        assert init(*options, **keywords) == 2, name
        captured = capsys.readouterr()
        fixes = "data convert" in captured.err
        assert fixes == (name in ("a bad record", "prose", "a set of the hub")), name
        assert text in captured.err and "Traceback" not in captured.err and captured.out == "", name
        assert not Path("recipe.yaml").exists(), name
