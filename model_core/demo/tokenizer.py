"""The demo's tokenizer: a byte-level BPE of Qwen's form, small enough for a small model.

Its merges are built, not counted: words of the demo's own questions and answers grow letter by letter from the
space before them (" d", " do", " dog"), and nothing merges inside a word that has no space before it. Questions
thus take one token a word, while a word that is read off a picture, the whole of an answer, is spelt letter by
letter: reading means letters, never one of a few hundred tokens, and a word never seen before is no harder.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from model_core.demo.canvas import COLOURS
from model_core.demo.questions import phrase_corpus
from model_core.demo.things import THINGS

VOCAB_SIZE = 1536
_SPACE = "\u0120"  # how byte-level BPE writes a space
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

#: Words that start a line without a space: roles, and the answers that are one of a few. Whole where they stand
#: alone, they save a dozen tokens a turn and make a choice one step.
WHOLE_WORDS = ("system", "user", "assistant", "yes", "no", "left", "right", "above", "below", *COLOURS)

# The pre-tokenizer of the Qwen2 family: contractions, words, single digits, punctuation, white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_ENGLISH = """
You are a helpful assistant. I am a small model; I know a few hundred things, shapes, colours and letters, and I
answer short questions about pictures. Please ask what is in a photo, where it is, how many there are and which
colour they have. The answer is yes or no, a number, a colour, a place or a name. Thank you, and good morning!
Can you help me with this? Of course. This is one of the pictures that we took last year when they were here; it
shows some people who had been out for a long time, and then went back to their house. It was not the first time
that he would have said so, but there are other ways to do it than by hand. She said that her work should be
over before the end of the week, and his was just about to begin. What about you? Let us see more of them.
system user assistant image picture video text word words letter letters number describe answer question
You answer questions about pictures. Be precise and short. Answer briefly. You are a careful assistant.
"""

CHAT_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- macro show(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
        {%- set seen.images = seen.images + 1 -%}
        {%- if add_vision_id -%}{{- 'Picture ' ~ seen.images ~ ': ' -}}{%- endif -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part.type == 'video' or 'video' in part -%}
        {%- set seen.videos = seen.videos + 1 -%}
        {%- if add_vision_id -%}{{- 'Video ' ~ seen.videos ~ ': ' -}}{%- endif -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- elif 'text' in part -%}{{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {%- if loop.first and message.role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
  {%- endif -%}
  {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
  {{- show(message.content) -}}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, the same every time: eos <|im_end|>, pad <|endoftext|>, any UTF-8 text survives a round trip."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counts = Counter(piece for text in _corpus() for piece, _ in splitter.pre_tokenize_str(text))
    tokenizer = Tokenizer(models.BPE(*_grow(counts, VOCAB_SIZE - len(SPECIAL_TOKENS) - len(WHOLE_WORDS))))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in WHOLE_WORDS])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _grow(counts: Counter[str], room: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: bytes, then the words of `counts`, the most frequent first, while there is room.

    Names of things come before anything else: they are what is answered.
    """
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    # The space with every letter comes first: spelling in the middle of a sentence needs them all.
    letters = [f"{_SPACE}{letter}" for letter in string.ascii_letters]
    named = {f"{_SPACE}{word}" for thing in THINGS for word in thing.name.split()}
    words = sorted(
        counts.keys() - {f"{_SPACE}{word}" for word in WHOLE_WORDS},
        key=lambda piece: (piece not in named, -counts[piece], piece),
    )
    for word in (*letters, *(word for word in words if _is_grown(word))):
        steps = [word[:end] for end in range(2, len(word) + 1) if word[:end] not in vocab]
        if len(vocab) + len(steps) > room:
            continue
        for token in steps:
            vocab[token] = len(vocab)
            merges.append((token[:-1], token[-1]))
    return vocab, merges


def _is_grown(piece: str) -> bool:
    """Not what starts in lower case (so starts the answer to "read the word"), nor a question typed in capitals."""
    return piece[0] not in string.ascii_lowercase and sum(letter.isupper() for letter in piece if letter != _SPACE) < 2


def _corpus() -> Iterable[str]:
    yield from phrase_corpus()
    for line in _ENGLISH.splitlines():
        yield f" {line}"
