"""The one place where a step writes metrics: to the record on disk first, then to wandb, TensorBoard and Trackio.

Prompts and answers go only to `samples.jsonl` unless `tracking.upload_text` is set: users' chats are private.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llamachat import distributed
from llamachat.errors import ArtifactError, first_line
from llamachat.runs.artifacts import StepFolder
from llamachat.runs.atomic import write_json
from llamachat.runs.inputs import StepInputs
from llamachat.runs.reader import read_summary
from llamachat.runs.record import STEP, TIME, MetricsRecord, SamplesRecord
from llamachat.tracking.metrics import check_names
from llamachat.tracking.wandb_run import WandbRun, open_wandb_run, readable_config, run_id_of

logger = logging.getLogger(__name__)


class Tracker:
    """The open record of one step; on processes other than the main one it accepts everything and writes nothing."""

    def __init__(
        self,
        step_folder: StepFolder,
        prefix: str,
        *,
        upload_text: bool,
        wandb_run: WandbRun,
        tensorboard: Any,
        trackio: Any,
        is_main: bool,
    ) -> None:
        axis = f"{prefix}/step"
        self._folder = step_folder
        self._prefix = prefix
        self._metrics = MetricsRecord(step_folder.metrics, axis=axis)
        self._samples = SamplesRecord(step_folder.samples, axis=axis)
        self._upload_text = upload_text
        self._wandb = wandb_run
        self._tensorboard = tensorboard
        self._trackio = trackio
        self._is_main = is_main
        self._last_step = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line of figures; names must be in the table."""
        check_names(metrics)
        if not self._is_main or not metrics:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self._metrics.append(step, values)
        self._send(step, values)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write prompts and answers, one row each."""
        if not self._is_main or not rows:
            return
        self._samples.append(step, [dict(row) for row in rows])
        if self._upload_text:
            self._wandb.table(step, f"{self._prefix}/samples", rows)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Show a distribution of values, in wandb only: `name` is not a metric, and the record has the mean."""
        self._wandb.histogram(step, f"{self._prefix}/{name}", values)

    def figure(self, name: str, path: Path) -> None:
        """Show a PNG from the step folder."""
        if path.is_file():  # a picture that could not be drawn has been reported already
            self._wandb.image(self._last_step, f"{self._prefix}/{name}", path)

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Add final figures to `summary.json`; those of the step's other parts stay."""
        check_names(metrics)
        if not self._is_main:
            return
        try:
            before = read_summary(self._folder)
        except ArtifactError as error:  # the results of a training are not lost because an older part is damaged
            logger.warning("%s", error)
            before = {}
        values = {**before, **{name: float(value) for name, value in metrics.items()}}
        write_json(self._folder.summary, values)
        self._wandb.summary(values)

    def sync(self) -> None:
        """Flush the record to the disk; to be called before a checkpoint is saved."""
        self._metrics.sync()
        self._samples.sync()

    def resume(self, step: int) -> None:
        """Truncate the record to `step` and send the rest again, so that wandb and TensorBoard have the same lines."""
        self._metrics.cut_back(step)
        self._samples.cut_back(step)
        for step, row in self._own_rows(self._metrics.read()):
            self._send(step, row)
        if self._upload_text:
            by_step: dict[int, list[dict[str, Any]]] = {}
            for step, row in self._own_rows(self._samples.read()):
                by_step.setdefault(step, []).append(row)
            for step, rows in by_step.items():
                self._wandb.table(step, f"{self._prefix}/samples", rows)

    def close(self, exit_code: int) -> None:
        """Close every sink; the record is complete at any moment before that, too."""
        self._metrics.close()
        self._samples.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._with_trackio(lambda run: run.finish())
        self._wandb.finish(exit_code)

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        self._last_step = max(self._last_step, step)
        self._wandb.log(step, values)
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        self._with_trackio(lambda run: run.log(dict(values), step=step))

    def _with_trackio(self, action: Callable[[Any], object]) -> None:
        if self._trackio is None:
            return
        try:
            action(self._trackio)
        except Exception as error:  # as for wandb: no failure of a sink stops the training
            logger.warning("Trackio failed (%s); metrics.jsonl has all figures.", first_line(error))
            self._trackio = None

    def _own_rows(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Step and content of each line on this axis."""
        axis = self._metrics.axis
        for row in rows:
            if axis in row:
                yield int(row[axis]), {name: row[name] for name in row if name not in (STEP, TIME, axis)}


@contextmanager
def open_record(inputs: StepInputs, prefix: str, *, resume_step: int | None) -> Iterator[Tracker]:
    """The tracker of one loop of a step: `prefix` is that of its metrics ('sft', 'rm/helpfulness').

    `resume_step` is the step of the checkpoint that the loop resumes from, None at the start; later lines of the record
    are dropped, and wandb and TensorBoard are made equal to it. Of several processes only the first one writes.
    """
    is_main = distributed.is_first()
    has_tensorboard = is_main and inputs.tracking.tensorboard
    tracker = Tracker(
        inputs.folder,
        prefix,
        upload_text=inputs.tracking.upload_text,
        wandb_run=open_wandb_run(inputs, prefix) if is_main else WandbRun(),
        tensorboard=_open_tensorboard(inputs.folder, prefix) if has_tensorboard else None,
        trackio=_open_trackio(inputs, prefix) if is_main and inputs.tracking.trackio else None,
        is_main=is_main,
    )
    exit_code = 1
    try:
        if is_main:
            tracker.resume(-1 if resume_step is None else resume_step)
        yield tracker
        exit_code = 0
    finally:
        tracker.close(exit_code)


def _open_tensorboard(step_folder: StepFolder, prefix: str) -> Any:
    """A writer on a fresh folder: event files cannot be truncated, and the record is written again anyway."""
    folder = step_folder.tensorboard / prefix
    shutil.rmtree(folder, ignore_errors=True)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        logger.warning("tracking.tensorboard is on, but %s. The figures are in metrics.jsonl.", error)
        return None
    return SummaryWriter(log_dir=str(folder))


def _open_trackio(inputs: StepInputs, prefix: str) -> Any:
    """A new Trackio run; the run of an earlier command of the step is deleted, since the record is written again."""
    name, project = run_id_of(inputs, prefix), inputs.tracking.project
    try:
        import trackio  # pyright: ignore[reportMissingImports]

        with suppress(ValueError):  # the project does not exist yet
            for run in [run for run in trackio.Api().runs(project) if run.name == name]:
                run.delete()
        group = Path(inputs.run.dir).resolve().name
        return trackio.init(project=project, name=name, group=group, config=readable_config(inputs), embed=False)
    except Exception as error:
        logger.warning("tracking.trackio is on, but %s. The figures are in metrics.jsonl.", first_line(error))
        return None
