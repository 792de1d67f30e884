"""A trunk under torchvision's Mask R-CNN: one step on COCO's format, and boxes that lie where they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

import megatron_nepa.timm  # noqa: F401  registers the models
from megatron_nepa.config import ConfigError
from megatron_nepa.detection import PyramidBackbone, mask_rcnn
from megatron_nepa.export.run_facts import RunFacts
from megatron_nepa.export.timm_folder import write_timm
from tests.export.models import EXAMPLES, random_weights

COCO = {
    "images": [{"id": 1, "file_name": "a.jpg", "height": 90, "width": 120}],
    "categories": [{"id": 1, "name": "box"}, {"id": 2, "name": "triangle"}],
    "annotations": [
        {
            "id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 1200, "bbox": [10, 20, 40, 30],
            "segmentation": [[10, 20, 50, 20, 50, 50, 10, 50]],
        },
        {
            "id": 2, "image_id": 1, "category_id": 2, "iscrowd": 0, "area": 800, "bbox": [60, 30, 40, 40],
            "segmentation": [[60, 70, 80, 30, 100, 70]],
        },
    ],
}  # fmt: skip


def coco_target(annotations: list[dict[str, Any]], height: int, width: int) -> dict[str, Tensor]:
    """Annotations of an image as torchvision takes them."""
    masks = []
    for annotation in annotations:
        mask = Image.new("L", (width, height))
        for polygon in annotation["segmentation"]:
            ImageDraw.Draw(mask).polygon(polygon, fill=1)
        masks.append(pil_to_tensor(mask)[0])
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32)
    return {
        "boxes": torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1),
        "labels": torch.tensor([annotation["category_id"] for annotation in annotations]),
        "masks": torch.stack(masks),
    }


@pytest.fixture(scope="module", params=["nepa_b", "nepa_l_release"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk with learned positions, and one with a BOS token."""
    path = tmp_path_factory.mktemp("timm") / "model"
    write_timm(random_weights(EXAMPLES[request.param]), RunFacts(), path)
    return path


def create(folder: Path, **settings: Any) -> Any:
    chosen = {"patch_size": 16, "dynamic_img_size": True, "causal": False, "num_classes": 0, **settings}
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **chosen)


def test_a_step_on_cocos_format(folder: Path) -> None:
    torch.manual_seed(0)
    model = mask_rcnn(create(folder, img_size=64), 3, out_channels=32, min_size=96, max_size=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    image = torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(0))
    targets = [coco_target(COCO["annotations"], 90, 120)]
    losses = model([image], targets)
    assert set(losses) >= {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    before = model.backbone.trunk.blocks[0].attn.qkv.weight.clone()
    sum(losses.values()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all("attn" not in name and "pyramid" not in name for name in without), without
    optimizer.step()
    assert not torch.equal(before, model.backbone.trunk.blocks[0].attn.qkv.weight)
    model.eval()
    (found,) = model([image])
    assert found["masks"].shape[1:] == (1, 90, 120)


def test_the_levels_are_where_torchvision_takes_them_to_be(folder: Path) -> None:
    """Strides 4, 8, 16, 32 and 64, and the strides that RoIAlign infers."""
    model = mask_rcnn(create(folder, img_size=64), 3, out_channels=32, min_size=96, max_size=128).eval()
    levels = model.backbone(torch.rand(1, 3, 128, 192))
    assert [tuple(level.shape[2:]) for level in levels.values()] == [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]
    model([torch.rand(3, 96, 128)])
    assert model.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 14}, "rounds every level's stride to a power of 2"),
        ({"dynamic_img_size": False, "img_size": 64}, "create it with dynamic_img_size=True"),
    ],
)
def test_trunks_that_detectors_cannot_use_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PyramidBackbone(create(folder, **settings))
