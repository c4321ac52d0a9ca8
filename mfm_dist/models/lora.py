"""LoRA (Hu et al., ICLR 2022, arXiv 2106.09685) by ``peft``: low-rank additions to an encoder's layers.

Layers are replaced in place (``peft.inject_adapter_in_model``), without the wrapper of ``peft.get_peft_model``: the
encoder stays the module that it was, so copies of it (the teacher), ZeRO and checkpoints see nothing but a few more
parameters. A layer ``x`` becomes ``x.base_layer``, ``x.lora_A.default`` and ``x.lora_B.default``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mfm_dist.errors import ConfigError


def add_lora(network: nn.Module, *, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Give layers W an addition alpha / rank * B A, which alone is trained from here on; B is 0 at first.

    Args:
        rank: rows of A and columns of B.
        targets: ends of the names of linear layers.

    Raises:
        ConfigError: peft is not installed, or no linear layer is called so.
    """
    peft = _peft()
    named = f"model.lora.targets={', '.join(targets)}"
    layers = [f".{name}" for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if missing := [target for target in targets if not any(layer.endswith(f".{target}") for layer in layers)]:
        ends = dict.fromkeys(".".join(layer.split(".")[-2:]) for layer in layers)
        raise ConfigError(
            f"{named}: no linear layer of this encoder is called {', '.join(missing)}; "
            + (f"their names end in {', '.join(list(ends)[:12])}" if ends else "it has none, so set model.lora.rank=0")
        )
    chosen = [layer[1:] for layer in layers if layer.endswith(tuple(f".{target}" for target in targets))]
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen), network)
    if dead := [name for name, module in network.named_modules() if _passes_by(module)]:
        raise ConfigError(
            f"{named}: this encoder reads the weight of {dead[0]}.qkv past any "
            "addition; take the model of the same name without _qkvb, or model.lora.targets=[attn.proj]"
        )


def merge_lora(network: nn.Module) -> None:
    """Add the additions into the layers' own weights and take them away; does nothing where there are none."""
    adapted = [name for name, module in network.named_modules() if hasattr(module, "lora_A")]
    for name in adapted:
        layer: Any = network.get_submodule(name)
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, layer.get_base_layer())


def _passes_by(attention: Any) -> bool:
    """Tell whether a module is timm's attention with biases of its own, which takes qkv's weight and never calls it."""
    adapted = hasattr(getattr(attention, "qkv", None), "lora_A")
    return adapted and getattr(attention, "q_bias", None) is not None and not attention.qkv_bias_separate


def _peft() -> Any:
    """Import peft, which takes seconds, where it is used."""
    try:
        import peft
    except ModuleNotFoundError as error:
        missing = "model.lora needs the package peft: pip install '.[lora]', or set model.lora.rank=0"
        raise ConfigError(missing) from error
    return peft
