"""Part 4: the GPU's decoder: its pixels, whether they depend on the batch, damaged files, and its best settings."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_nepa.acceptance.check import Check, from_doctor
from megatron_nepa.acceptance.report import Row
from megatron_nepa.acceptance.roofline import planned
from megatron_nepa.acceptance.setting import Setting

LOADS = (0.0, 0.65, 1.0)  # of the hardware engine: none, DataConfig's, all
SWEPT_LOADS = (0.0, 0.12, 0.35, 0.65, 1.0)
SWEPT_THREADS = (2, 4, 8, 16)
SIZE = 224


def checks(setting: Setting) -> list[Check]:
    """Right first, then fast."""
    found = [
        Check("pixels on the CPU", 30, cpu_pixels, gpu=False),
        Check("pixels on the GPU", 30, partial(gpu_pixels, setting)),
    ]
    for load in LOADS:
        name = f"a pixel and its batch, hw_decoder_load {load:g}"
        found.append(Check(name, 30, partial(independence, setting, name, load)))
    found.append(Check("damaged and odd files", 40, partial(verdicts, setting)))
    found.append(Check("decoding speed", 90, partial(speed, setting)))
    return found


def cpu_pixels() -> Iterator[Row]:
    """DALI's crops against Pillow's."""
    from megatron_nepa.acceptance.images import folder_of_photographs
    from megatron_nepa.doctor.decoding import compare, crops, pillow_crops

    with folder_of_photographs() as folder:
        found = crops(folder, torch.device("cpu"))
        yield from_doctor(compare("pixels on the CPU", found, pillow_crops(folder), "Pillow's", "reinstall DALI."))


def gpu_pixels(setting: Setting) -> Iterator[Row]:
    """The GPU's crops against the CPU's."""
    from megatron_nepa.acceptance.images import folder_of_photographs
    from megatron_nepa.doctor.decoding import compare, crops

    remedy = "take the DALI wheel of your driver's CUDA: extra cuda12 or cuda13."
    with folder_of_photographs() as folder:
        found, expected = crops(folder, setting.calls.device).cpu(), crops(folder, torch.device("cpu"))
        yield from_doctor(compare("pixels on the GPU", found, expected, "the CPU's", remedy))


def independence(setting: Setting, name: str, load: float) -> Iterator[Row]:
    """Each image alone, and in batches of two orders."""
    from megatron_nepa.acceptance.images import folder_of_photographs

    with folder_of_photographs() as folder:
        files = [np.fromfile(path, np.uint8) for path in sorted(folder.iterdir())]
    count = setting.decoded_images
    many = [files[i % len(files)] for i in range(count)]
    in_order, reversed_ = decode(setting, many, load), decode(setting, many[::-1], load)
    alone = torch.cat([decode(setting, [file], load) for file in files])
    yield independence_row(name, load, [(in_order[: len(files)], alone), (in_order, reversed_.flip(0))])


def independence_row(name: str, load: float, pairs: Sequence[tuple[Tensor, Tensor]]) -> Row:
    """Whether the same images have the same pixels."""
    worst = max(int((a.int() - b.int()).abs().max()) for a, b in pairs)
    if worst == 0:
        return Row(name, "PASS", "equal, alone and in batches of two orders", "the batch decides nothing")
    figure = f"the same image differs by up to {worst} of 255"
    split = 0 < load < 1
    meaning = "hardware engine and CUDA kernels share a batch and round differently" if split else ""
    remedy = "decode with --data.hw_decoder_load 0 or 1 where a run must repeat bit for bit."
    return Row(name, "FAIL", figure, meaning or "decoding depends on the batch", remedy)


def decode(setting: Setting, files: list[np.ndarray], load: float) -> Tensor:
    """The middle of each image, scaled as training does, uint8 [n, 3, S, S] on the CPU."""
    from PIL import Image

    from megatron_nepa.data.decoding.crop_pipeline import EncodedBatch, crop_pipeline
    from megatron_nepa.data.decoding.pipelines import DecoderOptions

    sizes = [Image.open(io.BytesIO(file.tobytes())).size for file in files]
    start = np.array([(width // 8, height // 8) for width, height in sizes], np.int32)
    shape = np.array([(3 * width // 4, 3 * height // 4) for width, height in sizes], np.int32)
    options = DecoderOptions(setting.calls.device, 4, load, max(w for w, _ in sizes), max(h for _, h in sizes))
    pipeline = crop_pipeline(lambda number: EncodedBatch(files, start, shape), len(files), SIZE, options)
    try:
        return pipeline.next_images().cpu().clone()
    finally:
        pipeline.close()


def damaged_files() -> dict[str, bytes]:
    """JPEGs of kinds that are rare, and of kinds that are broken."""
    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((173, 131), Image.Resampling.BICUBIC)

    def encoded(image: Image.Image, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", **options)  # type: ignore[arg-type]
        return buffer.getvalue()

    plain, progressive = encoded(picture, quality=90), encoded(picture, progressive=True)
    return {
        "plain": plain,
        "progressive": progressive,
        "grey": encoded(picture.convert("L")),
        "CMYK": encoded(picture.convert("CMYK")),
        "4:4:4": encoded(picture, subsampling=0),
        "restart markers": encoded(picture, restart_marker_rows=1),
        "one pixel": encoded(picture.resize((1, 1))),
        "cut after its header": plain[:700],
        "cut in the middle": plain[: len(plain) // 2],
        "cut before its last bytes": plain[:-20],
        "without its end marker": plain[:-2],
        "progressive, cut in the middle": progressive[: len(progressive) // 2],
        "zeros in the middle": plain[: len(plain) // 2] + bytes(200) + plain[len(plain) // 2 + 200 :],
    }


def verdicts(setting: Setting) -> Iterator[Row]:
    """Which files the GPU's decoder takes and libjpeg-turbo does not, or the other way round."""
    files, device = damaged_files(), setting.calls.device.type
    yield verdict_row({name: (_decodes(data, "cpu"), _decodes(data, device)) for name, data in files.items()})


def verdict_row(found: dict[str, tuple[bool, bool]]) -> Row:
    """Of the verdicts on the CPU and on the GPU."""
    words = {True: "takes", False: "refuses"}
    differing = [f"{name} (the CPU {words[a]}, the GPU {words[b]})" for name, (a, b) in found.items() if a != b]
    refused = [name for name, (a, _) in found.items() if not a]
    if not differing:
        figure = f"{len(found)} files, {len(refused)} refused by both: {', '.join(refused)}"
        return Row("damaged and odd files", "PASS", figure, "an index checked on a CPU holds on this GPU")
    remedy = "check the index with tools/index_dataset.py --verify full on the device that decodes."
    return Row("damaged and odd files", "FAIL", "; ".join(differing), "the decoders disagree", remedy)


def _decodes(data: bytes, device: str) -> bool:
    from PIL import Image

    from megatron_nepa.data.decoding.full_decode import full_decode
    from megatron_nepa.data.index.headers import UnreadableImageError

    try:
        full_decode(np.frombuffer(data, np.uint8), Image.open(io.BytesIO(data)).size, device)
    except (UnreadableImageError, OSError):
        return False
    return True


def speed(setting: Setting) -> Iterator[Row]:
    """Images a second over the decoder's settings; the best must feed the first model of part 3."""
    from megatron_nepa.acceptance.images import builtin_index, crop_stream

    index, batch = builtin_index(), setting.decoded_images
    found: dict[tuple[float, int], float] = {}
    for load in SWEPT_LOADS:
        for threads in SWEPT_THREADS:
            stream = crop_stream(setting, index, SIZE, batch, load, threads)
            for number in range(4 + setting.timed_steps):
                if number == 4:  # what was decoded ahead is not timed
                    setting.calls.synchronize()
                    start = time.perf_counter()
                next(stream)
            setting.calls.synchronize()
            found[load, threads] = batch * setting.timed_steps / (time.perf_counter() - start)
            stream.close()
    model = setting.speeds[0]
    needed = planned(setting.calls, model.recipe, model.micro_batches[-1]).images_per_second
    least = needed if setting.calls.device.type == "cuda" else 0.0
    yield speed_row(found, model.title, least, setting.calls.device.type == "cuda")


def speed_row(found: dict[tuple[float, int], float], title: str, needed: float, is_gpu: bool) -> Row:
    """The best settings, and whether they feed a model."""
    (load, threads), best = max(found.items(), key=lambda item: item[1])
    by_load = {swept: max(rate for (each, _), rate in found.items() if each == swept) for swept, _ in found}
    sweep = ", ".join(f"{swept:g}: {rate:.0f}" for swept, rate in by_load.items())
    setting = f"--data.hw_decoder_load {load:g} --data.num_threads {threads}"
    figure = f"{best:.0f} images/s with {setting} (best by load: {sweep}); {title} is planned to take {needed:.0f}"
    results = {"gpu_decoding": figure} if is_gpu else {}
    if best < needed:
        remedy = "index smaller images (tools/index_dataset.py), or let more cores decode."
        return Row("decoding speed", "FAIL", figure, "slow: the model would wait for images", remedy, results)
    return Row("decoding speed", "PASS", figure, f"train with {setting}", "", results)
