"""The script that made the packaged tiny CLIP, from nothing but drawn scenes."""
