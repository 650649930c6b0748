"""A step's run in wandb: continued on resuming, offline without an account, and never a reason to stop.

It gets numbers, pictures of curves and the configuration, and text only if the caller passes it. What wandb
collects by itself (code, console, command line, user, host, error reports) is off; `tracking.system_stats` and
`tracking.git` turn on the hardware usage and the git state.
Names there differ from those of the table (`names_in_wandb`), since wandb makes a panel for each name and sorts them.
Each offline session has its own folder, so a resumed step writes its whole record again and removes the earlier
folders: the result is one folder per step, without rows written after the last checkpoint. Online, wandb's own row
number is the step, and rows that the server already has are not sent twice.
"""

import json
import logging
import netrc
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from llamachat.config.sections import Tracking
from llamachat.errors import first_line
from llamachat.runs.artifacts import Artifact, StepFolder
from llamachat.runs.atomic import write_json
from llamachat.runs.inputs import StepInputs

logger = logging.getLogger(__name__)

_INIT_TIMEOUT_S = 10.0
_FINISH_TIMEOUT_S = 30.0
# When the command is killed, wandb's service ends without writing its buffer, and the dashboard reads the file live.
_FLUSH_INTERVAL_S = 1.0
_WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
_SHARED_GROUPS = ("optim", "time", "throughput", "memory")
_FIRST = "0_main"  # the section that wandb shows first
_HEADLINES = {
    "sft/eval_loss": "sft_eval_loss",
    "rm/eval_accuracy": "rm_eval_accuracy",
    "rs/reward_best": "rs_reward_best",
    "dpo/eval_accuracy": "dpo_eval_accuracy",
    "ppo/reward/combined": "reward_combined",
    "ppo/reward/helpfulness": "reward_helpfulness",
    "ppo/reward/safety": "reward_safety",
    "ppo/kl_to_reference": "kl_to_reference",
    "ppo/heldout/judge": "judge",
    "ppo/response_tokens": "response_tokens",
}
_MEASURED_ONCE = re.compile(r"(?P<step>[^/]+)/(?P<kind>test|probe)/(?P<rest>.+)")
Where = Literal["online", "offline"]


class WandbRun:
    """An open wandb run; if `run` is None, or after the first failure, it accepts everything and sends nothing."""

    def __init__(self, run: Any = None, axis: str = "") -> None:
        self._run = run
        self._axis = axis
        self._summary: dict[str, float] = {}
        # Rows below this are already on the server (a resumed online run); 0 offline.
        self._first_step = 0 if run is None else int(run.step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send one row at `step`; rows with equal steps are merged."""
        if step >= self._first_step:
            self._send(step, lambda: {name: value for key, value in values.items() for name in names_in_wandb(key)})

    def image(self, step: int, name: str, path: Path) -> None:
        """Send a picture."""
        self._send(step, lambda: {names_in_wandb(name)[0]: _wandb().Image(str(path))})

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Send a distribution of values."""
        if step >= self._first_step:
            self._send(step, lambda: {names_in_wandb(name)[0]: _wandb().Histogram(list(values))})

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send rows of text, with the columns of the first row."""
        if step >= self._first_step:
            columns = list(rows[0])
            data = [[_cell(row.get(column)) for column in columns] for row in rows]
            self._send(step, lambda: {name: _wandb().Table(columns=columns, data=data)})

    def summary(self, values: Mapping[str, float]) -> None:
        """Keep the final figures, set when the run is closed."""
        self._summary.update({names_in_wandb(name)[0]: value for name, value in values.items()})

    def finish(self, exit_code: int) -> None:
        """Close the run; what could not be sent stays on the disk for `wandb sync`."""
        # The last row is still open and would overwrite final figures of its names if they were set before it.
        self._guard(lambda run: run.log({}, commit=True))
        self._guard(lambda run: run.summary.update(self._summary))
        self._guard(lambda run: run.finish(exit_code=exit_code))
        # An offline run is still being written when `finish` returns, until wandb's service ends.
        self._guard(lambda _: _wandb().teardown())
        self._run = None

    def _send(self, step: int, values: Callable[[], Mapping[str, Any]]) -> None:
        self._guard(lambda run: run.log({**values(), self._axis: step}, step=step))

    def _guard(self, action: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # no failure of wandb stops the training
            logger.warning("wandb failed (%s); metrics.jsonl has all figures.", error)
            self._run = None


def names_in_wandb(name: str) -> tuple[str, ...]:
    """The names under which wandb gets a figure: its own, and for a few important ones a name in a section of their
    own.

    The reward models share their names, so that wandb draws them in one panel; figures measured once, on test prompts,
    are in the section `test`, apart from the curves.
    """
    own = re.sub(r"^rm/(?:helpfulness|safety|judge)/", "rm/", name)
    if once := _MEASURED_ONCE.fullmatch(own):
        return (f"test/{once['step']}/{'' if once['kind'] == 'test' else 'probe/'}{once['rest']}",)
    return (own, f"{_FIRST}/{_HEADLINES[own]}") if own in _HEADLINES else (own,)


def open_wandb_run(inputs: StepInputs, prefix: str) -> WandbRun:
    """The step's run: offline if online fails, or one that sends nothing if wandb cannot be used at all."""
    tracking, step, run_dir = inputs.tracking, inputs.step, Path(inputs.run.dir).resolve()
    where = _where(tracking)
    if where is None:
        return WandbRun()
    parent = run_dir.parent
    run_id = run_id_of(inputs, prefix)
    name = f"{run_dir.name}/{step}"
    before = _folders(parent, run_id)
    arguments = {
        "project": tracking.project,
        "dir": str(parent),
        "group": run_dir.name,
        "job_type": step,
        "name": name if prefix.partition("/")[0] == step.partition("/")[0] else f"{name} ({prefix})",
        "id": run_id,
        "resume": "allow",
        "config": readable_config(inputs),
    }
    run = _start(arguments, where, prefix, tracking)
    if run is None and where == "online":
        logger.warning("wandb cannot be reached; this step is recorded offline (`wandb sync` uploads it later).")
        _forget_failed_start(parent, run_id, before)
        run = _start(arguments, "offline", prefix, tracking)
    if run is None:
        _forget_failed_start(parent, run_id, before)
        return WandbRun()
    _remove(folder for folder in before if folder.name.startswith("offline-"))
    if not run.offline:
        _remember(inputs.folder, f"{prefix} url", run.url)
        logger.info("%s: wandb: %s", step, run.url)
    return WandbRun(run, _axis(prefix))


def wandb_places(step_folder: StepFolder, runs: Path) -> list[str]:
    """Where wandb has the runs of a step: a URL, or the folder of an offline run below the folder of all runs."""
    known = _known(step_folder)
    places = []
    for prefix, run_id in known.items():
        if prefix.endswith(" url"):
            continue
        offline = sorted(folder for folder in _folders(runs, run_id) if folder.name.startswith("offline-"))
        if offline:
            places.append(f"{offline[-1]} (offline; `wandb sync` uploads it)")
        elif f"{prefix} url" in known:
            places.append(known[f"{prefix} url"])
    return places


def readable_config(inputs: StepInputs) -> dict[str, Any]:
    """What decides the step's result, with names of files and models instead of their digests, for comparing runs."""
    own, config = inputs.identity, dict(inputs.identity)
    config["base"] = {**own.get("base", {}), "model": _file_name(inputs.base.model)}
    config["data"] = data = dict(own.get("data", {}))
    for key in (key for key, sources in data.items() if isinstance(sources, list)):
        entries = zip(data[key], getattr(inputs.data, key), strict=True)
        data[key] = [{**entry, "path": _file_name(source.path)} for entry, source in entries]
    if "scoring" in own:
        names = {key: getattr(inputs.scoring, key) for key in ("combine", "helpfulness", "safety")}
        names["combine"] = inputs.reward_function or names["combine"]
        config["scoring"] = {**own["scoring"], **{key: one and _file_name(one) for key, one in names.items()}}
    read = {f"reward_model/{which}": artifact for which, artifact in inputs.reward_models.items()}
    read |= {f"{artifact.manifest.kind}/{artifact.manifest.step}": artifact for artifact in inputs.surveyed}
    read |= {f"dialogs/{step}": artifact for step, artifact in inputs.pooled.items()}
    read |= {"policy": inputs.policy} if inputs.policy else {}
    config["inputs"] = {
        key: _step_name(read[key]) if key in read else one for key, one in own.get("inputs", {}).items()
    }
    config["run"] = {**own.get("run", {}), "dir": Path(inputs.run.dir).resolve().name}
    return config if inputs.tracking.upload_text else without_system_texts(config)


def _file_name(path: str) -> str:
    """A relative path or a hub name unchanged; of an absolute path the last parts, which do not identify its owner."""
    return path if not Path(path).is_absolute() else Path(path).name


def _step_name(artifact: Artifact) -> str:
    step = artifact.manifest.step
    run = artifact.path.absolute().parent.as_posix().removesuffix(f"/{step}")
    return f"{Path(run).name}/{step}"


def _axis(prefix: str) -> str:
    return names_in_wandb(f"{prefix}/step")[0]


def _where(tracking: Tracking) -> Where | None:
    """Online only with a key, since wandb would ask for one on the terminal."""
    wish = os.environ.get("WANDB_MODE") if tracking.mode == "auto" else tracking.mode
    if wish in ("off", "disabled"):
        return None
    if wish in ("offline", "dryrun"):
        return "offline"
    if _has_key():
        return "online"
    if wish == "online":
        logger.warning("tracking.mode is online, but no wandb key is set; recording offline. `wandb login` sets one.")
    return "offline"


def _has_key() -> bool:
    """Whether wandb would find an account without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = [*_WANDB_HOSTS, re.sub(r"^https?://|/.*$", "", os.environ.get("WANDB_BASE_URL", ""))]
    netrc_path = os.environ.get("NETRC")
    for path in [Path(netrc_path)] if netrc_path else [Path("~/.netrc"), Path("~/_netrc")]:
        try:
            entries = netrc.netrc(str(path.expanduser()))
        except (OSError, RuntimeError, netrc.NetrcParseError):
            continue
        if any(host and entries.authenticators(host) for host in hosts):
            return True
    return False


def run_id_of(inputs: StepInputs, prefix: str) -> str:
    """The id that this step's earlier commands used, else a new one."""
    known = _known(inputs.folder)
    if prefix not in known:
        name = f"{Path(inputs.run.dir).resolve().name}-{inputs.step}"
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[-80:]
        known = _remember(inputs.folder, prefix, f"{readable}-{secrets.token_hex(4)}")
    return known[prefix]


def _known(step_folder: StepFolder) -> dict[str, str]:
    """The ids of the step's runs by the prefix of their metrics, and the URL of an online one under the prefix with '
    url'."""
    try:
        values: Any = json.loads(step_folder.wandb.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: one for key, one in values.items() if isinstance(one, str)} if isinstance(values, dict) else {}


def _remember(step_folder: StepFolder, key: str, value: str) -> dict[str, str]:
    known = {**_known(step_folder), key: value}
    write_json(step_folder.wandb, known)
    return known


def _folders(parent: Path, run_id: str) -> set[Path]:
    return set((parent / "wandb").glob(f"*run-*-{run_id}"))


def _forget_failed_start(parent: Path, run_id: str, before: set[Path]) -> None:
    """Clean up after a failed start: its folder, and the id that wandb's service still considers in use."""
    with suppress(Exception):
        _wandb().teardown()
    _remove(_folders(parent, run_id) - before)


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _start(arguments: Mapping[str, Any], where: Where, prefix: str, tracking: Tracking) -> Any:
    try:
        wandb = _wandb()
        run = wandb.init(**arguments, mode=where, settings=_settings(wandb, tracking))
        axis = _axis(prefix)
        run.define_metric(axis, hidden=True)
        for group in (axis.rpartition("/")[0], _FIRST, *_SHARED_GROUPS):
            run.define_metric(f"{group}/*", step_metric=axis)
    except Exception as error:  # no account, network, space or wandb: the step runs anyway
        logger.warning("wandb (%s) did not start: %s", where, first_line(error))
        return None
    return run


def _wandb() -> Any:
    # Read when wandb is imported: its crash reports contain local variables, which may contain users' texts.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    # A run imports this when it starts. Its classes then search every frame of the call stack in all loaded modules,
    # which takes 4 s from within a step; a new thread has a short stack.
    with ThreadPoolExecutor(1) as thread, suppress(ImportError):  # other versions may not have it
        thread.submit(import_module, "wandb.sdk.launch").result()
    return wandb


def _settings(wandb: Any, tracking: Tracking) -> Any:
    wanted = {
        "console": "off",
        "disable_code": True,
        "disable_git": not tracking.git,
        "disable_job_creation": True,
        "host": "local",
        "finish_timeout": _FINISH_TIMEOUT_S,
        "init_timeout": _INIT_TIMEOUT_S,
        "login_timeout": _INIT_TIMEOUT_S,
        "save_code": False,
        "silent": True,
        "x_disable_machine_info": not tracking.git,
        "x_disable_meta": not tracking.git,
        "x_disable_stats": not tracking.system_stats,
        "x_save_requirements": False,
        "x_transaction_log_flush_interval": _FLUSH_INTERVAL_S,
    }
    # The x_ settings are internal to wandb and change between versions.
    known = type(wandb.Settings()).model_fields
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in known})


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value)


def without_system_texts(value: Any, key: str = "") -> Any:
    """The configuration as it may leave the machine: a system text is part of the users' chats."""
    if key == "system" and isinstance(value, str):
        return f"(a text of {len(value)} characters)"
    if isinstance(value, Mapping):
        return {name: without_system_texts(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_system_texts(item) for item in value]
    return value
