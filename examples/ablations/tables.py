"""The paper's tables: what each row changes, what the paper found, and what it claims."""

from __future__ import annotations

from dataclasses import dataclass, field

from examples.ablations.cells import Flags, Use

NEPA = "NEPA"
SCRATCH = "from scratch"  # no row of a table, but what a claim of failure compares with


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
        label: in the report.
        paper: accuracy on ImageNet in the paper, per cent, or "fail"; "" where the paper has no such row.
        pretraining: flags that differ from the study's NEPA.
        finetuning: flags that differ from the study's fine-tuning or, where the trunk is probed, from its probe.
        objective: a key of :data:`~examples.ablations.cells.OBJECTIVES`.
        steps: of pre-training; None: as many as the noise chose.
        use: of the trunk.
    """

    label: str
    paper: str
    pretraining: Flags = field(default_factory=dict)
    finetuning: Flags = field(default_factory=dict)
    objective: str = "nepa"
    steps: int | None = None
    use: Use = "fine-tuning"


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, as an order of two rows; or, where ``is_level``, that they do not differ."""

    sentence: str
    better: str
    worse: str
    is_level: bool = False


@dataclass(frozen=True)
class Table:
    """One of the paper's tables; ``note`` says what of its set-up is another one here."""

    name: str
    title: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    note: str = ""


def _baseline(paper: str) -> Row:
    return Row(NEPA, paper)


def _components(
    label: str, paper: str, *, scale: bool, rope: bool, norm: bool, gated: bool = False, objective: str = "nepa"
) -> Row:
    """A trunk of some components: LayerScale, RoPE, QK-norm, SwiGLU."""
    flags: Flags = {
        "model.layer_scale_init": 0.1 if scale else "none",
        "model.rope": str(rope).lower(),
        "model.qk_norm": "plain" if norm else "none",
    }
    return Row(label, paper, flags if gated else flags | _GELU, objective=objective)


_LAYER_SCALE = "LayerScale starts at 0.1, in the paper at 1e-5."
_GELU: Flags = {
    "model.mlp": "gelu",
    "model.mlp_hidden_size": 384,
}  # the width of equal parameters: two matrices, not three


SHIFT = Table(
    "1a",
    "shift, causal mask and stop-gradient",
    (
        _baseline("76.8"),
        Row("without the shift", "fail", {"objective.shift": "false"}),
        Row("without the causal mask", "73.6", {"model.causal": "false"}),
        Row("without the stop-gradient", "fail", {"objective.stop_gradient": "false"}),
    ),
    (
        Claim("Without the shift it fails: it is worth less than no pre-training.", SCRATCH, "without the shift"),
        Claim("The causal mask helps.", NEPA, "without the causal mask"),
        Claim("Without the stop-gradient it fails in the same way.", SCRATCH, "without the stop-gradient"),
    ),
    "In the paper a training that fails does not converge. Here each ends, and fails where what it leads to is less "
    "accurate than training from scratch.",
)
MASKING = Table(
    "1c",
    "masked input patches",
    (
        Row("0 %", "78.2"),
        Row("40 %", "76.4", {"objective.mask_ratio": 0.4}),
        Row("60 %", "75.7", {"objective.mask_ratio": 0.6}),
    ),
    (
        Claim("Masking 40 % of the input costs accuracy.", "0 %", "40 %"),
        Claim("Masking 60 % costs more than 40 %.", "40 %", "60 %"),
    ),
    "The paper masks the input of a plain ViT, that of table 1b.",
)
ATTENTION = Table(
    "1e",
    "attention in fine-tuning",
    (
        Row("bidirectional", "82.5"),
        Row("causal", "81.3", finetuning={"model.causal": "true"}),
    ),
    (Claim("Fine-tuning with bidirectional attention is better.", "bidirectional", "causal"),),
)
FEED_FORWARD = Table(
    "9",
    "feed-forward layers",
    (
        Row("SwiGLU", "83.8"),
        Row("GELU", "83.6", _GELU),
    ),
    (Claim("SwiGLU is a little better than GELU.", "SwiGLU", "GELU"),),
    "The paper tunes the learning rate and the layer decay of GELU, and calls SwiGLU non-essential; here both are as "
    "for SwiGLU.",
)
COMPONENTS = Table(
    "1b",
    "components, one added to the other",
    tuple(
        _components(label, paper, scale=scale, rope=rope, norm=norm, gated=gated)
        for label, paper, scale, rope, norm, gated in (
            ("plain ViT", "78.2", False, False, False, False),
            ("LayerScale", "77.4", True, False, False, False),
            ("LayerScale, RoPE", "80.2", True, True, False, False),
            ("LayerScale, RoPE, SwiGLU", "fail", True, True, False, True),
            ("LayerScale, RoPE, QK-norm", "81.1", True, True, True, False),
            ("LayerScale, RoPE, QK-norm, SwiGLU", "81.3", True, True, True, True),
        )
    ),
    (
        Claim("LayerScale costs a little accuracy.", "plain ViT", "LayerScale"),
        Claim("RoPE helps.", "LayerScale, RoPE", "LayerScale"),
        Claim("QK-norm helps.", "LayerScale, RoPE, QK-norm", "LayerScale, RoPE"),
        Claim("SwiGLU needs QK-norm.", "LayerScale, RoPE, QK-norm, SwiGLU", "LayerScale, RoPE, SwiGLU"),
        Claim("SwiGLU helps beside QK-norm.", "LayerScale, RoPE, QK-norm, SwiGLU", "LayerScale, RoPE, QK-norm"),
    ),
    _LAYER_SCALE,
)
PATCH_EMBEDDING = Table(
    "1d",
    "patch embedding in fine-tuning",
    (
        Row("trained", "73.1", {"model.layer_scale_init": 0.1}),
        Row("frozen", "77.4", {"model.layer_scale_init": 0.1}, {"model.freeze_patch_embedding": "true"}),
    ),
    (Claim("Freezing the patch embedding helps.", "frozen", "trained"),),
    f"{_LAYER_SCALE} The paper's trunk has LayerScale alone, here it has the other components, too.",
)
LAYER_DECAY = Table(
    "8",
    "layer-wise decay of the learning rate in fine-tuning",
    (
        Row("0.65", "83.0", finetuning={"layer_decay.rate": 0.65}),
        Row("0.35 to 1", "83.8", finetuning={"layer_decay.rate": 0.35, "layer_decay.rate_end": 1}),
    ),
    (Claim("A rate that rises from 0.35 to 1 is better.", "0.35 to 1", "0.65"),),
)
_UNTRAINED: Flags = {"optimizer.base_lr": 1e-12}
PROBE = Table(
    "6",
    "linear probe of the frozen trunk",
    (
        Row("last embedding", "11.3", {}, {"trunk.pooling": "last"}, use="probe"),
        Row("average of all", "14.1", {}, {"trunk.pooling": "mean"}, use="probe"),
        Row("untrained trunk, last embedding", "", _UNTRAINED, {"trunk.pooling": "last"}, steps=1, use="probe"),
        Row("untrained trunk, average of all", "", _UNTRAINED, {"trunk.pooling": "mean"}, steps=1, use="probe"),
        Row("fine-tuned instead", ""),
    ),
    (
        Claim("The average probes better than the last embedding.", "average of all", "last embedding"),
        Claim("A probe reaches less than fine-tuning.", "fine-tuned instead", "average of all"),
    ),
)
MAE_COMPONENTS = Table(
    "7",
    "MAE with components, one added to the other",
    tuple(
        _components(label, paper, scale=scale, rope=rope, norm=norm, objective="mae")
        for label, paper, scale, rope, norm in (
            ("MAE", "85.6", False, False, False),
            ("LayerScale", "85.5", True, False, False),
            ("LayerScale, RoPE", "85.6", True, True, False),
            ("LayerScale, RoPE, QK-norm", "85.6", True, True, True),
        )
    ),
    (
        Claim("LayerScale changes MAE little.", "MAE", "LayerScale", is_level=True),
        Claim("RoPE changes MAE little.", "LayerScale, RoPE", "LayerScale", is_level=True),
        Claim("QK-norm changes MAE little.", "LayerScale, RoPE, QK-norm", "LayerScale, RoPE", is_level=True),
    ),
    f"{_LAYER_SCALE} A difference within noise does not show that there is none.",
)
FIRST = (SHIFT, MASKING, ATTENTION, FEED_FORWARD)
SECOND = (COMPONENTS, PATCH_EMBEDDING, PROBE, MAE_COMPONENTS, LAYER_DECAY)
