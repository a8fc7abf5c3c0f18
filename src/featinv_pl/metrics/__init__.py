"""Scores as torchmetrics: states that add up over batches and ranks."""
