"""Every image gets its own mask in every layout, or the folder is refused in one sentence."""

from __future__ import annotations

import io
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_nepa.config import ConfigError, MaskConfig
from megatron_nepa.data.decoding.masks import check_masks
from megatron_nepa.data.index.headers import UnreadableImageError
from megatron_nepa.data.index.mask_file import mask_size, mask_values
from megatron_nepa.data.index.pair_layouts import CITYSCAPES, PASCAL_VOC, PairLayout, pair_layout
from megatron_nepa.data.index.pairs import class_names, pair_index
from megatron_nepa.data.index.sources import list_source
from tests.conftest import Examples

VALUES = np.array([[0, 1, 2], [3, 1, 0]], np.uint8)
CITY, CITY_MASK = "leftImg8bit/train/ulm/u_{}_leftImg8bit.png", "gtFine/train/ulm/u_{}_gtFine_{}.png"
VOC_LIST = "ImageSets/Segmentation/train.txt"


def touch(root: Path, files: Iterable[str]) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listed(root: Path, split: str = "training") -> dict[str, str]:
    index = list_source(root, split)
    return {index.names[i]: index.masks[i] for i in range(len(index))}


def plain(*masks: str) -> list[str]:
    return ["images/a.jpg", "images/b.jpg", *(f"annotations/{name}" for name in masks)]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (plain("a.png", "a.webp", "b.png"), r"several masks for one image, 1 time.*annotations/a.png and .*a.webp"),
        (plain("a.png", "a.PNG", "b.png"), r"annotations/a.PNG and annotations/a.png: keep one"),
        ([*plain("a.png"), "images/a.png"], r"several images for one mask.*images/a.jpg and images/a.png"),
        (plain("a.json", "b.txt"), "none of the 2 images"),
        (plain("a_mask.png"), r"images/a.jpg is an image, annotations/a_mask.png a mask"),
        ([*plain("a.png"), "images/training/c.jpg"], "2 images .* beside the folder training"),
        (["images/train/a.jpg", "annotations/a.png"], "but no annotations/train with its masks"),
        (["images/big/a.jpg", "annotations/big/a.png"], r"no images/training: choose a split that it has \(big\)"),
        (["images/.a.jpg", "annotations/a.png"], "holds no images"),
        (
            [CITY.format(1), CITY_MASK.format(1, "labelIds")],
            r"labelIds only, the first ulm/u_1: .*csCreateTrainIdLabelI",
        ),
        ([CITY.format(1), "gtFine/train/ulm/u_1_gtFine_color.png"], r"which holds no \*_gtFine_labelTrainIds.png"),
        (["JPEGImages/a.jpg", "SegmentationClass/a.png"], "no training.txt: write its names there"),
    ],
)
def test_refused_by_name(tmp_path: Path, files: list[str], sentence: str) -> None:
    touch(tmp_path, files)
    with pytest.raises(ConfigError, match=sentence):
        list_source(tmp_path)


def test_other_files_are_no_masks(tmp_path: Path) -> None:
    """Polygons, notes and thumbnails beside masks; what has no partner is left out by name."""
    touch(tmp_path, [*plain("a.png", "a.json", "a.txt", "Thumbs.db", ".a.png", "c.png", ".b/b.png"), "images/.x/y.jpg"])
    assert listed(tmp_path) == {"images/a.jpg": "annotations/a.png"}
    assert list_source(tmp_path).quarantine == (
        ("images/b.jpg", "has no mask"),
        ("annotations/c.png", "a mask without an image"),
    )


def test_splits_go_by_both_names_and_nest(tmp_path: Path) -> None:
    """Equal names in other folders are other pairs; a link that leads back is not followed."""
    for kind, ending in (("images", "jpg"), ("annotations", "png")):
        touch(tmp_path, [f"{kind}/{name}.{ending}" for name in ("train/a/1", "train/b/1", "val/1")])
    (tmp_path / "images/train/a/loop").symlink_to(tmp_path / "images/train")
    expected = {f"images/train/{name}/1.jpg": f"annotations/train/{name}/1.png" for name in "ab"}
    assert listed(tmp_path, "training") == listed(tmp_path, "train") == expected
    assert listed(tmp_path, "validation") == {"images/val/1.jpg": "annotations/val/1.png"}


def test_cityscapes(tmp_path: Path) -> None:
    """labelTrainIds alone are masks, whatever else lies in gtFine."""
    kinds = ("labelTrainIds", "labelIds", "instanceIds", "color")
    touch(tmp_path, [CITY.format(1), CITY.format(2), *(CITY_MASK.format(n, kind) for n in (1, 2) for kind in kinds)])
    expected = {CITY.format(n): CITY_MASK.format(n, "labelTrainIds") for n in (1, 2)}
    assert listed(tmp_path) == expected
    assert pair_layout(tmp_path) is CITYSCAPES
    (tmp_path / CITY_MASK.format(2, "labelTrainIds")).unlink()
    with pytest.raises(ConfigError, match=r"1 image of .* with labelIds only, the first ulm/u_2"):
        list_source(tmp_path)


def test_masks_that_no_file_holds_are_no_masks(tmp_path: Path) -> None:
    """A pipe would be read for ever, a link may lead nowhere: the image has no mask, and both are counted."""
    touch(tmp_path, [*plain("b.png"), "images/c.jpg", "annotations/more/c.json"])
    os.mkfifo(tmp_path / "annotations/a.png")
    (tmp_path / "annotations/c.png").symlink_to("nowhere.png")
    index = list_source(tmp_path)
    assert [index.names[i] for i in range(len(index))] == ["images/b.jpg"]
    assert index.quarantine == (("images/a.jpg", "has no mask"), ("images/c.jpg", "has no mask"))
    (note,) = index.notes
    for part in (
        "neither file nor folder 1 (annotations/a.png)",
        "lead nowhere 1 (annotations/c.png)",
        "kinds 1 (annota",
    ):
        assert part in note


def test_names_of_masks_may_be_written_in_the_other_form(tmp_path: Path) -> None:
    touch(tmp_path, ["images/e\u0301.jpg", "annotations/\u00e9.png"])
    assert listed(tmp_path) == {"images/e\u0301.jpg": "annotations/\u00e9.png"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("\ufeffa\r\n\nb\n", None),
        ("a\nx\n", r"1 of the 2 names .* missing in .*JPEGImages; the first: \['x'\]"),
        ("a\nc\n", r"missing in .*SegmentationClass; the first: \['c'\]"),
        ("a\nb\na\n", "lists a 2 times"),
        ("\n", "lists no names"),
    ],
)
def test_pascal_voc(tmp_path: Path, text: str, sentence: str | None) -> None:
    """The list decides: most images have no mask, and that is no fault."""
    touch(tmp_path, [*(f"JPEGImages/{name}.jpg" for name in "abcd"), *(f"SegmentationClass/{n}.png" for n in "abd")])
    (tmp_path / VOC_LIST).parent.mkdir(parents=True)
    (tmp_path / VOC_LIST).write_text(text)
    if sentence is None:
        assert listed(tmp_path) == {f"JPEGImages/{name}.jpg": f"SegmentationClass/{name}.png" for name in "ab"}
        assert not list_source(tmp_path).quarantine
        with pytest.raises(ConfigError, match=r"no test.txt: choose a split that it has \(train\)"):
            list_source(tmp_path, "test")
    else:
        with pytest.raises(ConfigError, match=sentence):
            list_source(tmp_path)


@pytest.mark.parametrize("layout", [CITYSCAPES, PASCAL_VOC])
def test_known_layouts_have_class_names(tmp_path: Path, layout: PairLayout) -> None:
    """Wrong flags are told the right ones; a classes.txt makes the layout one's own."""
    for folder in (layout.images, layout.masks):
        (tmp_path / folder).mkdir()
    number = len(layout.classes)
    assert number in (19, 21)
    assert class_names(tmp_path, MaskConfig(number, reduce_zero_label=False)) == layout.classes
    for wrong in (MaskConfig(), MaskConfig(number), MaskConfig(number + 1, reduce_zero_label=False)):
        with pytest.raises(ConfigError, match=rf"{layout.title}'s layout.*: set {number} and false, or name"):
            class_names(tmp_path, wrong)
    (tmp_path / "classes.txt").write_text("sky\nsea\n", encoding="utf-8-sig")
    assert class_names(tmp_path, MaskConfig(2)) == ("sky", "sea")


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def grey_of_few_bits(bits: int) -> bytes:
    """A PNG of ``VALUES`` in 2 or 4 bits of grey, which Pillow reads but does not write."""
    indexed = Image.fromarray(VALUES, "P")
    indexed.putpalette(bytes(range(48)))
    content = encoded(indexed, bits=bits)
    start = content.index(b"PLTE") - 4
    end = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
    header = content[12:25] + b"\0" + content[26:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:start] + content[end:]


def palette() -> Image.Image:
    image = Image.fromarray(VALUES, "P")
    image.putpalette(bytes(range(100, 112)))
    return image


GREY = Image.fromarray(VALUES)


@pytest.mark.parametrize(
    ("content", "outcome"),
    [
        (encoded(GREY), VALUES),
        (encoded(palette()), VALUES),
        (grey_of_few_bits(2), VALUES),
        (grey_of_few_bits(4), VALUES),
        (encoded(Image.fromarray(VALUES % 2 > 0)), VALUES % 2),
        (encoded(Image.fromarray(VALUES.astype(np.uint16) * 300)), VALUES.astype(np.uint16) * 300),
        (encoded(GREY, "TIFF"), VALUES),
        (encoded(GREY, "TIFF", tiffinfo={262: 0}), "photometric interpretation 0: write it as PNG"),
        (encoded(Image.fromarray(VALUES.astype(np.float32)), "TIFF"), "pixels of mode F, not one label each"),
        (encoded(GREY, "JPEG"), "a JPEG changes the labels"),
        (encoded(GREY, "WEBP", lossless=True), "masks are PNG or TIFF, not WEBP"),
        (encoded(GREY, "BMP"), "masks are PNG or TIFF, not BMP"),
        (encoded(GREY.convert("RGB")), "pixels of mode RGB"),
        (encoded(GREY.convert("RGBA")), "pixels of mode RGBA"),
        (encoded(GREY, save_all=True, append_images=[GREY.rotate(180)]), "2 pictures"),
        (encoded(GREY)[:50], "truncated|broken|end of file"),
        (b"{}", "it is no image"),
        (b"", "it is no image"),
    ],
)
def test_kinds_of_mask_files(content: bytes, outcome: np.ndarray | str) -> None:
    """Each is read exactly as stored, or refused with the reason."""
    if isinstance(outcome, str):
        with pytest.raises(UnreadableImageError, match=outcome):
            mask_values(content)
    else:
        assert np.array_equal(mask_values(content), outcome)
        assert mask_size(content) == (3, 2)


@pytest.mark.parametrize(
    ("stored", "masks", "sentence"),
    [
        ([0, 1], MaskConfig(2, False), None),
        (
            [0, 255],
            MaskConfig(2, False),
            r"1 of 2 classes never occur.*: 1 \(b\); they hold the values 0 and 255, which",
        ),
        ([0, 1], MaskConfig(2), r"2 \(b\); they hold the values 1 and 0 and 255, which are ignored.*reduce_zero_label"),
        ([0], MaskConfig(3, False), r"1 \(b\), 2 \(c\); they hold the values 0\."),
        ([255], MaskConfig(2, False), "!has a class"),
        ([0], MaskConfig(2), "!where 0 is a class, set --masks.reduce_zero_label false"),
        ([0, 7], MaskConfig(2, False), "!holds the value 7, but the classes are 0 to 1"),
        ([0, 256], MaskConfig(2, False), "!holds the value 256"),
        ([65535], MaskConfig(2), "!holds the value 65535"),
    ],
)
def test_classes_that_never_occur_are_said(
    tmp_path: Path, stored: list[int], masks: MaskConfig, sentence: str | None
) -> None:
    """A leading ! marks what is refused."""
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
    for name in "ab":
        values = np.resize(np.array(stored, np.uint16 if max(stored) > 255 else np.uint8), (4, 4))
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(values).save(tmp_path / "annotations" / f"{name}.png")
    index = pair_index(str(tmp_path), "training")
    if sentence is not None and sentence.startswith("!"):
        with pytest.raises(ConfigError, match=sentence[1:]):
            check_masks(index, masks, 0.0, "abc")
        return
    said = check_masks(index, masks, 0.0, "abc")
    assert said is None if sentence is None else said is not None and re.search(sentence, said), said


STEMS = st.sampled_from(["a", "b", "c.d", "e_mask", "é", "x y", "sub/a", ".h"])
MASK_ENDINGS = st.sampled_from([".png", ".PNG", ".tif", ".json", ".txt", ""])


def test_generated_folders(tmp_path: Path, examples: Examples) -> None:
    """Any mixture of names and endings: exactly the true pairs, or a refusal."""
    kinds = st.sets(st.tuples(STEMS, st.sampled_from([".jpg", ".png", ".txt"])), max_size=6)

    @given(
        images=kinds, masks=st.sets(st.tuples(STEMS, MASK_ENDINGS), max_size=8), part=st.sampled_from(["", "train/"])
    )
    def every_image_has_its_own_mask(images: set[tuple[str, str]], masks: set[tuple[str, str]], part: str) -> None:
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        for kind, files in (("images", images), ("annotations", masks)):
            (root / kind / part).mkdir(parents=True)
            touch(root, (f"{kind}/{part}{stem}{ending}" for stem, ending in files))
        real = {stem: [s + e for s, e in masks if s == stem and e in (".png", ".PNG", ".tif")] for stem, _ in masks}
        pictures = [(s, e) for s, e in images if e != ".txt" and s != ".h"]
        paired = [(s, e) for s, e in pictures if real.get(s)]
        truth = {f"images/{part}{s}{e}": f"annotations/{part}{real[s][0]}" for s, e in paired}
        unclear = len({s for s, _ in paired}) < len(paired) or any(len(real[s]) > 1 for s, _ in paired)
        subfolders_alone = not part and {s for s, _ in pictures} <= {"sub/a"}
        try:
            found = listed(root, "train")
        except ConfigError:
            assert unclear or not truth or subfolders_alone
        else:
            assert not unclear
            assert found == truth

    examples(every_image_has_its_own_mask)
