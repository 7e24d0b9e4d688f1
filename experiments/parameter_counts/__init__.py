"""Trainable parameters of published runs, counted again."""
