"""Every method and every ablation of MFM, as overrides of a tiny run."""

from __future__ import annotations

from mfm_dist.methods import method_names

# A random teacher is sure of nothing: at the published threshold all that pseudo-labels weigh would be 0.
EXTRA = [
    "self_training.pseudo_threshold=0", "hrda.attention_options={width: 8}", "mic.mask_block_pixels=16",
    "model.decoder_options={width: 8}",
]  # fmt: skip
METHODS = {
    **{name: [f"method.name={name}"] for name in method_names()},
    "mic": ["method.name=mic", "mic.base_method=hrda"],
    "mic on daformer": ["method.name=mic", "mic.base_method=daformer", "mic.mode=separate"],
    "mic on dacs": ["method.name=mic", "mic.base_method=dacs", "mic.augment=false"],
    "hrda, fused view": ["method.name=hrda", "mfm.view=fused", "mfm.domain=both"],
    "hrda, few target labels": ["method.name=hrda", "data.target_labelled=camera_train"],
    "mic on source_only": ["method.name=mic", "mic.base_method=source_only", "mic.mode=separatesrc"],
}
ABLATIONS = [
    ["mfm.reconstruction=teacher_features"], ["mfm.reconstruction=student_features"], ["mfm.reconstruction=pixels"],
    ["mfm.use_rebuilder=false"], ["mfm.domain=source"], ["mfm.domain=both"],
    ["mfm.trained_parts=encoder"], ["mfm.trained_parts=decoder"],
]  # fmt: skip
