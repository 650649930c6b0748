"""The doctor, and what a run tells before any weights: access, architecture, tokenizer. The hub is a stand-in here."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file

from llamachat.chat_format.tokenizer import load_tokenizer
from llamachat.config.sections import Tuning
from llamachat.errors import ConfigError, LlamachatError
from llamachat.models import hub
from llamachat.models.files import nonfinite_tensors
from llamachat.models.loading import load_base
from llamachat.models.start_checks import proved_start
from llamachat.runs.hub_commits import commits_in
from pipelines.cli.main import main
from pipelines.planning import doctor
from pipelines.planning import hardware as devices
from pipelines.planning.doctor import Finding, examine, report
from pipelines.planning.hardware import Device, Torch, find_devices, find_torch
from pipelines.recipe.recipe import load
from tests.recipes import write_recipe
from tests.tiny_llama import base_section

ROOT = Path(__file__).resolve().parents[3]
BASE = ROOT / "assets" / "base"
LLAMA, QLORA = "meta-llama/Llama-2-7b-hf", Path("configs/llama2-7b-qlora.yaml")
CARD = Device("NVIDIA GeForce RTX 4090", 24.0, 23.5, "560.35")
GOOD_TORCH = Torch("2.13.0+cu130", "13.0", (8, 9))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No card, an empty cache, no token, a hub that answers nothing, and room on the disk, in memory and on a line."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    monkeypatch.setattr(doctor, "installed_bytes", lambda: 2**40)
    monkeypatch.setattr(doctor, "find_devices", list)
    monkeypatch.setattr(doctor, "find_torch", lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    hub_says(monkeypatch, OSError("Name or service not known"))


def refusal(kind: type[Exception], status: int = 401) -> Exception:
    error: Any = kind.__new__(kind)
    Exception.__init__(error, f"{status} Client Error.\nmore")
    error.response = SimpleNamespace(status_code=status)
    return error


def hub_says(monkeypatch: pytest.MonkeyPatch, answer: Exception | Path) -> list[Any]:
    """The hub raises this, or gives the files of this folder; what was asked is noted."""
    calls: list[Any] = []

    def give(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", give)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, *a, **k: give(*a, **k) and SimpleNamespace(gated=False)
    )
    return calls


def by_check(findings: list[Finding], check: str) -> Finding:
    (match,) = [finding for finding in findings if finding.check == check]
    return match


# -- what the hub's answers mean


@pytest.mark.parametrize(
    ("error", "state", "fix"),
    [
        (refusal(GatedRepoError), "gated", "Accept its licence on https://huggingface.co/meta-llama/Llama-2-7b-hf"),
        (refusal(RepositoryNotFoundError), "missing", "Correct the name"),
        (refusal(RemoteEntryNotFoundError, 404), "missing", "format of transformers"),
        (refusal(HfHubHTTPError, 401), "gated", "hf auth login"),
        (refusal(HfHubHTTPError, 503), "offline", "Connect to the network"),
        (LocalEntryNotFoundError("no cache"), "offline", "copy it here"),
        (TimeoutError(), "offline", "Connect to the network"),
    ],
)
def test_each_answer_of_the_hub_has_its_fix(
    error: Exception, state: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_says(monkeypatch, error)
    reach = hub.reach_model(LLAMA)
    assert reach.state == state and fix in reach.fix and reach.reason
    with pytest.raises(ConfigError, match=r"the tokenizer of 'meta-llama/Llama-2-7b-hf' cannot be downloaded"):
        hub.tokenizer_folder(LLAMA)


def test_a_gated_model_is_open_with_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_says(monkeypatch, refusal(GatedRepoError))
    without = hub.reach_model(LLAMA)
    assert "no token is on this machine" in without.reason and "hf auth login" in without.fix
    assert hub.UNGATED in without.fix and hub.UNGATED.startswith("TinyLlama/")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    assert "this machine's token has no access" in hub.reach_model(LLAMA).reason


# -- before any weights, in the step itself


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", loaded)


def base_copy(folder: Path, **config: Any) -> Path:
    """The bundled base with another config.json, without its weights."""
    folder.mkdir()
    for path in BASE.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, folder)
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def wrong_tokenizer(folder: Path) -> Path:
    """A base without a SentencePiece model, whose tokenizer.json makes other ids than Llama 2's."""
    base_copy(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text(load_tokenizer(BASE).fast().to_str())
    return folder


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("gated", 2, "is gated and no token is on this machine"),
        ("mistral", 2, "base.model: 'owner/mistral' has the architecture 'mistral'"),
        ("derived", 1, "cases of the tokenizer proof"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused_before_any_weights(
    name: str,
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_weights: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = {
        "gated": lambda: refusal(GatedRepoError),
        "mistral": lambda: base_copy(tmp_path / "files", model_type="mistral"),
        "derived": lambda: wrong_tokenizer(tmp_path / "files"),
    }
    calls = hub_says(monkeypatch, answers[name]())
    path = write_recipe(tmp_path, tuning={"method": "lora"}, tracking={"mode": "off"})
    assert main(["sft", "--config", str(path), f"base.model=owner/{name}"]) == status
    assert words in capsys.readouterr().err
    assert calls and all(kwargs["allow_patterns"] == list(hub.TOKENIZER_FILES) for _, kwargs in calls)


# -- the doctor


def test_a_machine_that_lacks_nothing_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path, base={"model": str(BASE)})
    assert main(["doctor", "--config", str(path)]) == 0
    out = capsys.readouterr().out
    assert "its token ids are those of the chat format 'llama2'" in out and "about 40 records" in out
    assert "no NVIDIA card found" in out and out.endswith("Nothing that was checked will fail.\n")
    assert "meet their lower bounds (torch 2" in " ".join(out.split())
    assert not (tmp_path / "runs").exists()


def test_without_a_network_the_doctor_says_what_it_could_not_check() -> None:
    findings = examine(QLORA, [])
    access, base = by_check(findings, "access"), by_check(findings, "base")
    assert access.verdict == "note" and f"access to '{LLAMA}' is not checked" in access.problem
    assert base.verdict == "note" and "is known to work; its tokenizer is checked when" in base.problem
    assert {finding.verdict for finding in findings if finding.check == "data"} == {"note"}
    assert "Nothing that was checked will fail." in report(findings)


def test_a_base_in_the_cache_needs_no_access(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--meta-llama--Llama-2-7b-hf" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(BASE))
    findings = examine(QLORA, [])
    assert "is read from the cache" in by_check(findings, "access").problem
    assert by_check(findings, "tokenizer").verdict == "ok"
    assert "download of the base" not in by_check(findings, "disk").problem


@pytest.mark.parametrize(
    ("answer", "check", "text"),
    [
        (refusal(GatedRepoError), "access", "is gated and no token is on this machine"),
        ({"model_type": "qwen3"}, "base", "has the architecture 'qwen3'"),
        (None, "tokenizer", "cases of the tokenizer proof"),
    ],
)
def test_what_would_stop_a_run_is_a_failure_with_a_fix(
    answer: Any, check: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(answer, dict):
        answer = base_copy(tmp_path / "files", **answer)
    hub_says(monkeypatch, answer or wrong_tokenizer(tmp_path / "files"))
    finding = by_check(examine(QLORA, []), check)
    assert finding.verdict == "FAIL" and text in finding.problem and finding.fix
    assert main(["doctor", "--config", str(QLORA)]) == 1


def test_the_doctor_asks_the_hub_for_heads_and_small_files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub_says(monkeypatch, BASE)
    findings = examine(QLORA, [])
    assert [finding.check for finding in findings if finding.verdict == "FAIL"] == []
    names = [args[0] for args, _ in calls]
    assert names[0].endswith(f"/{LLAMA}/resolve/main/config.json")
    pairs = ["nvidia/HelpSteer3", "PKU-Alignment/PKU-SafeRLHF", "Anthropic/hh-rlhf", "PKU-Alignment/BeaverTails"]
    assert names[1:] == [LLAMA, "HuggingFaceH4/no_robots", "databricks/databricks-dolly-15k", *pairs]
    assert calls[1][1] == {"revision": None, "allow_patterns": list(hub.TOKENIZER_FILES)}


def test_a_pinned_base_is_asked_for_at_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub_says(monkeypatch, BASE)
    findings = examine(QLORA, [f"base.model={LLAMA}@v1"])
    assert by_check(findings, "base").problem == f"'{LLAMA}@v1' is known to work"
    assert calls[0][0][0].endswith(f"/{LLAMA}/resolve/v1/config.json")
    assert (calls[1][0], calls[1][1]["revision"]) == ((LLAMA,), "v1")
    notes = [finding for finding in findings if finding.check == "memory" and finding.verdict == "note"]
    assert notes == [], "its shape is known as without the revision"


def test_a_base_of_the_hub_without_a_revision_is_named_with_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = shutil.copytree(BASE, tmp_path / "snapshots" / commit)
    hub_says(monkeypatch, snapshot)
    (note,) = [one for one in examine(QLORA, []) if one.check == "base" and one.verdict == "note"]
    assert f"{LLAMA}@{commit}" in note.fix
    assert commits_in({"base": {"model": LLAMA}, "data": [{"path": "other/set"}]}) == {LLAMA: commit}


def test_a_set_that_is_gated_or_missing_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_says(monkeypatch, BASE)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: SimpleNamespace(gated="auto"))
    reach = hub.reach_data("owner/set")
    assert reach.state == "gated" and "https://huggingface.co/datasets/owner/set" in reach.fix
    assert {finding.verdict for finding in examine(QLORA, []) if finding.check == "data"} == {"FAIL"}


def test_a_folder_without_safetensors_an_empty_file_and_a_bad_recipe_are_failures(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, base={"model": str(base_copy(tmp_path / "files"))})
    (tmp_path / "dialogs.jsonl").write_text("")
    findings = examine(path, [])
    assert "has no *.safetensors" in by_check(findings, "base").problem
    assert "has no lines" in by_check(findings, "data").problem
    findings = examine(path, ["sft.epoch=1"])
    assert "Did you mean 'epochs'?" in by_check(findings, "recipe").problem
    assert by_check(findings, "recipe").verdict == "FAIL" and by_check(findings, "python").verdict == "ok"


@pytest.mark.parametrize(
    ("torch", "verdict", "text"),
    [
        (None, "FAIL", "torch cannot be imported"),
        (Torch("2.13.0+cpu", None, None), "FAIL", "is built without CUDA"),
        (Torch("2.13.0+cu130", "13.0", None), "FAIL", "cannot use the card with driver 560.35"),
        (Torch("2.13.0+cu130", "13.0", (6, 1), (7, 5)), "FAIL", "is 6.1, and the oldest one that it supports is 7.5"),
        (
            Torch("2.13.0+cu130", "13.0", (7, 5), (7, 5)),
            "FAIL",
            "no bfloat16 arithmetic, the only number format of QLoRA",
        ),
        (GOOD_TORCH, "ok", "CUDA 13.0, driver 560.35"),
    ],
)
def test_a_card_is_of_use_where_torch_can_use_it(
    torch: Torch | None, verdict: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_devices", lambda: [CARD])
    monkeypatch.setattr(doctor, "find_torch", lambda: torch)
    finding = by_check(examine(QLORA, []), "cuda")
    assert finding.verdict == verdict and text in finding.problem


def test_a_card_without_bfloat16_is_slow_for_lora_and_refused_for_qlora(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_devices", lambda: [CARD])
    monkeypatch.setattr(doctor, "find_torch", lambda: Torch("2.13.0+cu130", "13.0", (7, 5), (7, 5)))
    verdicts = {}
    for values in (["tuning.method=lora"], ["tuning.method=lora", "base.dtype=float32"]):
        finding = by_check(examine(QLORA, [*values, "steps=[sft]"]), "cuda")
        verdicts[" ".join(values)] = finding.verdict
    assert list(verdicts.values()) == ["note", "ok"]
    with pytest.raises(ConfigError, match=r"run\.gpu.*the t4 has no bfloat16 arithmetic"):
        load(QLORA, ["run.gpu=t4"])


def test_the_card_that_is_here_counts_and_not_the_one_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_torch", lambda: GOOD_TORCH)
    findings = {}
    for total, free in ((24.0, 23.5), (24.0, 3.0), (6.0, 6.0)):
        monkeypatch.setattr(doctor, "find_devices", lambda total=total, free=free: [Device("card", total, free, "560")])
        findings[total, free] = by_check(examine(QLORA, ["steps=[sft]"]), "memory")
    assert [finding.verdict for finding in findings.values()] == ["ok", "note", "FAIL"]
    assert "only 3.0 GiB are free now" in findings[24.0, 3.0].problem and "It would fit with" in findings[6.0, 6.0].fix


@pytest.mark.parametrize(("gib", "verdict"), [(64, "ok"), (4, "FAIL")])
def test_without_a_card_the_machines_own_memory_counts(gib: int, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_bytes", lambda: gib * 2**30)
    findings = examine(QLORA, ["steps=[sft]"])
    card, memory = by_check(findings, "card"), by_check(findings, "memory")
    assert (
        card.verdict == "note" and "is meant for rtx-4090, which this machine lacks; there it would fit" in card.problem
    )
    assert memory.verdict == verdict and f"on the CPU, estimated; this machine has {gib}.0" in memory.problem
    assert memory.fix == ("" if verdict == "ok" else "Run it on rtx-4090, or use a smaller base.")
    (unnamed,) = [f for f in examine(QLORA, ["steps=[sft]", "run.gpu=null"]) if f.check in ("card", "memory")]
    assert unnamed.verdict == verdict and ("more memory or a card" in unnamed.fix) == (verdict == "FAIL")
    (too_small, *_) = doctor._memory(load(QLORA, ["run.gpu=4GiB"]), [])
    assert too_small.verdict == "note" and "there it would not fit" in too_small.problem and too_small.fix


def test_a_full_disk_and_an_old_python_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 2**30))
    findings = [finding for finding in examine(QLORA, []) if finding.check == "disk"]
    assert {finding.verdict for finding in findings} == {"FAIL"}
    words = " ".join(finding.problem for finding in findings)
    assert "2.0 GiB free" in words and "download of the base 12.6" in words
    # 160 M weights of adapters: three checkpoints of 2 + 12 bytes a weight; sft, three reward models, rs and ppo.
    one_at_a_time = by_check(examine(QLORA, ["run.jobs=1"]), "disk").problem
    assert "checkpoints 6.3" in one_at_a_time and "results of 6 steps 1.8" in one_at_a_time
    kept = by_check(examine(QLORA, ["run.keep_checkpoints=true"]), "disk").problem
    assert "checkpoints 37.5" in kept and "results of 6 steps 1.8" in kept
    monkeypatch.setattr(doctor, "PYTHON_NEEDED", (9, 0))
    assert next(doctor._environment()).problem.endswith("9.0 or newer is needed")


def test_what_nvidia_smi_and_torch_print_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = find_torch()
    assert torch is not None and torch.version.startswith("2.")

    def answers(text: str, status: int = 0) -> None:
        done = SimpleNamespace(stdout=text, returncode=status)
        monkeypatch.setattr(devices.subprocess, "run", lambda *args, **kwargs: done)

    answers("NVIDIA GeForce RTX 4090, 24564, 24000, 560.35.03\nNVIDIA GB10, [N/A], [N/A], 580.1\n")
    (device,) = find_devices()
    assert (device.name, round(device.total_gib, 1), device.driver) == ("NVIDIA GeForce RTX 4090", 24.0, "560.35.03")
    answers("NVIDIA-SMI has failed", 9)
    assert find_devices() == [] and find_torch() is None

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", absent)
    assert find_devices() == []


def test_the_fix_of_an_error_is_its_last_sentence() -> None:
    assert doctor._problem_and_fix(LlamachatError("a: found. why. Do this.")) == ("a: found. why.", "Do this.")
    assert doctor._problem_and_fix(LlamachatError("all")) == ("all", "")


def test_a_table_keeps_its_columns_and_ends_with_what_fails() -> None:
    failing = [Finding("disk", "FAIL", "word " * 60, "[way] out"), Finding("data", "note", "none", "way")] * 2
    lines = report([*failing, Finding("memory", "FAIL", "sft", "way")]).splitlines()
    assert lines[0].startswith("disk    FAIL  word") and lines[1].startswith(" " * 14) and "[way] out" in lines[2]
    assert lines[-1].startswith("3 checks failed: disk (2 times), memory. The fix follows '->' on each FAIL line.")


# -- a base that is not what it seems


def damaged_base(folder: Path, damage: str) -> Path:
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.md"))
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "header":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "zeros":
        weights.write_bytes(bytes(weights.stat().st_size))
    elif damage == "lfs":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 10101336\n")
    elif damage == "index":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    elif damage == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif damage == "rows":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 4000}))
    elif damage == "config":
        config.write_text('{"model_type": "llama", ')
    return folder


DAMAGES = {
    "truncated": (r"model\.safetensors: holds \d+ bytes of 10101336", "Fetch it again"),
    "header": (r"model\.safetensors: holds 1000 bytes, and no whole header", "Fetch it again"),
    "empty": (r"model\.safetensors: holds 0 bytes, and no whole header", "Fetch it again"),
    "zeros": (r"model\.safetensors: holds 10101336 bytes, and no whole header", "Fetch it again"),
    "lfs": (r"model\.safetensors: is a Git LFS pointer", "git lfs pull"),
    "index": (r"index\.json: cannot be read", "Download it again"),
    "adapter": (r"an adapter \(adapter_config\.json\) is next to the weights", "Merge it"),
    "rows": (r"vocab_size is 4000, but the tokenizer in the same folder has 4096 pieces", "enlarge its embedding"),
    "config": (r"config\.json: is no whole configuration", "Fetch it again"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_that_are_no_numbers_are_named(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    largest = torch.finfo(dtype).max
    sound = {"a": torch.tensor([1.0, -largest, 0.0], dtype=dtype), "b": torch.tensor([[largest]], dtype=dtype)}
    save_file(sound | {"ids": torch.tensor([-1])}, tmp_path / "sound.safetensors")
    save_file(sound | {"b": torch.tensor([[value]], dtype=dtype)}, tmp_path / "faulty.safetensors")
    assert nonfinite_tensors(tmp_path / "sound.safetensors") == []
    assert nonfinite_tensors(tmp_path / "faulty.safetensors") == ["b"]


def test_the_doctor_reads_the_weights_once_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    reads = []
    monkeypatch.setattr(doctor, "nonfinite_tensors", lambda file: reads.append(file) or nonfinite_tensors(file))
    folder = shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("*.md"))
    recipe = write_recipe(tmp_path / "recipe")
    options = [f"base.model={folder}"]
    assert [by_check(examine(recipe, options), "weights").verdict for _ in range(2)] == ["ok", "ok"]
    assert len(reads) == 1
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    finding = by_check(examine(recipe, options), "weights")
    assert (finding.verdict, len(reads)) == ("FAIL", 2) and "model.norm.weight" in finding.problem


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_is_seen_by_the_doctor_and_refused_as_it_is_loaded(tmp_path: Path, damage: str) -> None:
    folder = damaged_base(tmp_path / "base", damage)
    findings = examine(write_recipe(tmp_path / "recipe"), [f"base.model={folder}"])
    problem, fix = DAMAGES[damage]
    failing = [finding for finding in findings if finding.verdict == "FAIL"]
    assert any(re.search(problem, finding.problem) and fix in finding.fix for finding in failing), findings
    with pytest.raises(LlamachatError, match="config.json" if damage == "config" else problem):
        proved_start(base := base_section(folder), Tuning(), None)
        load_base(base)
