"""What `asit plan`, `asit doctor`, `asit info` and `--dry-run` compute."""
