"""The wandb workspace: what stands where, what the package is given, and what is said where something is missing."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llamachat.errors import ServerError, UsageError
from llamachat.tracking.metrics import metric_of
from llamachat.tracking.workspace import Panel, layout, save_workspace
from pipelines.cli.main import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def panels_of(title: str) -> dict[str, Panel]:
    (section,) = (section for section in layout() if section.title == title)
    return {panel.title: panel for panel in section.panels}


def test_the_sections_follow_the_recipe_and_the_system_is_folded() -> None:
    assert [(section.title, section.is_open) for section in layout()] == [
        ("Supervised tuning", True),
        ("Reward model: helpfulness", True),
        ("Reward model: safety", True),
        ("Reward model: judge", True),
        ("Rejection sampling", True),
        ("Ghost Attention", True),
        ("Context distillation", True),
        ("PPO", True),
        ("System", False),
    ]


def test_what_is_watched_has_its_panel() -> None:
    assert panels_of("Supervised tuning")["loss (nats/token)"].names == ("sft/loss", "sft/eval_loss")
    ppo = panels_of("PPO")
    assert ppo["combined reward (score)"].names == ("ppo/reward/combined",)
    assert ppo["raw reward (logit)"].names == ("ppo/reward/helpfulness", "ppo/reward/safety")
    assert ppo["KL to reference (nats/response)"].names == ("ppo/kl_to_reference", "ppo/heldout/kl_to_reference")
    assert "ppo/reward/gate_fraction" in ppo["fractions"].names
    assert {panel.x for panel in ppo.values()} == {"ppo/step", ""}
    ratings = panels_of("Reward model: helpfulness")["test accuracy by rating, and by which answers are safe"]
    assert ratings.kind == "bars"
    assert ratings.names[:2] == (
        "rm/helpfulness/test/helpfulness/accuracy",
        "rm/helpfulness/test/helpfulness/accuracy_significantly_better",
    )
    assert panels_of("System")["memory (GiB)"] == Panel("curves", "memory (GiB)", ("memory/peak_gib",), "Step")
    (bars,) = (panel for section in layout((3,)) for panel in section.panels if panel.title == "consistency")
    assert bars.names == ("gatt/consistency/start/turn_3", "gatt/consistency/final/turn_3")


def test_a_panel_holds_metrics_of_one_panel_of_the_table_on_their_own_axis() -> None:
    seen = []
    for section in layout():
        for panel in section.panels:
            rows = [metric_of(name) for name in panel.names]  # every name is in the table
            assert len({row.panel for row in rows}) == 1, panel
            assert panel.title.startswith(rows[0].panel)
            if panel.kind == "curves" and section.title != "System":
                assert {panel.x} == {f"{name[: len(panel.x) - 5]}/step" for name in panel.names}
            seen += panel.names
    assert len(seen) == len(set(seen))


class Workspace:
    url = "https://wandb.ai/us/llamachat?nw=1"

    def __init__(self, **told: Any) -> None:
        self.told = told
        MADE.append(self)

    def save(self) -> "Workspace":
        if self.told["project"] == "none":
            raise ValueError("project none not found")
        return self


MADE: list[Workspace] = []


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> list[Workspace]:
    """A stand-in for wandb-workspaces that keeps what it is given."""

    def part(kind: str) -> Any:
        return lambda **told: SimpleNamespace(kind=kind, **told)

    names = (
        "wandb_workspaces",
        "wandb_workspaces.workspaces",
        "wandb_workspaces.reports",
        "wandb_workspaces.reports.v2",
    )
    root, workspaces, reports, v2 = modules = [ModuleType(name) for name in names]
    vars(workspaces).update(Workspace=Workspace, Section=part("section"))
    vars(v2).update(LinePlot=part("line"), BarPlot=part("bar"))
    vars(root).update(workspaces=workspaces, reports=reports)
    vars(reports).update(v2=v2)
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    MADE.clear()
    return MADE


def test_the_package_is_given_the_layout(
    package: list[Workspace], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_ENTITY", "us")
    monkeypatch.chdir(ROOT)
    assert main(["dashboard", "--workspace", "tracking.project=chat", "gatt.evaluation_turns=[2]"]) == 0
    assert capsys.readouterr().out == f"{Workspace.url}\n"
    told = package[0].told
    assert (told["entity"], told["project"], told["name"]) == ("us", "chat", "llamachat")
    assert [section.name for section in told["sections"]] == [section.title for section in layout()]
    first, gatt = told["sections"][0], told["sections"][5]
    assert vars(first.panels[0]) == {
        "kind": "line",
        "title": "loss (nats/token)",
        "x": "sft/step",
        "y": ["sft/loss", "sft/eval_loss"],
    }
    assert vars(gatt.panels[-1]) == {
        "kind": "bar",
        "title": "consistency",
        "metrics": ["gatt/consistency/start/turn_2", "gatt/consistency/final/turn_2"],
    }


def test_without_the_package_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.chdir(ROOT)
    assert main(["dashboard", "--workspace"]) == 2
    assert "-m pip install -c constraints.txt wandb-workspaces`." in capsys.readouterr().err


def test_without_a_key_or_a_project_it_says_what_to_do(
    package: list[Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"no wandb key.*Run `wandb login`"):
        save_workspace("chat")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_ENTITY", "us")
    with pytest.raises(ServerError, match=r"\(project none not found\)\. .*'none' to be there.*`wandb sync`"):
        save_workspace("none")
    assert len(package) == 1


def test_the_real_package_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    workspaces: Any = pytest.importorskip(
        "wandb_workspaces.workspaces", reason="the extra 'workspace' is not installed"
    )
    kept: list[Any] = []
    monkeypatch.setattr(workspaces.Workspace, "save", lambda self: kept.append(self) or self)
    monkeypatch.setattr(workspaces.Workspace, "url", "there")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_ENTITY", "us")
    assert save_workspace("chat") == "there"
    sections = kept[0]._to_model().spec.model_dump(by_alias=True)["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [section.title for section in layout()]
    config = sections[0]["panels"][0]["config"]
    assert (config["xAxis"], config["metrics"]) == ("sft/step", ["sft/loss", "sft/eval_loss"])
    assert sections[-1]["panels"][0]["config"]["xAxis"] == "_step"
