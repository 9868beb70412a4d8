"""Masked image modelling for MindSpore, with LocalMIM first."""

__version__ = "0.1.0"
