"""Training on the source labels alone: the lower end that every adaptation is measured from."""

from __future__ import annotations

from collections.abc import Mapping

from mfm_dist.config.schema import RunConfig
from mfm_dist.methods.base import Method, Term


class SourceOnly(Method):
    """L = L_sup."""

    needs_teacher = False

    def terms(self) -> Mapping[str, Term]:
        return {"source": self.source_term}


def build(config: RunConfig) -> Method:  # noqa: ARG001 - no setting of its own
    """Build the method as configured."""
    return SourceOnly()
