"""What a run can be told of its method: self-training, its extensions, MFM and the Rebuilder (part of ``schema``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class MethodSection:
    name: str = "dacs"
    """A file of mfm_dist/methods: source_only, oracle, dacs, daformer, hrda, mic."""


@dataclass(kw_only=True)
class SelfTrainingSection:
    ema_decay: float = 0.999
    """Decay of the teacher, alpha. DAFormer, HRDA, MIC: 0.999; plain DACS: 0.99."""
    pseudo_threshold: float = 0.968
    """The pseudo-weight is the share of pixels the teacher is at least this sure of, tau. UDA: 0.968."""
    class_draw: Literal["batch", "image"] = "batch"
    """ClassMix draws from the classes of the whole micro-batch (DAFormer, MIC) or of each image (original DACS)."""
    jitter_prob: float = 0.8
    """Chance that a mixed micro-batch is colour-jittered. UDA: 0.8, although the option there says 0.2."""
    jitter_strength: float = 0.2
    """Brightness, contrast and saturation factors are 1 +- this; hue turns by +- this. UDA: 0.2; DACS: 0.25."""
    blur_prob: float = 0.5
    """Chance that a mixed micro-batch is blurred. UDA: 0.5."""
    augment_form: Literal["published", "fast"] = "published"
    """Jitter in HSV, one change after the other, or folded into one matrix with a batched blur: the same draws, nearly
    the same pictures, a fraction of the kernels."""
    pseudo_weight_ignore_top: int = 0
    """Rows at the top of every target crop whose pseudo-label counts nothing. DAFormer on Cityscapes at 512: 15."""
    pseudo_weight_ignore_bottom: int = 0
    """The same at the bottom, the own bonnet. DAFormer on Cityscapes at 512: 120. Right only where crops are as high
    as the stored images."""


@dataclass(kw_only=True)
class DAFormerSection:
    feature_distance_weight: float = 0.005
    """Weight of the distance to the initial encoder's features, in daformer, hrda and mic on them. DAFormer: 0.005."""
    feature_distance_share: float = 0.75
    """Share of a feature's pixels that one thing class must cover for the feature to count. DAFormer: 0.75."""


@dataclass(kw_only=True)
class HRDASection:
    detail_loss_weight: float = 0.1
    """Weight of the loss on the detail crop; the fused prediction has the rest. HRDA: 0.1."""
    attention: str = "segformer"
    """Decoder that weighs detail against context; its stride must be that of `model.decoder`. HRDA: segformer, and
    deeplabv2 beside deeplabv2."""
    attention_options: dict[str, Any] = field(default_factory=lambda: {"width": 256})
    """Passed on to it. HRDA: {width: 256}, and {} for deeplabv2."""


@dataclass(kw_only=True)
class MICSection:
    on: Literal["source_only", "dacs", "daformer", "hrda"] = "hrda"
    """The method that masked image consistency is added to."""
    mode: Literal["separatetrg", "separatesrc", "separate"] = "separatetrg"
    """What is masked: target images, labelled source images, or half of each. MIC: separatetrg from synthetic data,
    separate from Cityscapes."""
    augment: bool = True
    """Jitter and blur before masking, as mixed images are. MIC: true from synthetic data, false from Cityscapes."""
    mask_ratio: float = 0.7
    """Chance of each block to be hidden. MIC: 0.7."""
    block: int | None = None
    """Side of a block in pixels of the crop; null: a 16th of its height. MIC: 64 in 1024 crops, 32 in 512 crops."""
    loss_weight: float = 1.0
    """Weight of the masked images' loss. MIC: 1."""
    pseudo_threshold: float | None = None
    """Threshold of a pseudo-weight of their own; null: the weight of the step (MIC), 0: every pixel weighs 1."""


@dataclass(kw_only=True)
class MFMSection:
    enabled: bool = False
    """Add the masked feature modeling term to the method."""
    loss_weight: float = 1.0
    """Weight of the term, lambda. MFM: 1.0."""
    mask_ratio: float = 0.4
    """Chance of each grid cell to be hidden. MFM: 0.4."""
    loss_on: Literal["all", "hidden"] = "all"
    """Pixels that the term counts: every one (MFM), or only those under hidden cells."""
    ramp_from: int = 0
    """Step up to which the weight is 0; it then grows linearly. MFM: 0, no ramp."""
    ramp_to: int = 0
    """Step from which the weight is `loss_weight`. MFM: 0, no ramp."""
    update_bn: bool = True
    """Whether this pass counts in the student's BatchNorm running statistics (never while its weight is 0)."""
    rebuilds: Literal["classes", "teacher_features", "student_features", "pixels"] = "classes"
    """What is asked of the rebuilt part: the class of each pixel through the decoder (MFM), or by regression the
    features of teacher or student, or the image. MFM, table of reconstruction targets."""
    rebuild: bool = True
    """False: hidden features are 0 and stay so, and there is no Rebuilder. MFM, row "mask without rebuilding"."""
    domain: Literal["target", "source", "both"] = "target"
    """Images the term is about: of the target with pseudo-labels (MFM), of the source with labels, or both, each with
    the weight lambda. MFM, table of domains."""
    trains: Literal["both", "encoder", "decoder"] = "both"
    """What the term trains beside the Rebuilder; the rest gets a gradient of 0 from it. MFM, table of what is trained:
    both."""
    view: Literal["context", "detail", "both"] = "context"
    """Under HRDA: the down-scaled whole crop, a window of it at full resolution, or both, each with the weight lambda.
    Elsewhere it is the crop."""


@dataclass(kw_only=True)
class RebuilderSection:
    depth: int = 2
    """Transformer blocks. MFM: 2."""
    width: int = 512
    """Channels of a block. MFM: 512."""
    heads: int = 16
    """Attention heads; must divide `width`. MFM: 16."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over `width`. MFM: 4."""
    grid: tuple[int, int] = (16, 16)
    """Cells (rows, columns) a crop is cut into; one number means a square. MFM: 16, 32 x 32 pixels of a 512 crop."""
