"""The packaged tiny CLIP, and the scripts that made it from nothing but drawn scenes."""
