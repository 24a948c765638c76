"""One running copy of a model version, the front desk, and what both share."""
