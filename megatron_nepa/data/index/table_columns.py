"""Which columns of an Arrow or parquet table hold the images, their masks and their labels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_nepa.config import ConfigError, require

if TYPE_CHECKING:
    import pyarrow as pa

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values")
_MASK_NAMES = ("annotation", "mask", "label", "labels", "segmentation_mask", "semantic_segmentation", "annotated")
_LABEL_NAMES = ("label", "labels", "cls", "class")


@dataclass(frozen=True)
class Columns:
    """The columns of a table that a run reads.

    Attributes:
        image: encoded images, as bytes or as structs of bytes and a path.
        mask: encoded segmentation masks, likewise; None where there are none.
        label: class numbers or names; None where there are none.
        classes: class names by number, where the table knows them.
        notes: what the user should know about the choice.
    """

    image: str
    mask: str | None = None
    label: str | None = None
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def choose_columns(schema: pa.Schema, features: dict[str, Any], where: str) -> Columns:
    """The columns that hold images, masks and labels.

    Args:
        schema: of the table; the features that ``datasets`` writes into its metadata go before ``features``.
        features: what ``dataset_info.json`` beside the table says, {} where there is none.
        where: the table, for messages.

    Raises:
        ConfigError: no column of images, or several and nothing tells which to take.
    """
    features = _features_in(schema) or features
    kinds = {name: value.get("_type", "") for name, value in features.items() if isinstance(value, dict)}
    images = [name for name in schema.names if _holds_bytes(schema.field(name).type)]
    declared = [name for name in images if kinds.get(name) == "Image"]
    image, mask = _image_and_mask(declared or images, bool(declared), schema.names, where)
    label, notes = _label(schema, kinds, {image, mask})
    names = features.get(label, {}).get("names") if label is not None and kinds.get(label) == "ClassLabel" else None
    classes = tuple(map(str, names)) if isinstance(names, list) else None
    return Columns(image, mask, label, classes, notes)


def _features_in(schema: pa.Schema) -> dict[str, Any]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold encoded images."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        kind = kind.field(place).type if place >= 0 else pa.null()
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_and_mask(candidates: list[str], declared: bool, names: list[str], where: str) -> tuple[str, str | None]:
    require(
        bool(candidates),
        f"{where} has no column of encoded images (binary, or structs of bytes and a path); its columns are "
        f"{', '.join(names) or 'none'}.",
    )
    if len(candidates) == 1:
        return candidates[0], None
    images = [name for name in candidates if name.lower() in _IMAGE_NAMES]
    masks = [name for name in candidates if name.lower() in _MASK_NAMES]
    if len(images) == 1 and len(candidates) == 2 and len(masks) == 1 and declared:
        return images[0], masks[0]
    if len(images) == 1 and not declared:
        return images[0], None
    raise ConfigError(
        f"{where} has several columns of images, {', '.join(candidates)}, and their names do not tell which one to "
        'train on: name it "image" (and its segmentation masks "mask"), or drop the others.'
    )


def _label(schema: pa.Schema, kinds: dict[str, str], taken: set[str | None]) -> tuple[str | None, tuple[str, ...]]:
    import pyarrow as pa

    def is_label(kind: pa.DataType) -> bool:
        types = pa.types
        kind = kind.value_type if types.is_dictionary(kind) else kind  # such as pandas' categories
        tests = (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
        return any(test(kind) for test in tests)

    named = [name for word in _LABEL_NAMES for name in schema.names if name.lower() == word and name not in taken]
    possible = [name for name in schema.names if name not in taken and is_label(schema.field(name).type)]
    classes = [name for name in possible if kinds.get(name) == "ClassLabel"]
    labels = [name for name in named if name in possible]
    if labels:
        return labels[0], ()
    if named and not classes:
        return None, (f"no labels are taken from column {named[0]}, which holds {schema.field(named[0]).type}",)
    if len(classes) > 1:
        return None, (f"no labels are taken, since {', '.join(classes)} could be them: rename one to label",)
    return (classes[0] if classes else None), ()
