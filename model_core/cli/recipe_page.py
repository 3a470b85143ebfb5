"""`RECIPES.md`: examples of recipes and data, then every key of a recipe with its type, default and meaning.

In: the recipe's class. Out: a page of Markdown. Of the keys it knows none but the first of each group by name: whatever
the class has is shown. It checks no recipe and loads no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from model_core.training.config import DEFAULT_LEARNING_RATES, TrainConfig

Schema = Mapping[str, Any]

#: The first key of each group of TrainConfig, in its order -> the heading above it.
_GROUPS = {
    "note": "The note",
    "model": "The model",
    "training_mode": "What trains",
    "learning_rate": "How it trains",
    "diversity_loss_weight": "The losses",
    "batch_source": "The data",
    "output_dir": "The run",
}
_ROW = "| key | type | default | meaning |\n|---|---|---|---|\n"

_HEAD = """# Recipes

Written by `dve configs keys`. A recipe is one JSON object, for `dve train --config FILE`, for `DualVisionTrainer` and,
in part, for a fine-tuning job's `fusion`. Every key that has a default may be left out; an unknown one is refused with
the nearest known one. `dve config validate FILE` reads a recipe and says what it comes to, `--set a.b=c` lays a value
over it, and `dve configs create` writes whole recipes to begin with.

## Examples

A plain one. The gate learns at a tenth of the others' rate, as it does where no rate is given; `learning_rate` would be
one rate for all of them. `diversity_loss_weight` is how much the gate's loss counts, which is to keep both encoders in
use (`losses` says which loss that is, and how long it stays); `loggers` are what a run leaves to be looked at.

```json
{
  "qwen_model_name": "Qwen/Qwen2.5-VL-7B-Instruct",
  "dinov2_model_name": "facebook/dinov2-with-registers-base",
  "training_mode": "fusion_only",
  "learning_rates": {"projections": 2e-4, "output_projector": 2e-4, "gate": 2e-5},
  "num_epochs": 3,
  "batch_size": 8,
  "diversity_loss_weight": 1.0,
  "train_data_path": "data/train.json",
  "val_data_path": "data/val.json",
  "image_root": "data",
  "output_dir": "outputs",
  "loggers": ["jsonl", "tensorboard", "curves"]
}
```

Flags instead of a mode: true is frozen. Beside a mode they refine it.

```json
{
  "freeze_config": {
    "freeze_qwen_vision": false,
    "freeze_dinov2": true,
    "freeze_llm": false,
    "freeze_fusion_layers": false,
    "freeze_projections": false
  }
}
```

Stages, one behind the other in one run. Each has a mode, or a `freeze_config` of its own, or both.

```json
{
  "curriculum_training": {
    "enabled": true,
    "stages": [
      {"mode": "fusion_only", "epochs": 3, "description": "Fusion learns to listen to both encoders"},
      {"mode": "encoders_only", "epochs": 4, "description": "The encoders move towards it"},
      {"mode": "full", "epochs": 3, "description": "Everything, slowly", "learning_rate": 1e-6}
    ]
  }
}
```

Rules on parameter names, above mode and flags; of those that match, the last decides. Here the last four of 28 layers
learn slowly beside fusion, whose gate stays as it is.

```json
{
  "training_mode": "fusion_only",
  "freeze_config": {
    "rules": [
      {"pattern": "model.language_model.layers.2[4-7].*", "train": true, "learning_rate": 1e-6},
      {"pattern": "*.fusion.gate.*", "train": false}
    ]
  }
}
```

A mixture with adapters on the language model: three of four samples are questions, whatever the files' sizes.

```json
{
  "training_mode": "full",
  "lora": {"llm": {"rank": 16, "alpha": 32}},
  "datasets": [
    {"type": "vqa", "data_path": "data/vqa.jsonl", "weight": 0.75},
    {"type": "captioning", "data_path": "data/captions.jsonl", "weight": 0.25}
  ],
  "bad_samples": {"policy": "quarantine", "max_ratio": 0.001}
}
```

## Data

A JSON array of rows, or a row a line. Questions about pictures (`vqa`, `medical_vqa`), with as many turns as they take:

```json
[
  {
    "image_path": "images/street.jpg",
    "conversations": [
      {"role": "user", "content": "What colour is the car?"},
      {"role": "assistant", "content": "It is red."},
      {"role": "user", "content": "Is anybody in it?"},
      {"role": "assistant", "content": "No."}
    ]
  },
  {
    "image_path": "images/chest.png",
    "conversations": [
      {"role": "user", "content": "Is there a fracture?"},
      {"role": "assistant", "content": "Of the sixth rib on the left."}
    ]
  }
]
```

Captions (`captioning`): no question, for which `caption_prompt` stands in.

```json
[
  {
    "image_path": "images/evening.jpg",
    "conversations": [
      {"role": "assistant", "content": "The sun goes down behind a ridge of bare mountains."}
    ]
  }
]
```

LLaVA's, ShareGPT's and OpenAI's rows are read too, Parquet, folders of `datasets`, and a zip of any of these with its
pictures.

## In Python

Several data sets as one, drawn from by weight; in two spellings.

```python
from model_core import CaptioningDataset, MultiDataset, VQADataset, create_dataset

mixture = create_dataset(
    {
        "type": "multi",
        "datasets": [
            {"type": "vqa", "args": {"data_path": "vqa.json"}},
            {"type": "captioning", "args": {"data_path": "captions.json"}},
        ],
        "weights": [0.7, 0.3],
    }
)
same = MultiDataset([VQADataset("vqa.json"), CaptioningDataset("captions.json")], weights=[0.7, 0.3])
```

Rows of your own making: override what turns a row into messages.

```python
from model_core import DualVisionDataset


class LastQuestion(DualVisionDataset):
    \"\"\"Only the last question of each row, to be answered in few words.\"\"\"

    def format_conversations(self, conversations, image_path):
        question, answer = conversations[-2:]
        asked = f"{question['content']} Answer in few words."
        return [
            {"role": "user", "content": [{"type": "image", "image": image_path}, {"type": "text", "text": asked}]},
            {"role": "assistant", "content": answer["content"]},
        ]


train = LastQuestion("vqa.json")
messages = train[0]
```

Both go into `DualVisionTrainer(model, train, val, recipe)`, which looks at no name of data or model in its recipe.

## Every key
"""


def recipe_page() -> str:
    """The whole page."""
    schema = TrainConfig.model_json_schema()
    groups = "".join(f"\n### {title}\n\n{_table(part)}" for title, part in _groups(schema))
    sections = "".join(f"\n### {title}\n\n{_table(part)}" for title, part in _sections(schema))
    return f"{_HEAD}{groups}\n{_notes()}{sections}"


def _notes() -> str:
    rates = ", ".join(f"{name} {rate:g}" for name, rate in DEFAULT_LEARNING_RATES.items())
    free = ", ".join(f"`{name}`" for name in TrainConfig.model_fields if name in TrainConfig.HARMLESS)
    return (
        f"Where no rate is given: {rates}.\n\n"
        f"A run is resumed with the recipe that it began with; these may differ: {free}.\n"
    )


def _groups(schema: Schema) -> Iterator[tuple[str, Schema]]:
    """The keys of the recipe itself, by heading."""
    found: dict[str, dict[str, Schema]] = {}
    title = ""
    for name, one in schema["properties"].items():
        title = _GROUPS.get(name, title)
        found.setdefault(title, {})[name] = one
    yield from ((title, {"properties": part, "required": schema.get("required", ())}) for title, part in found.items())


def _sections(schema: Schema) -> Iterator[tuple[str, Schema]]:
    """Every section by the places where it may stand, the outer ones first."""
    places: dict[str, list[str]] = {}
    todo: list[tuple[str, Schema]] = [("", schema)]
    while todo:
        path, section = todo.pop(0)
        for name, one in section["properties"].items():
            for reference, suffix in _references(one):
                is_new = reference not in places
                place = f"{path}{name}{suffix}"
                places.setdefault(reference, []).append(place)
                if is_new:
                    todo.append((f"{place}.", schema["$defs"][reference]))
    for reference, found in places.items():
        yield ", ".join(f"`{place}`" for place in found), schema["$defs"][reference]


def _references(schema: Schema) -> Iterator[tuple[str, str]]:
    """Names of the sections that a key holds, with [] behind its own name where it holds a list of them."""
    for choice in schema.get("anyOf", [schema]):
        if "$ref" in choice:
            yield choice["$ref"].rpartition("/")[2], ""
        elif "$ref" in choice.get("items", {}):
            yield choice["items"]["$ref"].rpartition("/")[2], "[]"


def _table(section: Schema) -> str:
    required = section.get("required", ())
    return _ROW + "".join(
        f"| `{name}` | {_type(one)} | {_default(one, is_needed=name in required)} | {one['description']} |\n"
        for name, one in section["properties"].items()
    )


def _default(schema: Schema, *, is_needed: bool) -> str:
    if is_needed:
        return "needed"
    default = schema["default"]
    holds_section = any(not suffix for _, suffix in _references(schema))
    return "its own, below" if holds_section and default is not None else f"`{json.dumps(default)}`"


def _type(schema: Schema) -> str:
    if "anyOf" in schema:
        return ", or ".join(_type(choice) for choice in schema["anyOf"])
    if "$ref" in schema:
        return "a section, below"
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    kind = schema["type"]
    if kind == "array":
        return _list(schema)
    if kind == "object":
        return _object(schema)
    return {"string": "text", "boolean": "true, false", "null": "null"}.get(kind) or f"{kind}{_range(schema)}"


def _list(schema: Schema) -> str:
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {_type(schema['prefixItems'][0])}"
    return "list of sections, below" if "$ref" in schema["items"] else f"list of {_type(schema['items'])}"


def _object(schema: Schema) -> str:
    values = schema.get("additionalProperties", True)
    if not isinstance(values, Mapping):
        return "object"
    names: Sequence[str] = schema.get("propertyNames", {}).get("enum", ())
    by = ", ".join(f"`{name}`" for name in names) if names else "name"
    return f"object by {by}: {_type(values)}"


def _range(schema: Schema) -> str:
    """Such as ", over 0, up to 1"; nothing where any number will do."""
    words = {
        "minimum": "{} or more",
        "exclusiveMinimum": "over {}",
        "maximum": "up to {}",
        "exclusiveMaximum": "below {}",
    }
    return "".join(f", {text.format(schema[key])}" for key, text in words.items() if key in schema)
