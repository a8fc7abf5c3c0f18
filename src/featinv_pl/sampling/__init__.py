"""Sampling as functions of a denoiser."""
