"""Encoded images that DALI's decoder can be handed: one that it cannot parse may end the process.

DALI parses a batch's headers in its threads and, beside them, in the thread that runs the decoder. What raises in the
latter frees memory that the former still work on: a segmentation fault (DALI 2.4). Headers that the parser refuses
raise there, PNGs that are cut short among them, and regions outside their image; an image that parses and does not
decode is an ordinary error. Of a PNG, which parses with a chunk of any length above 2 GB, the decoder allocates that
length first: 4 GB for a file of a few kB.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from megatron_nepa.data.index.dataset_index import DatasetIndex
from megatron_nepa.data.index.headers import UnreadableImageError
from megatron_nepa.data.index.mixture import Mixture
from megatron_nepa.data.index.storage import ImageStore


class EncodedImages:
    """Reads the images of an index for DALI; safe to call from several threads.

    Args:
        index: the images.
    """

    def __init__(self, index: DatasetIndex) -> None:
        # DALI's own parser, which comes with it; imported here because it looks at the current GPU, by now the rank's
        from nvidia import nvimgcodec

        self._index, self._store, self._parse = index, ImageStore(index), nvimgcodec.CodeStream

    def read(self, image: int) -> npt.NDArray[np.uint8]:
        """The encoded bytes of image ``image``, uint8 [n]; the decoder parses them, and finds the index's size.

        Raises:
            UnreadableImageError: it does not, or the file cannot be read.
        """
        data = self._store.read(image)
        if data[:4].tobytes() == b"\x89PNG" and not _is_whole_png(data):
            raise UnreadableImageError("damaged or cut short: its chunks do not lead to its end")
        try:
            stream = self._parse(data)
            size, _ = (stream.width, stream.height), stream.dtype  # which fails where the bits of a pixel make no type
        except (RuntimeError, TypeError) as error:
            raise UnreadableImageError("damaged or cut short: the decoder cannot parse it") from error
        indexed = int(self._index.width[image]), int(self._index.height[image])
        if size != indexed:
            raise UnreadableImageError(
                f"has {size[0]} x {size[1]} pixels, and {indexed[0]} x {indexed[1]} when indexed"
            )
        return data

    def together(self, images: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """As :meth:`~megatron_nepa.data.index.storage.ImageStore.together`."""
        return self._store.together(images)

    def close(self) -> None:
        """Close the open files."""
        self._store.close()


class MixedImages:
    """:class:`EncodedImages` of a mixture, whose images are numbered through.

    Args:
        mixture: the sources.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._images = [EncodedImages(source.index) for source in mixture.sources]

    def read(self, image: int) -> npt.NDArray[np.uint8]:
        """As :meth:`EncodedImages.read`."""
        source, row = self._mixture.locate(image)
        return self._images[source].read(row)

    @contextlib.contextmanager
    def together(self, images: Sequence[int]) -> Iterator[None]:
        """As :meth:`EncodedImages.together`, source by source."""
        rows: dict[int, list[int]] = {}
        for image in images:
            source, row = self._mixture.locate(image)
            rows.setdefault(source, []).append(row)
        with contextlib.ExitStack() as stack:
            for source, mine in rows.items():
                stack.enter_context(self._images[source].together(mine))
            yield

    def close(self) -> None:
        """Close the open files."""
        for images in self._images:
            images.close()


def encoded_images(index: DatasetIndex | Mixture) -> EncodedImages | MixedImages:
    """The images of an index or a mixture for DALI."""
    return MixedImages(index) if isinstance(index, Mixture) else EncodedImages(index)


def _is_whole_png(png: npt.NDArray[np.uint8]) -> bool:
    """Whether the lengths of a PNG's chunks lead from one to the next, up to the one that ends the image."""
    place = 8  # behind the signature
    while place + 12 <= len(png):  # length, kind, content, checksum
        length, kind = struct.unpack_from(">I4s", png.data, place)
        place += 12 + length
        if kind == b"IEND":
            return place <= len(png)
    return False
