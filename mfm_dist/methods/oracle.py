"""Training on the target's own labels: the upper end that adaptation is measured against, never a UDA result."""

from __future__ import annotations

from collections.abc import Mapping

from mfm_dist.config.schema import RunConfig
from mfm_dist.methods.base import Method, Term


class Oracle(Method):
    """L = L_sup on labelled target images."""

    needs_teacher = False
    supervised_on = "target"

    def terms(self) -> Mapping[str, Term]:
        return {"source": self.source_term}


def build(config: RunConfig) -> Method:  # noqa: ARG001 - no setting of its own
    """Build the method as configured."""
    return Oracle()
