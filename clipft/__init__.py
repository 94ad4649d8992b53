"""clipft fine-tunes CLIP on your own image-text pairs and measures the gain."""

__version__ = "0.1.0"
