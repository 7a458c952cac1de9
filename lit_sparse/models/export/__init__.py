"""Hugging Face directories of trained models: weights, config, card, what other software reads."""
