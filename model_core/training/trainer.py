"""DualVisionTrainer: a curriculum of freeze modes as one run that can be stopped anywhere and goes on to the bit.

In: a model, packs, a recipe; out: steps, events, checkpoints, a summary. Time, signals and generated answers are
handed in: `model_core.DualVisionTrainer` does it for Python. It knows no command line, no server and no engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model_core.errors import ConfigError
from model_core.processing.batch import InputFormat
from model_core.training.auxiliary import build_auxiliary, check_loss_weights
from model_core.training.config import FreezeConfig, Stage, TrainConfig, TrainingMode, parse_config
from model_core.training.context import ProcessContext, require_one_process
from model_core.training.curriculum import Curriculum, Position, is_over, stage_steps
from model_core.training.data.packs import BatchSource, PackedBatch
from model_core.training.data.prefetch import ends_of_workers_told
from model_core.training.data.source import as_source, problems_of, quarantine_of, set_aside_of, unused_of
from model_core.training.evaluation import Evaluation, Evaluator, check_evaluation, require_evaluator
from model_core.training.events import Event, EventLog
from model_core.training.forward import PackForward, resolve_precision
from model_core.training.freeze import FreezeTable, resolve_freeze, resolve_stages
from model_core.training.hooks import RunHooks
from model_core.training.loggers import build_loggers, finish_loggers
from model_core.training.lora import apply_lora
from model_core.training.losses import build_gate_loss
from model_core.training.optim import build_optimizer
from model_core.training.reports import Outcome, Speed, run_summary, step_data, timed
from model_core.training.runs import RunFolder, find_resume_point, storage
from model_core.training.saving import RunState, check_room, load_step, save_result, save_step
from model_core.training.scores import Scores
from model_core.training.step import StepPlace, StepResult, StepRunner, non_finite
from model_core.training.verify import FreezeCheck, tell_check


class DualVisionTrainer:
    """Trains a DualVisionModel by a recipe.

    Args:
        model: a DualVisionModel, or a DualVisionEncoder, whose model and processor are taken.
        train_loader, val_loader: a BatchSource, a DualVisionDataset, or a torch DataLoader over one. Without a
            val_loader nothing is evaluated.
        config: a recipe, as TrainConfig or as JSON data.
        processor: where `model` is a DualVisionModel; saved with every checkpoint.
        hooks: who listens, what time it is, who generates answers.
        write: False keeps everything in memory: no run folder, no checkpoint.
    Raises:
        ConfigError: a recipe that contradicts itself, the model or the data.
    """

    def __init__(
        self, model: Any, train_loader: Any, val_loader: Any, config: TrainConfig | Mapping[str, Any], *,
        processor: Any = None, hooks: RunHooks | None = None, context: ProcessContext | None = None, write: bool = True,
    ) -> None:  # fmt: skip
        require_one_process(context)
        self.config = config = config if isinstance(config, TrainConfig) else parse_config(config)
        self.processor = processor if processor is not None else getattr(model, "processor", None)
        if self.processor is None:
            raise ConfigError("the trainer needs the model's processor", value=type(model).__name__, param="processor",
                              allowed="a DualVisionEncoder, or a model with processor=",
                              fix="Give processor= as well")  # fmt: skip
        self.model = model.model if hasattr(model, "compare_encoders") else model
        self._hooks, self._writes, loggers = hooks or RunHooks(), write, build_loggers(config)
        self._listeners = (*self._hooks.listeners, *(loggers if write else ()))
        fmt = InputFormat.of(self.processor, self.model.model.mrope_layout)
        self.train_source: BatchSource = as_source(train_loader, config, fmt, "train")
        if config.lora.groups and not any(".lora_" in name for name, _ in self.model.named_parameters()):
            apply_lora(self.model, config.lora, seed=config.seed)
        precision = resolve_precision(config.precision, self.model)
        spec, recompute = self.processor.patch_spec, config.gradient_checkpointing
        self.forward = PackForward(self.model, spec, precision=precision, recompute=recompute)
        self.auxiliary = build_auxiliary(config, self.model, self.processor)
        check_loss_weights(self.auxiliary, config)
        if self.auxiliary is not None:
            self.forward.watch_layers(self.auxiliary.watched_layers)
        self.curriculum = Curriculum(config, stage_steps(config, self.train_source))
        self.position, self.scores, self._state = Position(), Scores(), RunState()
        tables = resolve_stages(self.model, self.curriculum.stages, has_own_loss=self.auxiliary is not None)
        self.table = tables[0]
        self._reached = [table for table, steps in zip(tables, self.curriculum.steps, strict=True) if steps]
        self.gate_loss = build_gate_loss(self.model, config)
        self.optimizer = build_optimizer(self.model, config, self.table, self.auxiliary)
        self._runner = StepRunner(self.forward, self.optimizer, self.gate_loss, config, self.auxiliary)
        self.evaluator = None
        if val_loader is not None:
            val_source = as_source(val_loader, config, fmt, "val")
            self.evaluator = Evaluator(self.forward, config, val_source, answer=self._hooks.answer)
        check_evaluation(config, self.evaluator)
        self._sources: tuple[BatchSource | None, ...] = (self.train_source, getattr(self.evaluator, "source", None))
        self.run_folder = RunFolder(config.output_dir)
        self._log = EventLog(None, self._listeners)
        self._check: FreezeCheck | None = None
        self._is_begun, self._wants_stop = False, False
        self._requests: deque[Callable[[], object]] = deque()
        self._use(self.table)

    # What others ask of a run

    def request_stop(self) -> None:
        """Save after the step that runs, and return. May be called from a signal handler or another thread."""
        self._wants_stop = True

    def request_checkpoint(self) -> None:
        """Save before the next step and go on. May be called from another thread."""
        self._requests.append(lambda: self._save("requested"))

    def request_freeze(self, freeze: Mapping[str, Any]) -> None:
        """`change_freeze_settings` before the next step, from any thread; wrong settings are a warning."""

        def change() -> None:
            try:
                self.change_freeze_settings(freeze)
            except ConfigError as error:
                self._tell("warning:freeze", str(error), {"freeze": dict(freeze)})

        self._requests.append(change)

    def switch_training_mode(self, mode: TrainingMode | str) -> FreezeTable:
        """Train what `mode` says from the next step on, until the stage ends; the stage's flags and rules go."""
        return self._switch(FreezeConfig().changed({"mode": mode}))

    def change_freeze_settings(self, settings: Mapping[str, Any]) -> FreezeTable:
        """Change flags, rules or mode of what trains now, from the next step on, until the stage ends.

        Raises:
            ConfigError: an unknown name, nothing would train, or the run is over; it goes on as it was.
        """
        return self._switch(self.table.freeze.changed(settings))

    def _switch(self, freeze: FreezeConfig) -> FreezeTable:
        if self.position.stage == len(self.curriculum.stages) or self._stops_early:
            raise is_over(freeze, self.position)
        table = self._resolve(freeze)
        self._state.switched(freeze, self.position)
        self._use(table)
        self._tell("switched", table.render(), table.to_json())
        return table

    # The run

    @ends_of_workers_told()
    def train(self) -> Outcome:
        """Run what is left of the recipe.

        Raises:
            NonFiniteLossError, TrainingMemoryError, StorageFullError, DataError, FreezeViolationError; TrainingError: a
            process that makes packs ended.
        """
        self._begin()
        while self.position.stage < len(self.curriculum.stages):
            if self.curriculum.steps[self.position.stage]:
                reason = "early_stopping" if self._stops_early else self._run_stage()  # as said before a kill
                if reason is not None:
                    return self._end(reason)
            self.position.stage_done()
            self._state.live_freeze = None
        return self._end("done")

    @ends_of_workers_told()
    def evaluate(self) -> Evaluation:
        """Held-out losses, answers and gate, now.

        Raises:
            ConfigError: there is no val_loader. TrainingError: a process that makes packs ended.
        """
        return require_evaluator(self.evaluator).run()

    def resume(self, path: str | Path) -> None:
        """Take over everything of a run folder's newest complete step, or of the step folder named.

        Raises:
            CheckpointError: nothing complete is there. CheckpointMismatchError: another model, recipe or data.
            ConfigError: the output folder holds a third run. Nothing was written then.
        """
        point = find_resume_point(path)
        if self._writes:
            self.run_folder.check_free(self.config, point.path)
        state, tensors = load_step(point.path, self.model, self.config, self._sources, self.auxiliary)
        state.check_gate_loss(self.gate_loss)
        self.curriculum = Curriculum(self.config, stage_steps(self.config, self.train_source))  # as it was planned
        self._state, self.position, self.scores = state, Position(**state.position), Scores(**state.scores)
        live = state.live_freeze
        self._use(self._resolve(self._stage.freeze if live is None else FreezeConfig().changed(live)))
        self.optimizer.load_state_tensors(tensors)
        self.optimizer.load_scalars(state.optimizer)
        if self.gate_loss is not None:
            self.gate_loss.load_state_dict(state.gate_loss)
        self._check = None if state.freeze_check is None else FreezeCheck.from_json(self.table, state.freeze_check)
        if self._writes:
            point.run.tidy()
            self.run_folder.take_over(point, self.config)
        self._open_log()
        self._is_begun = True
        if point.torn:
            torn = "; ".join(point.torn)
            self._tell("warning:torn_checkpoint", f"{torn}. Going on from the one before", {"torn": list(point.torn)})
        if self._writes:
            self._announce(point.path)  # a kill may have come between the folder and its links and event
        self._tell("resumed", f"from {point.path.name}", {"path": str(point.path), **asdict(self.position)})

    @property
    def _stage(self) -> Stage:
        return self.curriculum.stages[min(self.position.stage, len(self.curriculum.stages) - 1)]

    def _begin(self) -> None:
        if self._is_begun:
            return
        if self._writes:
            check_room(self.run_folder.path, self.model, self._reached, self.config)
            self.run_folder.begin(self.config)
        self._open_log()
        self._is_begun = True
        steps = {"steps_per_stage": self.curriculum.steps, "num_steps_total": self.curriculum.total_steps}
        self._tell("validated", f"{self.curriculum.total_steps} steps", {**steps, **problems_of(*self._sources)})
        if unused := unused_of(*self._sources):
            self._tell("warning:loader", "; ".join(unused), {"unused": unused})
        if self.evaluator is not None:
            self._evaluate()
            self.scores = Scores(start=self.scores.latest, latest=self.scores.latest, evaluated_at=0)

    def _open_log(self) -> None:
        folder = self.run_folder.path if self._writes else None
        self._log = EventLog(folder, self._listeners, write="jsonl" in self.config.loggers)

    def _run_stage(self) -> str | None:
        """The rest of the current stage; a reason where the run ends in it."""
        stage, position = self._stage, self.position
        self.train_source.prepare_stage(stage)
        if self._state.begun_stage != stage.index:
            self._begin_stage(stage)
        while position.stage_step < self.curriculum.steps[position.stage]:
            reason = self._run_epoch(stage)
            if reason is not None:
                return reason
        return None

    def _begin_stage(self, stage: Stage) -> None:
        self._state.begun_stage = stage.index
        if stage.reset_optimizer:
            self.optimizer.reset()
        if self._state.live_freeze is None:  # else someone switched before the first step
            self._use(self._resolve(stage.freeze))
        steps = self.curriculum.steps[stage.index]
        mode = self.table.freeze.mode
        data = {"training_mode": mode, "epochs": stage.epochs, "steps": steps}
        self._tell("stage", stage.description or mode or "custom", data)
        self._tell("freeze", self.table.render(), self.table.to_json())

    def _run_epoch(self, stage: Stage) -> str | None:
        position, config = self.position, self.config
        steps = self.train_source.steps(stage, position.epoch, first=position.epoch_step)
        for packs, waited in timed(steps, self._hooks.clock):
            while self._requests:
                self._requests.popleft()()
            self._one_step(stage, packs, waited)
            if position.stage_step == self.curriculum.steps[position.stage]:
                return self._end_of("stage")
            if self._is_due(config.evaluation.every_steps):
                self._evaluate()
                if self._stops_early:
                    return "early_stopping"
                if self.scores.best_step == position.global_step and config.checkpoints.keep_best:
                    self._save("best")
            if self._wants_stop:
                self._save("requested")
                return "requested"
            if self._is_due(config.checkpoints.every_steps):
                self._save("every")
        return self._end_of("epoch")

    def _end_of(self, what: str) -> str | None:
        """An epoch or a stage is over: evaluate, save, and say whether the run ends here."""
        self._evaluate()
        if what == "epoch":
            self.position.epoch_done()
        self._save(what)
        if self._stops_early:
            return "early_stopping"
        return "requested" if self._wants_stop and self.position.global_step < self.curriculum.total_steps else None

    def _one_step(self, stage: Stage, packs: list[PackedBatch], waited: float) -> None:
        position, begin = self.position, self._hooks.clock()
        scale = self.curriculum.scale(position.stage, position.stage_step)
        progress = self.curriculum.progress(position.stage, position.stage_step)
        check = self._check if self._check is not None and self._check.is_open else None
        place = StepPlace(stage, position.epoch, position.global_step, scale, progress)
        result = self._runner.run(packs, place, check)
        speed = Speed(self._hooks.clock() - begin, waited, self._hooks.tower_flops, self._hooks.peak_flops_per_second)
        position.step_done()
        if not result.is_finite:
            self._on_non_finite(result)
            return
        self._state.count_step(packs)
        if check is not None:
            tell_check(check, self.optimizer, self._tell)
        if position.global_step % self.config.log_every_steps and position.global_step != self.curriculum.total_steps:
            return
        data = step_data(result, packs, speed, self.model.config, self.table) | {
            "num_steps_total": self.curriculum.total_steps, "epoch": position.epoch,
            "learning_rates": self.optimizer.learning_rates,
            **self._state.take_counts(self.train_source.dataset_names),
        }  # fmt: skip
        self._tell("step", f"loss {result.loss:.4f}", data)

    def _on_non_finite(self, result: StepResult) -> None:
        failures = self.config.failures
        self._state.skipped_in_a_row += 1
        if failures.nan == "fail" or self._state.skipped_in_a_row > failures.max_skipped_steps:
            raise non_finite(result, self.position.global_step)
        self._tell("warning:skipped_step", f"left out: {result.seen}", asdict(result))

    def _evaluate(self) -> None:
        """Evaluate unless that was done after this very step."""
        if self.evaluator is None or self.scores.evaluated_at == self.position.global_step:
            return
        begin = self._hooks.clock()
        found = self.evaluator.run()
        stopping = self.config.early_stopping
        self.scores.update(found.metrics(), self.position.global_step, stopping)
        data = {**found.to_json(), "seconds": self._hooks.clock() - begin}
        self._tell("evaluation", f"val_loss {found.val_loss:.4f}", data)
        if stopping is not None and self.scores.says_stop(stopping):
            message = f"{stopping.metric} did not improve in {self.scores.num_without_gain} evaluations"
            self._tell("early_stopping", message, self.scores.to_json())

    @property
    def _stops_early(self) -> bool:
        has_more = self.position.global_step < self.curriculum.total_steps
        return has_more and self.scores.says_stop(self.config.early_stopping)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.position.global_step % every == 0

    # Parts

    def _resolve(self, freeze: FreezeConfig) -> FreezeTable:
        return resolve_freeze(self.model, freeze, self._stage.learning_rates, has_own_loss=self.auxiliary is not None)

    def _use(self, table: FreezeTable) -> None:
        self.table = table
        table.apply(self.model)
        self.optimizer.set_freeze(table)
        self.forward.set_freeze(table)
        self._check = FreezeCheck.begin(self.model, self.optimizer, table)

    def _tell(self, kind: str, message: str, data: Mapping[str, Any]) -> None:
        with storage(self.run_folder.path):
            self._log.tell(Event(self.position.stage, self.position.global_step, kind, message, data))

    def _announce(self, folder: Path) -> None:
        """Link the newest step, and the best where it is this one, and tell of it."""
        with storage(folder):
            found = self.run_folder.link(folder, is_best=self.scores.best_step == self.position.global_step)
        if found is not None:
            self._tell("checkpoint", f"{folder.name} ({found.reason})", found.to_json())

    def _save(self, reason: str) -> None:
        if not self._writes:
            return
        state = self._state
        state.position, state.scores, state.freeze = asdict(self.position), asdict(self.scores), self.table.to_json()
        state.optimizer = self.optimizer.scalars()
        state.set_aside = quarantine_of(*self._sources)
        state.gate_loss = None if self.gate_loss is None else self.gate_loss.state_dict()
        state.freeze_check = self._check.to_json() if self._check is not None and self._check.is_open else None
        folder = self.run_folder.step_path(self.position.global_step)
        with storage(folder):
            save_step(
                folder, self.model, self.processor, self.config, state, reason=reason,
                optimizer_tensors=self.optimizer.state_tensors(), data_fingerprint=self.train_source.fingerprint(),
                auxiliary=self.auxiliary,
            )  # fmt: skip
        self._announce(folder)
        self.run_folder.prune(self.config.checkpoints)

    def _end(self, reason: str) -> Outcome:
        best = self.run_folder.best() if self._writes else None
        if reason == "requested":
            self._wants_stop = False  # the request is met: another `train()` goes on
            return Outcome(reason, self.position, self.scores.latest, best)
        if reason == "early_stopping":
            self._save("final")
        summary = run_summary(reason, self.position, self.curriculum, self.scores, self._state)
        summary["quarantined"], final = set_aside_of(*self._sources), None
        if self._writes:
            final = save_result(self.run_folder, self.model, self.processor, self.config, summary)
            names = self.model.fusion.encoder_names
            summary |= finish_loggers(self.config, self.run_folder.path, names, self._tell)
        self._tell("summary", f"{reason} after {self.position.global_step} steps", summary)
        return Outcome(reason, self.position, self.scores.latest, best, final, summary)
