"""Stage i: dataset regeneration (DR4SR)."""
