"""Every trainable parameter in every backward: DeepSpeed ZeRO-3 updates one that is left out with its old gradient."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class GradientCheck:
    """Watches which trainable parameters a backward reaches. For ``debug.check_gradients``; costs one call each."""

    def __init__(self, module: nn.Module) -> None:
        self._reached: set[str] = set()
        self._expected: list[str] = []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self._expected.append(name)
                # The tensor's own hook, because every engine leaves it alone; .grad is not kept under ZeRO.
                parameter.register_hook(self._marker(name))

    def after_micro_batch(self) -> None:
        """Check the backward of one micro-batch and begin anew.

        Raises:
            RuntimeError: naming the parameters that have no gradient from it.
        """
        missing = [name for name in self._expected if name not in self._reached]
        self._reached.clear()
        if missing:
            raise RuntimeError(
                f"{len(missing)} trainable parameters have no gradient from this backward, e.g. "
                f"{', '.join(missing[:5])}: ZeRO-3 would update them with their previous gradient. Run their "
                "module in every step and multiply what is off by 0"
            )

    def _marker(self, name: str) -> Callable[[Tensor], None]:
        def mark(_gradient: Tensor) -> None:
            self._reached.add(name)

        return mark
