"""Attention: the materialised reference, and the implementations that are chosen by name."""
