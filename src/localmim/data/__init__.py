"""Data sets, transforms, the built-in demo images, packing."""

from localmim.data.pipeline import Batch, TrainPipeline, eval_batches
from localmim.data.sources import ArraySource, Source, open_source

__all__ = ["ArraySource", "Batch", "Source", "TrainPipeline", "eval_batches", "open_source"]
