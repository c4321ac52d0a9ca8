"""Count parameters and multiply-adds: by module with fvcore, by term of the training step with torch's own counter.

MAC is one multiply-add of a convolution or matrix product, attention's two products included; FLOP is twice that.
Everything else (norms, interpolation, pointwise functions) is counted apart, one for each operation, because no
convention counts it alike. Weights play no part: networks are built without storage, and where fvcore must run one,
with zeros.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mfm_dist.batch import UDABatch
from mfm_dist.build import build_train_module, classes_without_data
from mfm_dist.config.schema import MFMSection, RunConfig
from mfm_dist.methods.mfm import mask_of
from mfm_dist.models.rebuilder import Rebuilder
from mfm_dist.models.segmentor import Segmentor
from mfm_dist.train_module import TrainModule

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # fvcore rests on torch.jit, which torch calls deprecated
    from fvcore.nn import FlopCountAnalysis

MULTIPLY_ADDS = {"conv", "linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum", "attention"}
"""fvcore's names of the operators that it counts in multiply-adds; all others it counts in single operations."""
ATTENTION = (
    "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
POINTWISE = (
    *("add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "exp", "log", "sqrt", "rsqrt", "pow"),
    *("gelu", "gelu_", "silu", "silu_", "sigmoid", "sigmoid_", "tanh", "leaky_relu", "leaky_relu_", "elu"),
    *("hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_"),
)
"""Counted as one operation an output element, gelu and its like included."""
REDUCTIONS = ("sum", "mean", "softmax", "log_softmax", "avg_pool2d", "linalg_vector_norm")
"""Counted as one operation an input element."""
NO_ARITHMETIC = (
    *("max_pool2d", "feature_dropout", "where", "clone", "pad", "reflection_pad2d", "expand_as", "lt", "le", "ne"),
    *("ones_like", "empty_like", "lift_fresh", "alias", "movedim", "unflatten", "numpy_T"),
)
"""Copies and comparisons, beside those that fvcore itself counts as nothing."""


@dataclass(frozen=True)
class Cost:
    """What a module has and what its forward computes, its children included."""

    parameters: int
    mac: int
    """Multiply-adds of convolutions and matrix products."""
    other: int
    """All other operations, one by one."""

    @property
    def flop(self) -> int:
        return 2 * self.mac


@dataclass(frozen=True)
class ForwardCost:
    """One forward, as fvcore sees it."""

    modules: Mapping[str, Cost]
    """By name of the module, parents before their children; the whole is ``""``."""
    operators: Mapping[str, int]
    """fvcore's count of each operator: multiply-adds for ``MULTIPLY_ADDS``, single operations for the others."""
    unsupported: Mapping[str, int]
    """Operators that nothing counts, with the number of calls."""

    @property
    def total(self) -> Cost:
        return self.modules[""]

    @property
    def fvcore_total(self) -> int:
        """What fvcore calls flops: multiply-adds and single operations in one sum."""
        return self.total.mac + self.total.other


def count_forward(module: nn.Module, *inputs: Any) -> ForwardCost:
    """Run the module once on the CPU under fvcore, with handles for what fvcore skips.

    Args:
        module: any module on the CPU; it is put into evaluation mode.
        inputs: tensors, or lists of them.
    """
    analysis = FlopCountAnalysis(module.eval(), inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)  # the caller shows them
    analysis.set_op_handle(**{f"aten::{name}": _attention for name in ATTENTION})
    analysis.set_op_handle("aten::baddbmm", _baddbmm)
    analysis.set_op_handle(**{f"aten::{name}": _one_an_output for name in POINTWISE})
    analysis.set_op_handle(**{f"aten::{name}": _one_an_input for name in REDUCTIONS})
    analysis.set_op_handle(**{f"aten::{name}": None for name in NO_ARITHMETIC})
    with torch.no_grad():
        counts = analysis.by_module_and_operator()
    children = dict(module.named_modules())
    modules = {
        name: Cost(
            parameters=sum(p.numel() for p in children[name].parameters()),
            mac=int(sum(number for operator, number in found.items() if operator in MULTIPLY_ADDS)),
            other=int(sum(number for operator, number in found.items() if operator not in MULTIPLY_ADDS)),
        )
        for name, found in counts.items()
    }
    operators = {name: int(number) for name, number in counts[""].items()}
    return ForwardCost(modules=modules, operators=operators, unsupported=dict(analysis.unsupported_ops()))


def torch_mac(module: nn.Module, *inputs: Any) -> int:
    """Count multiply-adds of one forward by torch's own counter, also of a module without storage."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(*inputs)
    return counter.get_total_flops() // 2


def _sizes(value: Any) -> list[int] | None:
    """Return the shape of a value in fvcore's graph; None for no tensor of known shape, such as a computed size."""
    sizes: list[int] | None = value.type().sizes() if value.isCompleteTensor() else None
    return sizes


def _attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:  # noqa: ARG001 - fvcore passes both
    """Count attention's products: q k^T and its weights times v; [..., heads, positions, channels] each."""
    query, key, value = (_sizes(v) for v in inputs[:3])
    assert query is not None
    assert key is not None
    assert value is not None
    return Counter({"attention": prod(query[:-1]) * key[-2] * (query[-1] + value[-1])})


def _baddbmm(inputs: list[Any], outputs: list[Any]) -> int:  # noqa: ARG001 - fvcore passes both
    first, second = (_sizes(v) for v in inputs[1:3])
    assert first is not None
    assert second is not None
    return prod(first) * second[-1]


def _one_an_output(inputs: list[Any], outputs: list[Any]) -> int:  # noqa: ARG001 - fvcore passes both
    sizes = _sizes(outputs[0])
    return 0 if sizes is None else prod(sizes)


def _one_an_input(inputs: list[Any], outputs: list[Any]) -> int:  # noqa: ARG001 - fvcore passes both
    sizes = _sizes(inputs[0])
    return 0 if sizes is None else prod(sizes)


def without_weights(config: RunConfig) -> RunConfig:
    """Return a copy that loads no weights and draws no augmentation, whose blur would be counted by chance."""
    config = deepcopy(config)
    config.model.pretrained, config.model.weights = False, None
    config.self_training.blur_prob = config.self_training.jitter_prob = 0.0
    return config


def build_without_storage(config: RunConfig) -> TrainModule:
    """Build the networks of a run on torch's meta device: shapes without numbers."""
    with torch.device("meta"):
        return build_train_module(without_weights(config), classes_without_data(config))


def blank_batch(config: RunConfig, block: int) -> UDABatch:
    """Return a micro-batch of zeros."""
    batch, (height, width) = config.train.micro_batch, config.data.crop
    image = torch.zeros(batch, 3, height, width, dtype=torch.uint8)
    label = torch.zeros(batch, height, width, dtype=torch.uint8)
    few = bool(config.data.target_labelled)
    return UDABatch(
        source_image=image,
        source_label=label,
        target_image=image.clone(),
        target_valid=torch.ones(batch, height, width, dtype=torch.bool),
        labelled_target_image=image.clone() if few else None,
        labelled_target_label=label.clone() if few else None,
        block=block,
    )


def with_zeros(module: nn.Module) -> nn.Module:
    """Return a copy on the CPU, every number zero."""
    copy = deepcopy(module).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*copy.parameters(), *copy.buffers()):
            tensor.zero_()
    return copy


def rebuilder_inputs(
    student: Segmentor, rebuilder: Rebuilder, image: Tensor, settings: MFMSection
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return what the Rebuilder is given for an image: zeros on the CPU of the right shapes, and a mask.

    Args:
        student: without storage.
        image: without storage, [B, 3, H, W].
        settings: what the mask hides; of blocks with ``readout`` that decides what is computed.
    """
    with torch.no_grad():
        maps = [torch.zeros(feature.shape) for feature in student.eval().encode(image)]
    exact = replace(settings, mask="exact")
    mask = mask_of(exact, rebuilder.grid, torch.Generator().manual_seed(0)).expand(len(image), -1, -1)
    return maps[-1], [maps[index] for index in student.decoder_inputs], mask


@dataclass
class TermCost:
    """Multiply-adds of one loss term for one micro-batch, by part of the networks."""

    forward: Counter[str]
    backward: Counter[str]
    """Twice the forward of what is trained, nothing for the rest."""

    @property
    def flop(self) -> int:
        return 2 * (self.forward.total() + self.backward.total())


def count_step(config: RunConfig) -> dict[str, TermCost]:
    """Count forward and backward of one micro-batch, by term in the order they run; the teacher comes first.

    The forward is ``TrainModule``'s own, run without storage and counted by torch. A product has two more in its
    backward, one for the gradient of each factor, so the backward counts twice the forward of every part that has
    trainable parameters and runs with gradients. (The first layer needs no gradient of the image; this is left in.)
    """
    module = build_without_storage(config)
    counter = FlopCounterMode(display=False)
    meter = _StepMeter(module, counter)
    with torch.device("meta"):
        batch = blank_batch(config, 0)
    with counter:
        inputs = module.step_inputs(batch)
        for meter.term in module.term_names:  # one by one, so that what is computed in a term is known
            module(batch, config.mfm.loss_weight, meter.term, inputs)
    outside = counter.get_total_flops() // 2 - sum(cost.forward.total() for cost in meter.costs.values())
    if outside:
        meter.costs["outside the networks"] = TermCost(Counter({"other": outside}), Counter())
    return meter.costs


class _StepMeter:
    """Notes which part of a module computes how much in which term."""

    def __init__(self, module: TrainModule, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.term = "teacher"
        """What runs now; the teacher first."""
        self.costs: dict[str, TermCost] = {}
        self._before: list[int] = []
        """At the start of each part that runs now, the outermost first."""
        parts: list[tuple[str, nn.Module]] = [("encoder", module.student.backbone)]
        parts += [("decoder", head) for head in module.student.heads]
        if module.initial_encoder is not None:
            parts.append(("initial encoder", module.initial_encoder))
        if module.rebuilder is not None:
            parts.append(("rebuilder", module.rebuilder))
        if module.teacher is not None:  # its encoder is asked alone, too, for what is rebuilt by regression
            parts += [("teacher", module.teacher), ("teacher", module.teacher.segmentor.backbone)]
        for name, part in parts:
            part.register_forward_pre_hook(self._start)
            part.register_forward_hook(partial(self._add, name))

    def _start(self, module: nn.Module, inputs: Any) -> None:  # noqa: ARG002 - a hook's arguments
        self._before.append(self.counter.get_total_flops())

    def _add(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002
        mac = (self.counter.get_total_flops() - self._before.pop()) // 2
        if self._before:
            return  # counted with the part it belongs to
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
        cost = self.costs.setdefault(self.term, TermCost(Counter(), Counter()))
        cost.forward[name] += mac
        if trained:
            cost.backward[name] += 2 * mac
