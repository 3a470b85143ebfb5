"""A run's folder: complete steps, the newest first, which to keep, and which one to resume.

    outputs/
        recipe.json         what was asked
        events.jsonl        what happened
        step-120/           a model folder; trainer.json, optimizer, adapters, auxiliary (.safetensors) beside
        checkpoint_latest   a link to the newest step; best, to the best one
        final/              the result: an ordinary model folder
        summary.json        what came of it

In: paths and what to write; out: folders that are whole or not there. It knows no model and trains nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from model_core.errors import CheckpointError, CheckpointIncompleteError, ConfigError, StorageFullError
from model_core.manifest import MANIFEST_NAME, recover, verify_folder
from model_core.training.config import CheckpointConfig, TrainConfig, parse_config
from model_core.training.events import EVENTS_NAME

TRAINER_NAME, OPTIMIZER_NAME, ADAPTERS_NAME = "trainer.json", "optimizer.safetensors", "adapters.safetensors"
AUXILIARY_NAME = "auxiliary.safetensors"
LATEST, BEST, FINAL, RECIPE, SUMMARY = "checkpoint_latest", "best", "final", "recipe.json", "summary.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class StepFolder:
    """One step's checkpoint. reason: epoch, stage, every, requested or final."""

    path: Path
    step: int
    reason: str
    stage: int
    metrics: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "step": self.step, "reason": self.reason, "metrics": dict(self.metrics)}


class RunFolder:
    """The folder of one run, this process its only writer."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._release: Callable[[], object] = lambda: None

    def begin(self, config: TrainConfig) -> None:
        """Make the folder for a new run. What one of the same recipe left that died before its first step goes.

        Raises:
            ConfigError: another run lives there. StorageFullError: it can't be written.
        """
        self.check_free(config)
        with storage(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.tidy()
            (self.path / EVENTS_NAME).unlink(missing_ok=True)
            for link in (LATEST, BEST):  # a run that went on from another folder's step points there
                if (self.path / link).is_symlink():
                    (self.path / link).unlink()
            write_json(self.path / RECIPE, config.model_dump(mode="json"))
        self._hold()

    def check_free(self, config: TrainConfig, resume: Path | None = None) -> None:
        """Can a run of this recipe begin here, or the one of `resume`, a run's folder or a step of one, go on?

        What has no step to go on from is in nobody's way, where its recipe was the same and its process is gone.

        Raises:
            ConfigError: another run lives here.
        """
        if resume is not None and _run_of(resume).resolve() == self.path.resolve():
            return
        taken = [name for name in (EVENTS_NAME, RECIPE, FINAL) if (self.path / name).exists()]
        taken += [folder.name for folder, _ in self._numbered()]
        if not taken:
            return
        what, fix = "another run", f"Go on with it by --resume {self.path}, or name"
        if resume is not None:
            what = "another run than the one to go on with"
            fix = f"Give --set output_dir={_run_of(resume)} to go on where that lies, or name"
        if not self.steps():
            if self._is_held():
                what, fix = "a run that a process is working at", "Wait for it or end it, or name"
            elif set(taken) <= {EVENTS_NAME, RECIPE} and self._has_recipe(config):
                return
            else:
                fix = "It has no step to go on from: move the folder away, or name"
        raise ConfigError(
            f"the output folder holds {what}", value=f"{self.path}: {', '.join(sorted(taken)[:4])}",
            allowed="an empty folder, or none", fix=f"{fix} another --set output_dir=FOLDER", param="output_dir",
        )  # fmt: skip

    def _has_recipe(self, config: TrainConfig) -> bool:
        """Is the recipe that lies here as good as this one?"""
        try:
            return parse_config(json.loads((self.path / RECIPE).read_bytes())).fingerprint() == config.fingerprint()
        except (OSError, ValueError, ConfigError):
            return False

    def _hold(self) -> None:
        """Until a step lies here, or the process ends, no other one takes this for a dead run's folder.

        Disks that can't lock hold nothing.
        """
        descriptor = os.open(self.path / RECIPE, os.O_RDWR)
        self._release = weakref.finalize(self, os.close, descriptor)
        with suppress(OSError):
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _is_held(self) -> bool:
        """By another process, which has not saved a step yet."""
        try:
            descriptor = os.open(self.path / RECIPE, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
        finally:
            os.close(descriptor)
        return False

    def take_over(self, point: ResumePoint, config: TrainConfig) -> None:
        """Go on with a run, here or, where this is another folder, with its events so far copied and its best linked.

        Raises:
            ConfigError: this folder holds a third run.
        """
        if self.path.resolve() == point.run.path.resolve():
            return
        self.begin(config)
        with storage(self.path):
            if (point.run.path / EVENTS_NAME).is_file():
                shutil.copyfile(point.run.path / EVENTS_NAME, self.path / EVENTS_NAME)
            best = point.run.best()
            if best is not None:
                self.point(BEST, best)

    def steps(self) -> list[StepFolder]:
        """Folders that say they are complete, the newest first. Their bytes are not read."""
        found = []
        for folder, step in self._numbered():
            manifest = folder / MANIFEST_NAME
            if not manifest.is_file():
                continue
            try:
                extra = json.loads(manifest.read_bytes())["extra"]
                found.append(StepFolder(folder, step, extra["reason"], int(extra["stage"]), dict(extra["metrics"])))
            except (ValueError, KeyError, TypeError):
                continue  # torn or another's: `newest_complete` tells why when it looks closer
        return sorted(found, key=lambda one: -one.step)

    def step_path(self, step: int) -> Path:
        return self.path / f"step-{step}"

    def point(self, link: str, target: Path) -> None:
        """Make the link point at a step's folder, in one move."""
        temporary = self.path / f".{link}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(target.resolve(), self.path.resolve()))
        os.replace(temporary, self.path / link)

    def link(self, step: Path, *, is_best: bool) -> StepFolder | None:
        """Point at the newest step, and at the best where it is this one; the step, where it lies in this folder."""
        self.point(LATEST, step)
        if is_best:
            self.point(BEST, step)
        found = next((one for one in self.steps() if one.path.name == step.name), None)
        if found is not None:
            self._release()
        return found

    def best(self) -> Path | None:
        link = self.path / BEST
        return link.resolve() if link.is_symlink() and link.exists() else None

    def surplus(self, keep: CheckpointConfig) -> list[Path]:
        """Steps that are not to be kept: all but the last few, the best and the ends of stages."""
        steps = self.steps()
        kept = {one.path for one in steps[: keep.keep_last]}
        if keep.keep_stage_ends:
            kept |= {one.path for one in steps if one.reason in ("stage", "final")}
        best = self.best()
        if keep.keep_best and best is not None:
            kept |= {one.path for one in steps if one.path.resolve() == best}
        return [one.path for one in steps if one.path not in kept]

    def prune(self, keep: CheckpointConfig) -> list[Path]:
        """Remove the surplus; what was removed."""
        gone = self.surplus(keep)
        for folder in gone:
            # The manifest first: a folder that is half gone must not look complete.
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        return gone

    def tidy(self) -> tuple[str, ...]:
        """Clear what a killed writer left behind."""
        return recover(self.path) if self.path.is_dir() else ()

    def _numbered(self) -> Iterator[tuple[Path, int]]:
        if not self.path.is_dir():
            return
        for folder in self.path.iterdir():
            named = _STEP.fullmatch(folder.name)
            if named and folder.is_dir() and not folder.is_symlink():
                yield folder, int(named[1])


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """path: the step to load. torn: newer ones that are damaged, and why."""

    run: RunFolder
    path: Path
    torn: tuple[str, ...]


def find_resume_point(path: str | Path) -> ResumePoint:
    """The step that a run goes on from: the newest complete one of a run folder, or the step folder named.

    `checkpoint_latest` means its run. Every byte of the step that is chosen is hashed.

    Raises:
        CheckpointError: a .pth; CheckpointIncompleteError: nothing complete is there.
    """
    path = Path(path)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise CheckpointError(
            "pickled checkpoints are not read: a pickle can run code", value=str(path),
            allowed="a run folder, or a step-N folder in it",
            fix="Give --resume the output folder of the run; its newest step is found there", param="resume",
        )  # fmt: skip
    run, steps = _steps_meant(path)
    torn: list[str] = []
    for step in steps:
        try:
            _check_whole(step)
            return ResumePoint(run, step, tuple(torn))
        except CheckpointError as error:
            if _names_a_step(path):
                raise
            torn.append(f"{step.name}: {error.what}")
    fix = "Start the run anew without --resume"
    if torn:
        fix = f"Start the run anew without --resume, with {run.path} moved away or another --set output_dir=FOLDER"
    raise CheckpointIncompleteError(
        "there is no complete checkpoint to resume", value=f"{path}{': ' + '; '.join(torn) if torn else ''}",
        allowed="a run folder with at least one step-N, or a step-N folder", fix=fix, param="resume",
    )  # fmt: skip


def read_begun(path: Path) -> dict[str, Any] | None:
    """What `trainer.json` says of the run that `find_resume_point` would go on with; None where none can be read.

    Only the recipe is to be used: nothing of the step is verified, and every step of a run has the same.
    """
    for step in _steps_meant(path)[1]:
        with suppress(CheckpointError):
            return read_trainer(step)
    return None


def _steps_meant(path: Path) -> tuple[RunFolder, list[Path]]:
    """The run that a path means, and what may be gone on from: the step that is named, or all, the newest first."""
    run = RunFolder(_run_of(path))
    if _names_a_step(path):
        return run, [path.resolve()]
    if not any(run._numbered()) and (run.path / LATEST).is_symlink():
        # It went on from another folder's step, and has saved none of its own yet.
        run = RunFolder((run.path / LATEST).resolve().parent)
    return run, [folder for folder, _ in sorted(run._numbered(), key=lambda one: -one[1])]


def _run_of(path: Path) -> Path:
    """The folder of the run that a path means: a step's lies around it."""
    return path.resolve().parent if path.name == LATEST or _names_a_step(path) else path


def _names_a_step(path: Path) -> bool:
    if path.name == LATEST and path.is_symlink():
        return False  # the newest, whichever that is
    return (path / TRAINER_NAME).is_file() or _STEP.fullmatch(path.name) is not None


def _check_whole(step: Path) -> None:
    """Raises CheckpointError: a byte of it is not as it was written, or it is no step of a run."""
    if verify_folder(step, deep=True) is None:
        raise CheckpointIncompleteError(
            f"{MANIFEST_NAME} is missing", value=str(step), allowed="a step-N folder with all that was saved in it",
            fix="Give --resume the folder of the run: its newest complete step is found there", param="resume",
        )  # fmt: skip
    _check_is_step(step)


def _check_is_step(folder: Path) -> None:
    missing = [name for name in (TRAINER_NAME, OPTIMIZER_NAME) if not (folder / name).is_file()]
    if missing:
        raise CheckpointIncompleteError(
            "this folder is a model and no step of a run", value=f"{folder}: no {', '.join(missing)}",
            allowed="a step-N folder", fix="To start a new run from this model, name it as 'model' in the recipe",
            param="resume",
        )  # fmt: skip


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """A full or closed disk as an error that says so."""
    try:
        yield
    except SafetensorError as error:
        if not any(f"(os error {number})" in str(error) for number in _FULL):  # it keeps no errno
            raise
        raise _full(path) from error
    except OSError as error:
        if error.errno in _FULL:
            raise _full(path) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise ConfigError(
                f"the output folder can't be written ({error.strerror})", value=str(path),
                allowed="a folder that this user may write", fix="Name another output_dir", param="output_dir",
            ) from error  # fmt: skip
        raise


def _full(path: Path) -> StorageFullError:
    return StorageFullError(
        "the disk is full; the checkpoint before this one is intact", value=str(path),
        allowed="room for one more checkpoint", fix="Make room and resume, or lower checkpoints.keep_last",
        param="output_dir",
    )  # fmt: skip


def read_trainer(folder: Path) -> dict[str, Any]:
    """What `trainer.json` of a step says.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        content = json.loads((folder / TRAINER_NAME).read_bytes())
        if content["format"] != "dve-trainer" or content["version"] != 1:
            raise ValueError("another format or version")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{TRAINER_NAME} can't be read ({error})", value=str(folder), allowed="format dve-trainer, version 1",
            fix="Name a step-N folder of a run, or another one of its steps",
        ) from error  # fmt: skip
    return content
