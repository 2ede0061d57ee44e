"""The demo: a data set of real recordings that any machine can make, and the main job run on it."""
