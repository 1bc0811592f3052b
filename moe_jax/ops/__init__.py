"""Numerics: one signature per operation, one implementation per platform, chosen in one place."""
