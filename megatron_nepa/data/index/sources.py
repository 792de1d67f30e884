"""Lists the images of every layout that can be indexed, before any of them is read.

A listing is a :class:`~megatron_nepa.data.index.dataset_index.DatasetIndex` whose widths and heights are still 0: what
:mod:`megatron_nepa.data.indexing.build` then verifies.
"""

from __future__ import annotations

from pathlib import Path

from megatron_nepa.config import require
from megatron_nepa.data.index.archives import list_tars
from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.folder import folder_listing, walked_folder
from megatron_nepa.data.index.pair_layouts import list_pairs, pair_layout
from megatron_nepa.data.index.walk import ARCHIVES, example


def list_source(source: str | Path, split: str = "training") -> DatasetIndex:
    """List the images of ``source``, whose layout is told from what is there.

    * a ``.tar`` file, or a folder of them without images: tar shards, in the WebDataset layout (``key.jpg`` with
      ``key.cls``, or ``key.json`` with a ``label``) or with class folders; a tar inside a tar is a class, as in
      ImageNet's training archive
    * a folder with ``images`` and ``annotations``: image and mask pairs of equal names, of one ``split`` where these
      have subfolders (ADE20K), else all; Cityscapes' and Pascal VOC's own folders likewise
    * any other folder: an ImageFolder tree or a flat folder; archives beside the images are passed over

    Args:
        source: file or folder.
        split: part of a set of image and mask pairs to take, where it has any.

    Raises:
        ConfigError: nothing there, no images, or something that cannot be read or is there in two ways.
    """
    path = Path(source)
    if path.is_file() and path.name.lower().endswith(ARCHIVES):
        return list_tars(path.parent, [path.name])
    if layout := pair_layout(path):
        return list_pairs(path, layout, split)
    walked = walked_folder(path)
    archives = walked.archives()
    if archives and not walked.images:
        return list_tars(path, archives)
    require(
        not archives or len(archives) < len(walked.images),
        f"{path} holds {len(archives)} archives ({example(archives)}) beside {len(walked.images)} images: move one "
        "kind away.",
    )
    return folder_listing(path, walked)
