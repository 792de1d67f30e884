"""Lists the images of every layout that can be indexed, before any of them is read.

A listing is a :class:`~megatron_nepa.data.index.dataset_index.DatasetIndex` whose widths and heights are still 0: what
:mod:`megatron_nepa.data.indexing.build` then verifies.
"""

from __future__ import annotations

from pathlib import Path

from megatron_nepa.config import require
from megatron_nepa.data.index.archives import TarSource
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.folder import FolderSource, walked_folder
from megatron_nepa.data.index.listing import Known, Source
from megatron_nepa.data.index.pair_layouts import list_pairs, pair_layout
from megatron_nepa.data.index.remote_shards import list_remote
from megatron_nepa.data.index.splits import choose_split
from megatron_nepa.data.index.table_files import TABLES, TableSet, is_saved, loose_tables, saved_tables
from megatron_nepa.data.index.tables import table_source
from megatron_nepa.data.index.walk import ARCHIVES, example
from megatron_nepa.data.remote.folder import is_url, shard_urls
from megatron_nepa.terminal import counted


def list_source(source: str | Path, split: str = "training") -> DatasetIndex:
    """The images of :func:`open_source`, listed in memory."""
    return open_source(source, split).listing()


def open_source(source: str | Path, split: str = "training") -> Source:
    """The images of ``source``, whose layout is told from what is there, to be listed.

    * a folder that Hugging Face's ``datasets`` saved (``save_to_disk``), a parquet or Arrow file, or a folder of them
      as on the hub: their rows, of one ``split`` where there are several
    * the URL of a tar file, of several (``train-{0000..1023}.tar``) or of a folder of them, or a text file with such
      a URL a line: tar shards that are read where they lie, as below
    * a ``.tar`` file, or a folder of them without images: tar shards, of one ``split`` where their names tell several,
      in the WebDataset layout (``key.jpg`` with ``key.cls``, or ``key.json`` with a ``label``) or with class folders; a
      tar inside a tar is a class, as in ImageNet's training archive
    * a folder with ``images`` and ``annotations``: image and mask pairs of equal names, of one ``split`` where these
      have subfolders (ADE20K), else all; Cityscapes' and Pascal VOC's own folders likewise
    * any other folder: an ImageFolder tree or a flat folder; archives beside the images are passed over

    Args:
        source: file, folder or URL.
        split: part of the set to take, where it has any.

    Raises:
        NotInPlaceError: tables whose images are compressed.
        ConfigError: nothing there, no images, or something that cannot be read or is there in two ways.
    """
    if is_url(source) or shard_urls(source) is not None:
        folder, names = list_remote(source)
        return TarSource(folder, *choose_split(names, split, str(folder)))
    path = Path(source)
    if path.is_file() and path.name.lower().endswith(ARCHIVES):
        return TarSource(path.parent, (path.name,))
    if (path.is_file() and path.suffix in TABLES) or is_saved(path):
        return table_source(tables_in(path, split))
    if layout := pair_layout(path):
        return Known(list_pairs(path, layout, split))
    walked = walked_folder(path)
    archives = walked.archives
    if archives and not walked.images:
        tars, notes = choose_split(archives, split, str(path))
        return TarSource(path, tars, (*notes, *walked.besides(tars=True).note()))
    if not walked.images and walked.tables:
        return table_source(loose_tables(path, walked.tables, split))
    require(
        not archives or len(archives) < walked.images,
        f"{path} holds {counted(len(archives), 'archive')} ({example(archives)}) beside "
        f"{counted(walked.images, 'image')}: move one kind away.",
    )
    return FolderSource(path, walked)


def tables_in(path: Path, split: str) -> TableSet:
    """The Arrow or parquet files of a source that is listed from such.

    Raises:
        ConfigError: files that are missing or damaged, or no such split.
    """
    if path.is_file():
        return loose_tables(path.parent, [path.name], split)
    return saved_tables(path, split) if is_saved(path) else loose_tables(path, walked_folder(path).tables, split)
