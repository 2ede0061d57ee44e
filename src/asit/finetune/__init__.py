"""Supervised fine-tuning: data set, initial model, training, validation and cross-validation."""
