"""DualVisionEncoder: the Python face of the project. Load, chat, ask which encoder an answer relied on.

It owns a model, its processor and one engine; every call is one or more requests through that engine.
Messages are Qwen's: {"role", "content": text or parts}, images as paths, PIL images, bytes or data URLs.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from model_core.analysis import compare
from model_core.analysis.benchmark import Benchmark, run_benchmark
from model_core.checkpoint import Loaded, LoadOptions, combine_checkpoints, load_checkpoint, save_checkpoint
from model_core.config import check_dropout
from model_core.demo_model import demo_folder
from model_core.engine.build import build_engine
from model_core.engine.config import EngineConfig
from model_core.engine.engine import ContinuousEngine
from model_core.engine.weight_watch import WeightWatch
from model_core.errors import ConfigError, InvalidRequestError
from model_core.fusion.attribution import summarise_weights
from model_core.hub import LOADING, SAVING, UPLOADING, check_options, upload
from model_core.processing.batch import InputFormat
from model_core.processing.fetching import FetchImage, check_fetch, with_fetched
from model_core.processing.images import ImageLimits
from model_core.types import (
    Arm,
    ChatMessage,
    GenerationRequest,
    ImagePart,
    ModelInfo,
    SamplingParams,
    TokenEvent,
    VideoPart,
    messages_from_dicts,
)
from model_core.variant import load_variant, own_bytes

#: Of `from_pretrained`.
_OPTIONS = ("device", "dtype", "use_flash_attention", "engine_config", "model_id", "fetch_image", *LOADING)
_UPLOADS_ONLY = "Leave it out; what belongs to an upload needs push_to_hub=True"

Key = TypeVar("Key")
Messages = Sequence[Any]  # of dictionaries in Qwen's format, or of ChatMessage


class DualVisionEncoder:
    """One vision-language model with two eyes.

    Args:
        qwen_model_name, dinov2_model_name: hub ids or local folders of the two public checkpoints, both
            or neither. Without names: the demo model that comes with the package.
        common_dim: width both encoders are projected to; None is the language model's.
        dropout: on fused tokens in training.
        fusion: strategy name, or `package.module:Class`.
        use_flash_attention: None uses it where it is installed and the device is CUDA.
        device: None or "auto" picks CUDA if there is one.
        dtype: None is the checkpoint's own.
        engine_config: sizes of the batch and of the caches.
        fetch_image: your function from an http(s) URL to the bytes there; without it URLs are refused. Nothing is
            downloaded but by it; its bytes have the limits of any other picture's, and what it raises comes through.
        settings: further fields of DualVisionConfig (encoder, static_weights, dinov2_max_patches).
    Raises:
        CheckpointError, HubUnreachableError, ConfigError: see model_core.errors.
    """

    fetch_image: FetchImage | None = None

    def __init__(  # noqa: PLR0913  a public constructor, by keywords
        self,
        qwen_model_name: str | Path | None = None,
        dinov2_model_name: str | Path | None = None,
        *,
        common_dim: int | None = None,
        dropout: float = 0.0,
        fusion: str = "gated",
        use_flash_attention: bool | None = None,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        engine_config: EngineConfig | None = None,
        model_id: str | None = None,
        fetch_image: FetchImage | None = None,
        **settings: Any,
    ) -> None:
        self.fetch_image = check_fetch(fetch_image)
        options = LoadOptions(device or "auto", dtype, use_flash_attention)
        if (qwen_model_name is None) != (dinov2_model_name is None):
            raise ConfigError(
                "one of the two checkpoints is missing",
                value=f"qwen_model_name={qwen_model_name}, dinov2_model_name={dinov2_model_name}",
                allowed="both names, or neither for the demo model",
                fix="Give the other one too",
            )
        if qwen_model_name is None:
            asked = {"common_dim": common_dim, **settings} | ({"fusion": fusion} if fusion != "gated" else {})
            wrong = sorted(key for key, value in asked.items() if value is not None)
            if wrong:
                raise ConfigError(
                    "the demo model is already built, its architecture can't be changed", value=", ".join(wrong),
                    allowed="dropout, device, dtype, use_flash_attention, engine_config, model_id, fetch_image",
                    fix="Name two checkpoints to build a model of your own",
                )  # fmt: skip
            check_dropout(dropout)
            demo = load_checkpoint(demo_folder(), options)
            demo.model.config.dropout = demo.model.fusion.dropout.p = dropout
            self._set_up(demo, model_id or "dve-demo", engine_config)
        else:
            chosen = {"common_dim": common_dim, "dropout": dropout, "fusion": fusion, **settings}
            loaded = combine_checkpoints(qwen_model_name, dinov2_model_name, options, **chosen)
            self._set_up(loaded, model_id or f"dual-{Path(str(qwen_model_name)).name}", engine_config)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        use_flash_attention: bool | None = None,
        engine_config: EngineConfig | None = None,
        model_id: str | None = None,
        fetch_image: FetchImage | None = None,
        **hub: Any,
    ) -> DualVisionEncoder:
        """A saved dual checkpoint, folder or hub id. `hub`: revision, token, cache_dir, local_files_only.

        Raises:
            ConfigError: an option that this call does not have. CheckpointError, HubUnreachableError: as the class's.
        """
        check_options(hub, _OPTIONS)
        self = cls.__new__(cls)
        self.fetch_image = check_fetch(fetch_image)
        loaded = load_checkpoint(name, LoadOptions(device or "auto", dtype, use_flash_attention), **hub)
        self._set_up(loaded, model_id or Path(str(name)).resolve().name, engine_config)
        return self

    @classmethod
    def from_loaded(cls, loaded: Loaded, model_id: str, engine_config: EngineConfig | None = None) -> DualVisionEncoder:
        """Around a model that is already in memory (a trainer's, a test's)."""
        self = cls.__new__(cls)
        self._set_up(loaded, model_id, engine_config)
        return self

    def beside(self, folder: str | Path, model_id: str, engine_config: EngineConfig | None = None) -> DualVisionEncoder:
        """A published version of this model (variant.py) with an engine of its own, load-tested.

        What the two have in common is in memory once. Both belong to one thread; making the second may happen in
        another one while the first is at work.
        Raises:
            CheckpointError: the version is damaged, of another base, or computes no numbers.
        """
        base = Loaded(self.model, self.processor, self.info.fingerprint.removeprefix("fp_"))
        loaded = load_variant(Path(folder), base)
        made = type(self).__new__(type(self))
        made._set_up(loaded, model_id, engine_config, beside=self.engine)
        made.configure(self.format.limits)
        made.fetch_image = self.fetch_image
        return made

    def bytes_beside(self, base: DualVisionEncoder) -> int:
        """Memory that this model and its engine take, or may take, beside the base's."""
        sizes = own_bytes(self.model, base.model) + self.engine.cache_bytes
        decoder = self.engine.runner.decoder
        if decoder is not base.engine.runner.decoder:
            sizes += decoder.copied_bytes
        return sizes

    def _set_up(
        self,
        loaded: Loaded,
        model_id: str,
        engine_config: EngineConfig | None,
        *,
        beside: ContinuousEngine | None = None,
    ) -> None:
        self.model, self.processor = loaded.model.eval(), loaded.processor
        processor, config = loaded.processor, loaded.model.config
        processor.check_patches(config)
        self.format = InputFormat.of(processor, loaded.model.model.mrope_layout)
        info = ModelInfo(
            model_id=model_id,
            fingerprint=f"fp_{loaded.fingerprint or 'unsaved'}",
            fusion=config.fusion,
            fusion_trained=loaded.model.fusion.is_trained,
            encoders=tuple(loaded.model.model.encoders),
            max_context_tokens=config.text_config.max_position_embeddings,
            device=str(loaded.model.device),
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            num_parameters=sum(p.numel() for p in loaded.model.parameters()),
            created_unix=loaded.created_unix,
        )
        sizes, eos = engine_config or EngineConfig(), loaded.eos_ids
        self.engine = build_engine(self.model, self.format, info, eos, sizes, time.perf_counter, beside=beside)
        self.info = self.engine.info
        self._weights = WeightWatch(self.model)
        self._ids = itertools.count()
        self._inbox: dict[str, deque[TokenEvent]] = {}

    def save_pretrained(
        self, folder: str | Path, *, max_shard_size: int | str | None = None, push_to_hub: bool = False, **hub: Any
    ) -> None:
        """One folder: config, sharded safetensors, tokenizer, processor, manifest last; whole or not at all.

        Args:
            max_shard_size: of one file of weights, in bytes or as "500MB"; None is 4GB.
            hub: with push_to_hub, repo_id (default: the folder's name) and what `push_to_hub` takes.
        Raises:
            ConfigError: an option that this call does not have; nothing is written.
        """
        known = (*SAVING, "repo_id", *UPLOADING) if push_to_hub else SAVING
        check_options(hub, known, otherwise=_UPLOADS_ONLY)
        save_checkpoint(self.model, self.processor, folder, max_shard_size=max_shard_size)
        if push_to_hub:
            repo_id = hub.pop("repo_id", Path(folder).name)
            self.push_to_hub(repo_id, max_shard_size=max_shard_size, **hub)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None,
        max_shard_size: int | str | None = None, **commit: Any,
    ) -> Any:  # fmt: skip
        """Upload the very folder that `save_pretrained` writes. commit: commit_message, revision, create_pr.

        Raises:
            ConfigError: an unknown option; nothing is created.
        """
        check_options(commit, UPLOADING)
        options: dict[str, Any] = {"private": private, "token": token, "max_shard_size": max_shard_size}
        return upload(self.model, self.processor, repo_id, commit=commit, **options)

    def chat(
        self,
        messages: Messages,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
        arm: Arm = "fused",
        **sampling: Any,
    ) -> str:
        """The assistant's answer.

        Args:
            messages: Qwen's message format; images as path, PIL image, bytes, data URL, or a URL for `fetch_image`.
            temperature: 0 is greedy. sampling: top_p, top_k, min_p, stop.
            arm: which eyes are open; see model_core.types.ARMS.
        Raises:
            InputError: anything wrong with the messages or the pictures.
        """
        stream = self.chat_stream(
            messages, max_tokens=max_tokens, temperature=temperature, seed=seed, arm=arm, **sampling
        )
        return "".join(stream)

    def chat_stream(
        self,
        messages: Messages,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
        arm: Arm = "fused",
        **sampling: Any,
    ) -> Iterator[str]:
        """The same answer, in pieces as they come."""
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, **sampling)
        request = GenerationRequest(self._next_id(), self._messages(messages), params, arm)
        for event in self._run(request):
            if event.text:
                yield event.text

    def analyze_fusion_weights(self, messages: Messages) -> dict[str, Any]:
        """How the gate routed the images: `{encoder}_weight` as means over images, and each image's own.

        Weights are None where the strategy has no gate. A weight is a routing weight; what an answer
        relied on is measured by `compare_encoders`.
        Raises:
            InvalidRequestError: there is no image.
        """
        parsed = self._messages(messages)
        if not any(isinstance(part, (ImagePart, VideoPart)) for m in parsed for part in m.parts):
            allowed, fix = "at least one image", 'Add a part {"type": "image", "image": ...}'
            raise InvalidRequestError("there is no image to analyze", value="text only", allowed=allowed, fix=fix)
        request = GenerationRequest(self._next_id(), parsed, encode_only=True)
        (event,) = self._run(request)
        return summarise_weights(event.fusion, self.info.encoders)

    def compare_encoders(
        self, messages: Messages, *, max_tokens: int = 64, temperature: float = 0.0, seed: int | None = None
    ) -> compare.Comparison:
        """Each arm's own answer, and how likely the fused answer is under each: what it really relied on."""
        parsed, prefix = self._messages(messages), self._next_id()
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
        requests = compare.answer_requests(prefix, parsed, params)
        first: dict[Arm, GenerationRequest] = {"fused": requests.pop("fused")}
        # The fused arm first and alone, so that its encoder times are of these pictures and not of five copies.
        answers = self.run_requests(first) | self.run_requests(requests)
        token_ids = answers["fused"].token_ids
        scores = self.run_requests(compare.score_requests(prefix, parsed, token_ids)) if token_ids else {}
        return compare.summarise(answers, scores)

    def run_requests(self, requests: Mapping[Key, GenerationRequest]) -> dict[Key, TokenEvent]:
        """Run several requests as one batch; the events of each folded into one (text and ids joined).

        Raises:
            DualVisionError: the first error of any of them; the others are aborted.
        """
        prepared = [self._prepare(request) for request in requests.values()]  # all of them, or none is queued
        events: dict[str, list[TokenEvent]] = {r.request_id: [] for r in requests.values()}
        streams = {p.request_id: self._events(p) for p in prepared}
        try:
            for request_id, stream in streams.items():
                events[request_id] = list(stream)
        finally:
            for stream in streams.values():
                stream.close()
        return {key: compare.collect_answer(events[request.request_id]) for key, request in requests.items()}

    def benchmark(self, messages: Messages, *, max_tokens: int = 64, rounds: int = 10) -> Benchmark:
        """Time this conversation stage by stage, alone on the engine, warmed up."""
        request = GenerationRequest("bench", self._messages(messages), SamplingParams(max_tokens=max_tokens))
        self.engine.runner.decoder.compile_loops(wait=True)
        return run_benchmark(self.engine, request, time.perf_counter, rounds=rounds, prepare=self._prepare)

    def warm_up(self) -> None:
        """One picture and two tokens through everything, so that the first user does not pay for it; and what may be
        compiled for those after him is begun."""
        parts: list[Any] = [{"type": "image", "image": Image.new("RGB", (112, 112), "grey")}]
        parts.append({"type": "text", "text": "hi"})
        self.chat([{"role": "user", "content": parts}], max_tokens=2)
        self.engine.runner.decoder.compile_loops(wait=False)

    def configure(self, limits: ImageLimits) -> None:
        """Other picture limits for every request from now on.

        Raises:
            ConfigError: no image at all would be within them, with both numbers.
        """
        limits.check_visual_tokens(self.format.patches.min_image_tokens * self.model.fusion.tokens_per_cell)
        self.format = replace(self.format, limits=limits)
        self.engine.runner.fmt = self.format

    def _messages(self, messages: Messages) -> tuple[ChatMessage, ...]:
        given = tuple(m for m in messages if isinstance(m, ChatMessage))
        parsed = given if given and len(given) == len(messages) else messages_from_dicts(messages)
        return with_fetched(parsed, self.fetch_image)

    def _run(self, request: GenerationRequest) -> Iterator[TokenEvent]:
        return self._events(self._prepare(request))

    def _events(self, prepared: Any) -> Generator[TokenEvent, None, None]:
        """Queue a request at once; its events as they are asked for, whoever else uses the engine meanwhile."""
        if self._weights.has_changed():
            self.engine.reset_caches()
        self.engine.add_request(prepared)
        self._inbox[prepared.request_id] = deque()
        return self._read(prepared.request_id)

    def _read(self, request_id: str) -> Generator[TokenEvent, None, None]:
        inbox, finished = self._inbox[request_id], False
        try:
            while not finished:
                while not inbox:
                    self._pump()
                event = inbox.popleft()
                finished = event.is_terminal
                if event.error is not None:
                    raise event.error
                yield event
        finally:
            self._inbox.pop(request_id, None)
            if not finished:
                self.engine.abort(request_id)

    def _pump(self) -> None:
        """One step of the engine; each event to the stream that waits for it."""
        for event in self.engine.step():
            if event.request_id in self._inbox:
                self._inbox[event.request_id].append(event)

    def _prepare(self, request: GenerationRequest) -> Any:
        # Paths are for whoever holds the Python object; a server's engine never opens one.
        return self.engine.prepare(request, replace(self.format, allow_paths=True))

    def _next_id(self) -> str:
        return f"local-{next(self._ids)}"
