"""The published sizes of the encoders, under timm's names; every method registers its models over these tables."""

from __future__ import annotations

VIT = {  # 16 px patches, 224 px images
    "vit_tiny_patch16_224": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small_patch16_224": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base_patch16_224": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large_patch16_224": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
SWIN = {  # 4 px patches, 224 px images unless they say
    "swin_tiny_patch4_window7_224": {**_TINY, "window_size": 7},
    "swin_small_patch4_window7_224": {**_SMALL, "window_size": 7},
    "swin_base_patch4_window7_224": {**_BASE, "window_size": 7},
    "swin_base_patch4_window14_224": {**_BASE, "window_size": 14},
    "swin_base_patch4_window6_192": {**_BASE, "window_size": 6, "image_size": 192},
    "swin_large_patch4_window14_224": {**_LARGE, "window_size": 14},
    "swin_large_patch4_window12_192": {**_LARGE, "window_size": 12, "image_size": 192},
}
CONVVIT = {  # 16 px patches in the last of three stages, 224 px images
    "convvit_base_patch16_224": {"embed_dims": (256, 384, 768), "depths": (2, 2, 11), "num_heads": 12},
}
