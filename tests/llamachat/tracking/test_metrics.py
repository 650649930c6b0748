"""The record under kills, the table of names, and the curves drawn from them."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamachat.runs.record import MetricsRecord, SamplesRecord
from llamachat.tracking import curves
from llamachat.tracking.curves import draw_curves, read_series, sparkline, terminal_curves
from llamachat.tracking.metrics import METRICS, UnknownMetricError, check_names

ROOT = Path(__file__).resolve().parents[3]


def test_a_record_cut_back_holds_what_a_run_to_that_step_wrote(tmp_path: Path) -> None:
    record = MetricsRecord(tmp_path / "metrics.jsonl", axis="sft/step")
    for step in range(6):
        record.append(step, {"sft/loss": 1.0 / (step + 1), "sft/epoch": step})
    lines = record.path.read_text().splitlines(keepends=True)
    written = {"step": 2, "time": 0, "sft/step": 2, "sft/loss": 1 / 3, "sft/epoch": 2}
    assert json.loads(lines[2]) | {"time": 0} == written
    record.close()
    for tear in (1, 10, len(lines[-1]) - 1):
        record.path.write_text("".join(lines[:-1]) + lines[-1][:tear])
        record.cut_back(3)
        assert record.path.read_text() == "".join(lines[:4])
    record.cut_back(-1)
    assert record.path.read_text() == ""
    MetricsRecord(tmp_path / "none" / "metrics.jsonl").cut_back(3)


def test_a_torn_last_line_is_no_problem_to_readers_and_to_the_next_line(tmp_path: Path) -> None:
    record = MetricsRecord(tmp_path / "metrics.jsonl")
    record.append(1, {"sft/loss": 2.0})
    record.close()
    whole = record.path.read_bytes()
    record.path.write_bytes(whole + b'{"step": 2, "ti')
    assert [row["step"] for row in record.read()] == [1]
    record.append(2, {"sft/loss": 1.0})
    record.close()
    assert [row["step"] for row in record.read()] == [1, 2]
    record.path.write_bytes(whole[:-1])  # only the line break is missing
    record.append(2, {"sft/loss": 1.0})
    assert [row["sft/loss"] for row in record.read()] == [2.0, 1.0]


def test_two_loops_in_one_folder_are_cut_back_apart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rs, sft = MetricsRecord(path, axis="rs/step"), MetricsRecord(path, axis="sft/step")
    rs.append(100, {"rs/temperature": 1.0})
    rs.close()
    for step in (1, 2):
        sft.append(step, {"sft/loss": 1.0})
    sft.cut_back(1)
    assert [row["step"] for row in sft.read()] == [100, 1]


def test_numbers_that_are_not_finite_are_null_to_other_tools_and_nan_to_us(tmp_path: Path) -> None:
    record = MetricsRecord(tmp_path / "metrics.jsonl")
    record.append(1, {"sft/loss": math.nan, "optim/grad_norm": math.inf})
    assert '"sft/loss": null, "optim/grad_norm": null' in record.path.read_text()
    assert all(math.isnan(record.read()[0][name]) for name in ("sft/loss", "optim/grad_norm"))


def test_any_text_is_one_line_of_samples(tmp_path: Path) -> None:
    record = SamplesRecord(tmp_path / "samples.jsonl")
    text = "line\nnext\u2028separator\x85caf\u00e9 \udcff half"
    record.append(1, [{"prompt": text, "answer": ""}, {"prompt": "b"}])
    assert len(record.path.read_bytes().splitlines()) == 2
    assert [row["prompt"] for row in record.read()] == [text, "b"]
    record.cut_back(1)
    assert record.read()[0]["prompt"] == text


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from llamachat.runs.record import MetricsRecord
record = MetricsRecord(Path(sys.argv[1]))
for step in range(10**9):
    record.append(step, {"sft/loss": 1.0, "optim/grad_norm": 2.0})
    if step == 100:
        print("under way", flush=True)
"""


def test_a_kill_while_writing_costs_at_most_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(ROOT)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05)
        process.kill()
    steps = [row["step"] for row in MetricsRecord(path).read()]
    assert len(steps) > 100
    assert steps == list(range(len(steps)))
    assert len(path.read_text().splitlines()) - len(steps) <= 1


def test_names_are_those_of_the_table() -> None:
    check_names(["sft/loss", "rm/safety/accuracy_slightly_better", "ppo/heldout/reward_helpfulness", "rm/judge/step"])
    check_names(["eval/rs-1/reward_safety", "eval/ppo/consistency/turn_12", "optim/grad_norm", "memory/peak_gib"])
    with pytest.raises(UnknownMetricError, match=r"'sft/los' is not in the table.*Did you mean 'sft/loss'\?"):
        check_names(["sft/loss", "sft/los"])
    for name in ("rm/toxicity/loss", "rm/<which>/loss", "rm/safety/accuracy_worse", "sft/loss/more", ""):
        with pytest.raises(UnknownMetricError, match="is not in the table"):
            check_names([name])


def test_every_row_says_what_it_is_and_panels_share_a_unit() -> None:
    units: dict[tuple[str, str], set[str]] = {}
    for name, row in METRICS.items():
        assert row.meaning and row.unit and row.reduction
        units.setdefault((name.partition("/")[0], row.panel), set()).add(row.unit)
    assert {place for place, names in units.items() if len(names) > 1} == set()


def test_a_sparkline_by_hand() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "".join(chr(0x2581 + i) for i in range(8))
    assert sparkline([0, 2, 14, 14], 2, is_ascii=True) == "_#"
    assert sparkline([math.nan, 1.0, 3.0], 3, is_ascii=True) == " _#"
    assert sparkline([math.nan], 3) == " "
    assert sparkline([5.0, 5.0], 5, is_ascii=True) == "++"


def test_a_name_with_dollars_is_drawn_and_a_picture_that_fails_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("$y_{$", "a$b_{c}$ <i>&", "\\$x\\$", "n" * 250):
        path = tmp_path / name / "sft" / "metrics.jsonl"
        MetricsRecord(path, axis="sft/step").append(0, {"sft/loss": 4.0e-9})
        draw_curves(path, path.with_name("curves.png"))
        assert path.with_name("curves.png").is_file()
    assert not caplog.text

    def fail(*_: object, **__: object) -> None:
        raise ValueError("axis limits cannot be NaN")

    monkeypatch.setattr("llamachat.tracking.curves._frame_panel", fail)
    draw_curves(path, tmp_path / "second.png")
    assert "draw_curves" in caplog.text and "axis limits cannot be NaN" in caplog.text
    assert not (tmp_path / "second.png").exists()


def test_curves_are_a_picture_and_lines_of_at_most_100_columns(tmp_path: Path) -> None:
    path, picture = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    draw_curves(path, picture)
    assert not picture.exists(), "nothing to draw yet"
    assert "no figures yet" in terminal_curves(path)
    record = MetricsRecord(path, axis="sft/step")
    record.append(0, {"sft/eval_loss_base": 4.0})
    for step in range(50):
        loss = math.nan if step == 7 else 50.0 - step
        record.append(step, {"throughput/rollout_tokens_per_s": 5.0, "sft/loss": loss})
    record.append(50, {"from/another_version": 1.0})
    draw_curves(path, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    names = [series.name for series in read_series(path)]
    assert names == ["sft/loss", "sft/eval_loss_base", "throughput/rollout_tokens_per_s", "from/another_version"]
    text = terminal_curves(path)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert re.search(r"sft/loss +50 +1 +nats/token +\u2588[\u2581-\u2588 ]+\u2581\n", text)


def test_a_fraction_below_0_is_inside_its_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = MetricsRecord(tmp_path / "metrics.jsonl", axis="ppo/step")
    for step, value in enumerate((-3.0, -0.5, 0.2)):
        record.append(step, {"ppo/explained_variance": value})
    record.close()
    panels = list[tuple[float, float]]()
    monkeypatch.setattr(curves, "save_png", lambda figure, path: panels.extend(one.get_ylim() for one in figure.axes))
    draw_curves(record.path, tmp_path / "curves.png")
    ((low, high),) = panels
    assert low < -3 and high > 1


def test_the_page_in_docs_is_the_table() -> None:
    assert (ROOT / "docs/metrics.md").read_bytes() == (ROOT / "llamachat/tracking/metrics.md").read_bytes()
