"""Files: atomic writes, storage, retries, checkpoints, and safe reading of files of unknown origin."""
