"""Reading, cutting and log-mel spectrograms of recordings."""
