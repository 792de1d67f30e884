"""Decoding that goes on around images that the decoder refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_nepa.data.decoding.pipelines import ImagePipeline
from megatron_nepa.data.decoding.sample_reader import SampleReader


class SubstitutingPipeline:
    """A decoding pipeline that is built anew without the image that it died of.

    Args:
        build: a pipeline whose first micro-batch is the given one and which reads through ``reader``.
        reader: gives another image in place of one that is rejected.
        undecodable_slots: the places in a micro-batch whose images do not decode by themselves; asked where the
            decoder's message names none.
        micro_batch: the first.
    """

    def __init__(
        self,
        build: Callable[[int], ImagePipeline],
        reader: SampleReader[Any],
        undecodable_slots: Callable[[int], list[int]],
        micro_batch: int,
    ) -> None:
        self._build, self._reader, self._undecodable_slots = build, reader, undecodable_slots
        # the one that comes next, counted from the start of the run
        self.micro_batch = micro_batch
        self._pipeline = build(micro_batch)

    def next_images(self) -> Tensor:
        """The images of the next micro-batch, in the pipeline's memory: drop them before the next call.

        Raises:
            ConfigError: a bad image where none is to be replaced, or too many of them.
        """
        while True:
            try:
                images = self._pipeline.next_images()
            except RuntimeError as error:
                slots = failed_slots(str(error)) or self._undecodable_slots(self.micro_batch)
                if not slots:  # every image decodes by itself: whatever it was, it was no bad image
                    raise
                self._reader.reject(self.micro_batch, slots, "the decoder refuses it")
                self._pipeline.close()
                self._pipeline = self._build(self.micro_batch)
            else:
                self.micro_batch += 1
                return images

    def close(self) -> None:
        """Free the pipeline and the reader's threads."""
        self._pipeline.close()
        self._reader.close()


def failed_slots(message: str) -> list[int]:
    """The batch slots that DALI's error message names, if it names any."""
    return sorted({int(slot) for slot in re.findall(r"sample #(\d+)", message)})
