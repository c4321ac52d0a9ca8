"""Proofs that take too long for ``make test``; ``make campaign`` runs them and appends their records."""
