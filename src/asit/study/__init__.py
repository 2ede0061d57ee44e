"""Studies: grids of pretraining settings, run and scored arm by arm (docs/study.md)."""
