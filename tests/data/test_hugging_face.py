"""Sets in Hugging Face's forms: what ``datasets`` writes is what is listed, read and trained on.

``hugging_face/`` holds a set of 6 images, saved to disk and as parquet, by datasets 1.18.4 (pyarrow 11) and 2.14.7
(pyarrow 14). The others are written by the installed release.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image

from megatron_nepa.config import ConfigError, MaskConfig
from megatron_nepa.data.decoding.masks import load_mask
from megatron_nepa.data.index import table_values
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.folder import read_sizes, scan_folder
from megatron_nepa.data.index.index_file import load_index, save_index
from megatron_nepa.data.index.sources import list_source
from megatron_nepa.data.index.splits import split_of
from megatron_nepa.data.index.storage import ImageStore
from megatron_nepa.data.index.table_values import NotInPlaceError
from megatron_nepa.data.sampling.order import crop_boxes
from tests.data.grids import GRIDS, SEED, Grid, check_grids, seen_on
from tests.data.index_tool import run_tool
from tests.data.test_folders_and_archives import write_tar

OLD = Path(__file__).parent / "hugging_face"
CLASSES = ("ant", "bee", "cow")
FEATURES = Features({"image": ImageFeature(), "label": ClassLabel(names=list(CLASSES))})


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def encoded(number: int, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    size = (20 + number % 7, 24 + number % 5)
    pixels = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode == "RGB" else Image.fromarray(pixels[..., 0] % 3)).save(buffer, kind)
    return buffer.getvalue()


def rows_of(folder: Path) -> dict[str, list[Any]]:
    """The images of an ImageFolder tree, as columns in its order."""
    index = scan_folder(folder)
    names = [index.names[i] for i in range(len(index))]
    images = [{"bytes": (folder / name).read_bytes(), "path": Path(name).name} for name in names]
    return {"image": images, "label": index.label.tolist()}


def few(count: int = 12) -> dict[str, list[Any]]:
    """Some images, half of them without a name, some of them PNG."""
    kinds = ["PNG" if i % 3 == 0 else "JPEG" for i in range(count)]
    images = [{"bytes": encoded(i, kind=kinds[i]), "path": f"a/im_{i}" if i % 2 else None} for i in range(count)]
    return {"image": images, "label": [i % 3 for i in range(count)]}


def assert_holds(index: DatasetIndex, rows: dict[str, list[Any]], classes: tuple[str, ...] = CLASSES) -> None:
    """The index reads the very bytes and labels of the rows."""
    store = ImageStore(index)
    found = [store.read(i).tobytes() for i in range(len(index))]
    assert found == [image["bytes"] for image in rows["image"]]
    assert [-1 if label is None else label for label in rows["label"]] == index.label.tolist()
    assert index.classes == classes


def saved(rows: dict[str, list[Any]], folder: Path, **options: Any) -> Path:
    Dataset.from_dict(rows, features=FEATURES).save_to_disk(folder, **options)
    return folder


def many_batches(rows: dict[str, list[Any]], folder: Path) -> Path:
    """Files of several record batches each, as ``map`` and ``from_generator`` with a small writer batch leave them."""
    data = Dataset.from_dict(rows, features=FEATURES).map(lambda row: row, writer_batch_size=5)
    data.save_to_disk(folder, num_shards=2)
    return folder


def large_offsets(rows: dict[str, list[Any]], folder: Path) -> Path:
    """64-bit offsets, which pyarrow takes for columns of more than 2 GB."""
    saved(rows, folder)
    (file,) = folder.glob("*.arrow")
    with pa.memory_map(str(file)) as mapped:
        table = pa.ipc.open_stream(mapped).read_all()
    column = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
    schema = table.schema.set(0, pa.field("image", column))
    file.unlink()
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table.cast(schema), max_chunksize=7)
    return folder


def uncompress(file: Path, rows: int) -> None:
    """As newer releases of datasets write images; the oldest supported one compresses them."""
    if pq.ParquetFile(file).metadata.row_group(0).column(0).compression != "UNCOMPRESSED":
        pq.write_table(pq.read_table(file), file, compression="none", row_group_size=rows)


def parquet(rows: dict[str, list[Any]], folder: Path) -> Path:
    """As ``push_to_hub`` lays a set out."""
    (folder / "data").mkdir(parents=True)
    data = Dataset.from_dict(rows, features=FEATURES)
    for number in range(2):
        part = data.shard(2, number, contiguous=True)
        part.to_parquet(folder / f"data/train-{number:05d}-of-00002.parquet", batch_size=4)
        uncompress(folder / f"data/train-{number:05d}-of-00002.parquet", 4)
    return folder


def plain_dictionary(rows: dict[str, list[Any]], folder: Path) -> Path:
    """Uncompressed, with a dictionary that holds equal images once."""
    folder.mkdir()
    table = Dataset.from_dict(rows, features=FEATURES).data.table
    pq.write_table(table, folder / "train.parquet", compression="none", row_group_size=5, use_dictionary=True)
    return folder


FORMS = [saved, many_batches, large_offsets, parquet, plain_dictionary]


@pytest.mark.parametrize("write", FORMS)
def test_bytes_and_labels_are_those_that_were_written(
    write: Callable[[dict[str, list[Any]], Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_values, "_BATCH", 5)  # parts of a record batch are looked at, too
    rows = few()
    rows["image"][7] = rows["image"][5]  # equal images are images of their own
    rows["image"][11] = rows["image"][10]
    index = list_source(write(rows, tmp_path / "set"))
    assert_holds(index, rows)
    assert [index.names[i] for i in range(3)] == ["row_00000000.png", "im_1.jpg", "row_00000002.jpg"]
    assert any("read where they lie" in note for note in index.notes)


@pytest.mark.parametrize("version", ["1.18.4", "2.14.7"])
def test_older_writers(version: str, tmp_path: Path) -> None:
    """Their saved folders are read in place, their compressed parquet is unpacked by the tool; both hold the same."""
    saved_set = list_source(OLD / f"datasets-{version}")
    rows = datasets.load_from_disk(OLD / f"datasets-{version}").cast_column("image", ImageFeature(decode=False))
    assert_holds(saved_set, rows.to_dict())
    source = OLD / f"datasets-{version}.parquet"
    with pytest.raises(NotInPlaceError, match=r"are compressed \(SNAPPY\), so .*give --to_shards DIR"):
        list_source(source)
    result = run_tool(source, "--to_shards", tmp_path / "shards", "--shard_size", 4, "--out", tmp_path / "index")
    assert result.returncode == 0, result.stderr
    assert "holds compressed images, which are unpacked into" in result.stdout
    assert "6/6" in result.stderr  # the progress bar
    classes = CLASSES if version == "2.14.7" else ()  # 1.18.4 wrote no features into parquet
    assert_holds(load_index(tmp_path / "index"), rows.to_dict(), classes)


def test_unpacking_continues_where_it_was_stopped(tmp_path: Path) -> None:
    """Shards that are there are kept; rows without an image and what is no image are left out; images are scaled."""
    rows = few(20)
    rows["image"][3] = None
    rows["image"][4] = {"bytes": b"no image", "path": "x.jpg"}
    rows["label"][5] = None
    (tmp_path / "set").mkdir()
    table = Dataset.from_dict(rows, features=FEATURES).data.table
    for number, part in enumerate((table.slice(0, 9), table.slice(9))):
        pq.write_table(part, tmp_path / f"set/part-{number}.parquet", row_group_size=4)
    command = [tmp_path / "set", "--to_shards", tmp_path / "shards", "--shard_size", 6, "--resize", 22]
    assert run_tool(*command, "--out", tmp_path / "one").returncode == 0
    index = load_index(tmp_path / "one")
    kept = [i for i in range(20) if i not in (3, 4)]
    assert index.label.tolist() == [-1 if rows["label"][i] is None else rows["label"][i] for i in kept]
    assert int(np.minimum(index.width, index.height).max()) == 22
    assert [name for name, _ in index.quarantine] == ["x.jpg"]

    shards = sorted((tmp_path / "shards").glob("*.tar"))
    first = [shard.read_bytes() for shard in shards]
    assert len(first) == 4
    shards[1].unlink()
    kept_time = shards[0].stat().st_mtime_ns
    assert run_tool(*command, "--out", tmp_path / "two").returncode == 0
    assert [shard.read_bytes() for shard in shards] == first
    assert shards[0].stat().st_mtime_ns == kept_time
    command[4] = 7
    refused = run_tool(*command, "--out", tmp_path / "three")
    assert refused.returncode == 2
    assert "holds shards of other images or another size" in refused.stderr


def test_chosen_rows_and_splits(tmp_path: Path) -> None:
    rows = few()
    folder = saved(rows, tmp_path / "set")
    chosen = [7, 2, 2, 11]
    sink = pa.OSFile(str(folder / "indices.arrow"), "wb")  # as releases of datasets before 1.6 left a filtered set
    with sink, pa.ipc.new_stream(sink, pa.schema([("indices", pa.uint64())])) as writer:
        writer.write_batch(pa.record_batch([pa.array(chosen, pa.uint64())], ["indices"]))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    assert_holds(list_source(folder), {name: [column[i] for i in chosen] for name, column in rows.items()})

    data = Dataset.from_dict(rows, features=FEATURES)
    filtered = data.filter(lambda row: row["label"] != 1)
    DatasetDict({"train": data, "validation": filtered}).save_to_disk(tmp_path / "dict")
    kept = {name: [value for i, value in enumerate(column) if i % 3 != 1] for name, column in rows.items()}
    assert_holds(list_source(tmp_path / "dict"), rows)
    assert "split train of train, validation" in list_source(tmp_path / "dict").notes
    assert_holds(list_source(tmp_path / "dict", "val"), kept)
    with pytest.raises(ConfigError, match=r"holds the splits train, validation, and none of them is extra: choose one"):
        list_source(tmp_path / "dict", "extra")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00294.parquet", "train"),
        ("imagenet1k-validation-07.tar", "validation"),
        ("imagenet-1k-test-00000-of-00257.arrow", "test"),
        ("default/train/0000.parquet", "train"),
        ("unlabeled-00000-of-00001.parquet", "unlabeled"),
        ("val.parquet", "validation"),
        ("n01440764.tar", ""),
        ("shard_000001.tar", ""),
        ("trainer_7.tar", ""),
    ],
)
def test_names_tell_splits(name: str, split: str) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("name", "values", "labels", "note"),
    [
        ("label", pa.array([2.0, 0.0, float("nan")]), [2, 0, -1], "1 image without a label"),
        ("label", pa.array(["ox", "ant", None]).dictionary_encode(), [1, 0, -1], "1 image without a label"),
        ("label", pa.array([True, False, True]), [1, 0, 1], ""),
        ("Label", pa.array([0, 1, 1]), [0, 1, 1], ""),
        ("label", pa.array([[0], [1], [1]]), [-1] * 3, "no labels are taken from column label, which holds list<"),
        ("label", pa.nulls(3), [-1] * 3, "no labels are taken from column label, which holds null"),
        ("label", pa.array([0.5, 0.0, 1.0]), None, "holds the label 0.5; a class number is whole"),
        ("label", pa.array([2**40, 0, 1]), None, "holds the label 1099511627776"),
    ],
)
def test_labels_of_every_type(name: str, values: pa.Array, labels: list[int] | None, note: str, tmp_path: Path) -> None:
    """Are read as what they mean, or it is said that they are not."""
    images = [{"bytes": encoded(i), "path": None} for i in range(3)]
    pq.write_table(pa.table({"image": images, name: values}), tmp_path / "a.parquet", compression="NONE")
    if labels is None:
        with pytest.raises(ConfigError, match=note):
            list_source(tmp_path)
        return
    index = list_source(tmp_path)
    assert index.label.tolist() == labels
    assert note in "; ".join(index.notes)


def test_shards_as_timm_has_them(tmp_path: Path) -> None:
    """timm/imagenet-1k-wds: jpg, cls and json of a key, both splits in one folder."""
    for split, numbers in (("train", range(4)), ("validation", range(4, 7))):
        members = []
        for i in numbers:
            key = f"n0144076{i}_{i}"
            facts = {"label": i, "class_name": f"n0144076{i}", "width": 20, "height": 24, "filename": f"{key}.JPEG"}
            members += [(f"{key}.cls", str(i).encode()), (f"{key}.jpg", encoded(i))]
            members += [(f"{key}.json", json.dumps(facts).encode())]
        write_tar(tmp_path / f"imagenet1k-{split}-0000.tar", members)
    (tmp_path / "_info.json").write_text("{}")
    index = list_source(tmp_path)
    assert index.label.tolist() == [0, 1, 2, 3]
    assert "split train of train, validation" in index.notes
    assert list_source(tmp_path, "validation").label.tolist() == [4, 5, 6]


def test_rows_that_hold_only_a_path(tmp_path: Path) -> None:
    """All of them: the files are read. Some, or files that are gone: refused."""
    folder = saved(few(4), tmp_path / "set")
    (file,) = folder.glob("*.arrow")
    with pa.memory_map(str(file)) as mapped:
        table = pa.ipc.open_stream(mapped).read_all()

    def rewrite(images: list[dict[str, Any]]) -> None:
        column = pa.array(images, table.schema.field("image").type)
        file.unlink()
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.set_column(0, table.schema.field("image"), column))

    paths = []
    for i in range(4):
        paths.append(tmp_path / f"images/{i % 2}/{i}.jpg")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_bytes(encoded(i))
    rewrite([{"bytes": None, "path": str(path)} for path in paths])
    index = list_source(folder)
    assert index.root == tmp_path / "images"
    assert_holds(index, {"image": [{"bytes": path.read_bytes()} for path in paths], "label": [0, 1, 2, 0]})

    paths[2].unlink()
    with pytest.raises(ConfigError, match=r"holds only the paths of its images, and there is no file .*/0/2.jpg: save"):
        list_source(folder)
    rewrite([{"bytes": encoded(i) if i else None, "path": str(path)} for i, path in enumerate(paths)])
    with pytest.raises(ConfigError, match=r"row 0 of .* holds only a path .* where others hold the image itself"):
        list_source(folder)


def write_columns(columns: dict[str, pa.Array]) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(pa.table(columns), folder / "x.parquet", compression="none")


def damage(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (file,) = saved(few(), folder).glob("*.arrow")
        file.write_bytes(change(file.read_bytes()))

    return write


def lose_file(folder: Path) -> None:
    (file,) = saved(few(), folder).glob("*.arrow")
    file.unlink()


def two_sets(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir()
        Dataset.from_dict(few(3), features=FEATURES).to_parquet(folder / name / "train.parquet")


OFFSETS = np.array([0, len(few(1)["image"][0]["bytes"])], np.int32).tobytes()  # of the first image in an Arrow file
IMAGES = pa.array([encoded(i) for i in range(3)])
REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (damage(lambda data: data[:-20]), r"does not end as an Arrow stream does, so it may be cut short"),
    (damage(lambda data: b"ARROW1" + data[6:]), r"cannot be read \(.*\): is it damaged or cut short"),
    (damage(lambda data: data[:100] + bytes(400) + data[500:]), r"has no column of encoded images .* columns are none"),
    (damage(lambda data: data.replace(OFFSETS, OFFSETS[:4] + b"\xff" * 4)), r"cannot be read \(.*\): is it damaged or"),
    (damage(lambda data: b""), r"\.arrow is empty: get it again"),
    (lose_file, r"data-00000-of-00001.arrow is missing, which state.json names"),
    (lambda folder: (folder / "state.json").write_text("[]"), r"state.json is no JSON object"),
    (lambda folder: (folder / "state.json").write_text("{}"), r"state.json does not name the set's files"),
    (lambda folder: (folder / "dataset_dict.json").write_text("{}"), r"dataset_dict.json names no splits"),
    (lambda folder: (folder / "x.parquet").write_bytes(b"PAR1 and more, but no table"), r"x.parquet cannot be read \("),
    (write_columns({"label": pa.array([1, 2])}), r"has no column of encoded images .*; its columns are label\."),
    (
        write_columns({"left": IMAGES, "right": IMAGES}),
        r"several columns of images, left, right, and their names do not",
    ),
    (write_columns({"image": IMAGES[:0]}), r"holds no images: its tables have no rows"),
    (write_columns({"image": pa.array([None, None], pa.binary())}), r"holds no images: all of its rows are empty"),
    (two_sets, r"holds tables in several folders, a and b, which may be different sets"),
]


@pytest.mark.parametrize(("write", "sentence"), REFUSED, ids=[sentence[:30] for _, sentence in REFUSED])
def test_what_is_refused(write: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match=sentence) as caught:
        list_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_training_run_is_told_to_index_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds Arrow or parquet files: index them with tools/index_dataset.py"):
        scan_folder(saved(few(), tmp_path / "set"))


def test_columns_that_are_taken(tmp_path: Path) -> None:
    """Bytes alone, strings as labels, and what is said where labels are ambiguous."""
    write_columns({"jpg": IMAGES, "cls": pa.array(["dog", "cat", None]), "thumb": IMAGES})(tmp_path)
    index = list_source(tmp_path)
    assert index.label.tolist() == [1, 0, -1]
    assert index.classes == ("cat", "dog")
    fine = Features(
        {"img": ImageFeature(), "fine_label": ClassLabel(names=["a"]), "coarse_label": ClassLabel(names=["b"])}
    )
    rows = {"img": few(2)["image"], "fine_label": [0, 0], "coarse_label": [0, 0]}
    Dataset.from_dict(rows, features=fine).save_to_disk(tmp_path / "fine")
    index = list_source(tmp_path / "fine")
    assert index.label.tolist() == [-1, -1]
    assert any("no labels are taken, since fine_label, coarse_label could be them" in note for note in index.notes)


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_image_and_mask_pairs(form: str, tmp_path: Path) -> None:
    """Masks are ranges of the same files, in an index on disk too."""
    features = Features({"image": ImageFeature(), "annotation": ImageFeature()})
    images = [{"bytes": encoded(i), "path": f"{i}.jpg"} for i in range(6)]
    masks = [{"bytes": encoded(i, "L", "PNG"), "path": f"{i}.png"} for i in range(6)]
    data = Dataset.from_dict({"image": images, "annotation": masks}, features=features)
    if form == "saved":
        data.save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        data.to_parquet(tmp_path / "set/train-00000-of-00001.parquet")
        uncompress(tmp_path / "set/train-00000-of-00001.parquet", 6)
    result = run_tool(tmp_path / "set", "--verify", "full", "--out", tmp_path / "index")
    assert result.returncode == 0, result.stderr
    index = load_index(tmp_path / "index")
    assert len(index) == 6
    for i in range(6):
        with Image.open(io.BytesIO(masks[i]["bytes"])) as mask:
            found = load_mask(index, i, MaskConfig(num_classes=3, reduce_zero_label=False))
            assert np.array_equal(found, np.asarray(mask))


@pytest.mark.parametrize("write", [many_batches, parquet])
def test_training_sees_what_it_sees_in_the_folder(
    write: Callable[[dict[str, list[Any]], Path], Path], photographs: Path, tmp_path: Path
) -> None:
    """The same samples, boxes and pixels as from the files, on every grid, and from there on after a restart."""
    folder = scan_folder(photographs)
    pixels, images = seen_on(Grid(), folder, 8)
    save_index(read_sizes(list_source(write(rows_of(photographs), tmp_path / "set"))), tmp_path / "index")
    index = load_index(tmp_path / "index")
    samples = np.arange(len(images))
    boxes = [crop_boxes(SEED, samples, found.width[images], found.height[images], 0.2) for found in (folder, index)]
    assert np.array_equal(*boxes)
    check_grids(GRIDS, index, pixels, images, 5)


def test_packing_what_is_read_in_place(tmp_path: Path) -> None:
    """--to_shards of a set that lies plainly packs it as it packs a folder."""
    rows = few()
    saved(rows, tmp_path / "set")
    result = run_tool(tmp_path / "set", "--to_shards", tmp_path / "shards", "--out", tmp_path / "index")
    assert result.returncode == 0, result.stderr
    assert_holds(load_index(tmp_path / "index"), rows)
    shutil.rmtree(tmp_path / "set")
    assert len(list_source(tmp_path / "shards")) == 12
