"""Encoder layers in bfloat16 on a CPU."""
