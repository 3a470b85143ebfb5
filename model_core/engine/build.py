"""Puts an engine together for a loaded model: cache sizes from the device, the store that suits it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from model_core.engine.block_manager import BlockManager
from model_core.engine.config import BLOCK_SIZE, EngineConfig
from model_core.engine.decode_graphs import DecodeGraphs
from model_core.engine.encoder_cache import EncoderCache
from model_core.engine.engine import ContinuousEngine
from model_core.engine.model_runner import ModelRunner
from model_core.language.compiled import KERNELS
from model_core.language.decoder import Decoder
from model_core.language.kv_cache import CacheShape
from model_core.language.paged import build_store, num_copies
from model_core.model import DualVisionModel
from model_core.processing.batch import InputFormat
from model_core.types import ModelInfo

LOG = logging.getLogger(__name__)


def build_engine(
    model: DualVisionModel,
    fmt: InputFormat,
    info: ModelInfo,
    eos_ids: frozenset[int],
    config: EngineConfig,
    clock: Callable[[], float],
    *,
    beside: ContinuousEngine | None = None,
) -> ContinuousEngine:
    """The engine's own `info` says the context that it can hold: the model's, or the whole cache if that is less.

    Args:
        beside: an engine that the same thread will turn. What the two models have in common is not made twice: the
            decoder over one language model, the features of one pair of encoders, the grammars of one tokenizer.
    Raises:
        ConfigError: settings that contradict each other or the device, with both numbers.
    """
    decoder = _decoder_of(model, beside, config)
    shape = decoder.cache_shape
    config.check_encode_tokens(fmt.patches.min_image_tokens)
    num_blocks, info = _sizes(config, shape, info)
    blocks = BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=config.enable_prefix_caching)
    store, reason = build_store(
        shape,
        num_blocks,
        BLOCK_SIZE,
        use_flash_attention=model.config._attn_implementation == "flash_attention_2",
        enable_prefix_caching=config.enable_prefix_caching,
    )
    graphs = DecodeGraphs(
        decoder,
        store,
        max_num_seqs=config.max_num_seqs,
        max_context_tokens=info.max_context_tokens,
        joined=decoder.joined,
    )
    num_graphs = graphs.warm_up()
    LOG.info("keys and values in %s", reason)
    if shape.device.type == "cuda":
        LOG.info("decode graphs: %s", graphs.refusal or num_graphs)
    shares_encoders = beside is not None and all(
        model.model.encoder_module(name) is beside.runner.model.model.encoder_module(name)
        for name in model.model.encoders
    )
    runner = ModelRunner(
        model,
        decoder,
        fmt,
        clock,
        store=store,
        features=beside.runner.features if shares_encoders else EncoderCache(config.encoder_cache_bytes),
        graphs=graphs if graphs.is_available else None,
        owns_features=not shares_encoders,
    )
    grammars = beside.grammars if beside is not None and beside.runner.fmt.tokenizer is fmt.tokenizer else None
    return ContinuousEngine(runner, info, eos_ids, blocks, config, grammars=grammars)


def _sizes(config: EngineConfig, shape: CacheShape, info: ModelInfo) -> tuple[int, ModelInfo]:
    """Blocks of the cache, and the model with the context that they hold."""
    free = torch.cuda.mem_get_info(shape.device)[0] if shape.device.type == "cuda" else None
    wanted = config.context_of(info.max_context_tokens)
    copies = num_copies(shape, enable_prefix_caching=config.enable_prefix_caching)
    num_blocks = config.num_blocks(shape, free, wanted, copies=copies)
    context = min(wanted, num_blocks * BLOCK_SIZE)
    if context < wanted:
        LOG.info("the context is %d tokens, of %d: the KV cache holds no more", context, wanted)
    return num_blocks, replace(info, max_context_tokens=context)


def _decoder_of(model: DualVisionModel, beside: ContinuousEngine | None, config: EngineConfig) -> Decoder:
    language_model, lm_head = model.model.language_model, model.lm_head
    if (
        beside is not None
        and beside.runner.decoder.model is language_model
        and beside.runner.decoder.lm_head is lm_head
    ):
        return beside.runner.decoder
    kernels = KERNELS if config.compiles_decode else None
    return Decoder(language_model, lm_head, joins_weights=config.joins_weights, kernels=kernels)
