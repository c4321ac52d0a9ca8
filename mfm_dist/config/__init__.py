"""What a run can be told: every setting (``schema``), YAML and overrides (``loader``), mistakes (``validate``)."""
