"""Concepts, steering, interpolation, composition, comparison."""
