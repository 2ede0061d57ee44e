"""Trackers of experiments: TensorBoard, Weights & Biases, MLflow and Trackio, by their documented Python APIs.

Sources: the documentation of `wandb.init`, `mlflow.start_run` and `trackio.init`.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from asit.config import RunSettings, custom_classes, yaml
from asit.errors import ConfigError
from asit.io import atomic
from asit.training import run_dir
from asit.training.callbacks import Callback, Guarded

log = logging.getLogger(__name__)

PROJECT = "asit"
SECONDS = 20
"""How long a tracker may take to find its server."""


class TensorBoard(Callback):
    """Event files in RUN/tensorboard."""

    def on_start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """Open the files; what an earlier try wrote after `step` is removed."""
        from torch.utils.tensorboard import SummaryWriter

        self.board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)  # type: ignore[no-untyped-call]

    def on_metrics(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)

    def on_end(self, finished: bool) -> None:
        """Close the files."""
        self.board.close()


class WandB(Callback):
    """A run of Weights & Biases; project, entity and mode are those of its environment variables (WANDB_...)."""

    def on_start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """Start the run, or continue it."""
        import wandb

        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=_kept(folder, "wandb"),
            resume="allow",
            dir=str(_folder(folder)),
            config=dict(settings),
            # No terminal is asked for a key, and nothing is printed among the run's lines.
            settings=wandb.Settings(silent=True, init_timeout=SECONDS, login_timeout=SECONDS),
        )
        _keep(folder, "wandb", self.run.id)

    def on_metrics(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers."""
        self.run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def on_end(self, finished: bool) -> None:
        """End the run."""
        self.run.finish(exit_code=0 if finished else 1)


class MLflow(Callback):
    """A run of MLflow; server and experiment are those of MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""

    def on_start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """Start the run, or continue it."""
        import mlflow

        self.mlflow: Any = mlflow
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & set(os.environ):
            mlflow.set_experiment(PROJECT)
        earlier = _kept(folder, "mlflow")
        run = mlflow.start_run(run_id=earlier, run_name=None if earlier else folder.name)
        if not earlier:
            parameters = [(name, str(value)) for name, value in yaml.flat(settings)]
            for at in range(0, len(parameters), 100):  # a server takes no more at once
                mlflow.log_params(dict(parameters[at : at + 100]))
        _keep(folder, "mlflow", run.info.run_id)

    def on_metrics(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers."""
        self.mlflow.log_metrics({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def on_end(self, finished: bool) -> None:
        """End the run."""
        self.mlflow.end_run("FINISHED" if finished else "KILLED")


class Trackio(Callback):
    """A run of Trackio, in its local database; a Space is that of TRACKIO_SPACE_ID."""

    def on_start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """Start the run, or continue it."""
        import trackio

        # Runs continue by their names, and folders of several projects may have the same one.
        name = _kept(folder, "trackio") or f"{folder.name}-{os.urandom(3).hex()}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.run: Any = trackio.init(project=project, name=name, config=dict(settings), resume="allow", embed=False)
        _keep(folder, "trackio", name)

    def on_metrics(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers."""
        self.run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def on_end(self, finished: bool) -> None:
        """End the run."""
        self.run.finish()


TRACKERS: dict[str, tuple[Callable[[], Callback], str, str]] = {
    "tensorboard": (TensorBoard, "torch.utils.tensorboard", "asit-audio[tensorboard]"),
    "wandb": (WandB, "wandb", "wandb"),
    "mlflow": (MLflow, "mlflow", "mlflow"),
    "trackio": (Trackio, "trackio", "trackio"),
}
"""Trackers by the names of `records.trackers`, with the module each needs and what installs it."""


def chosen(settings: RunSettings) -> list[Callback]:
    """Return the trackers of a run, guarded, and its own callbacks, for the process that writes its records.

    Raises:
        ConfigError: the package of a tracker that was asked for is not installed, or there is no such callback.
    """
    records, found = settings.records, list[Callback]()
    for name, (made, module, package) in TRACKERS.items():
        asked = name in records.trackers
        setting, without = f"records.trackers names {name}", "leave it out of --records.trackers"
        if name == "tensorboard" and not asked:
            if not records.tensorboard:
                continue
            asked = records.tensorboard != "auto"
            setting, without = "records.tensorboard is true", "pass --records.tensorboard False"
        elif not asked:
            continue
        try:
            importlib.import_module(module)
        except ImportError as error:
            if not asked:
                log.info(f"TensorBoard files are not written: pip install '{package}' to have them")
                continue
            fix = f"pip install '{package}', or {without}"
            raise ConfigError(f"{setting}, and the package {name} is not installed", name, fix) from error
        found.append(Guarded(name, made))
    return found + [custom_classes.find(name, Callback, "records.callbacks")() for name in records.callbacks]


def _folder(folder: Path) -> Path:
    """Return the folder for trackers' own files, within that of the run."""
    own = folder / run_dir.TRACKERS
    own.mkdir(exist_ok=True)
    return own


def _kept(folder: Path, tracker: str) -> str | None:
    """Return a tracker's own name of the run, under which it is continued on resume."""
    path = folder / run_dir.TRACKERS / f"{tracker}.txt"
    return (path.read_text("utf-8").strip() or None) if path.is_file() else None


def _keep(folder: Path, tracker: str, name: str) -> None:
    atomic.write_text(_folder(folder) / f"{tracker}.txt", name + "\n")
