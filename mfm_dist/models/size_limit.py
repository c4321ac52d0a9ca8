"""Networks that nobody can build are refused while they are built, and not when memory or patience is at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules import module as hooks

from mfm_dist.errors import ConfigError

MOST_MODULES = 20_000
"""Of the largest network of timm 1.0 there are some 4,000."""
MOST_NUMBERS = 1 << 34
"""Parameters and buffers together, 64 GiB of them in fp32."""


@contextmanager
def limited_size(what: str) -> Iterator[None]:
    """Stop the building of networks inside the block that have too many modules or parameters.

    Args:
        what: names the settings that they follow from.

    Raises:
        ConfigError: one has.
    """
    modules = numbers = 0

    def count_module(owner: nn.Module, name: str, module: object) -> None:  # noqa: ARG001  the hook's signature
        nonlocal modules
        modules += 1
        if modules > MOST_MODULES:
            raise ConfigError(f"{what}: a network of more than {MOST_MODULES:,} layers is not built; ask for fewer")

    def count_numbers(owner: nn.Module, name: str, tensor: object) -> None:  # noqa: ARG001  the hook's signature
        nonlocal numbers
        numbers += getattr(tensor, "numel", int)()
        if numbers > MOST_NUMBERS:
            raise ConfigError(
                f"{what}: a network of more than {MOST_NUMBERS:,} parameters is not built; make it smaller"
            )

    handles = [
        hooks.register_module_module_registration_hook(count_module),
        hooks.register_module_parameter_registration_hook(count_numbers),
        hooks.register_module_buffer_registration_hook(count_numbers),
    ]
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        raise ConfigError(f"{what}: a network of this size does not fit into main memory: make it smaller") from error
    finally:
        for handle in handles:
            handle.remove()
