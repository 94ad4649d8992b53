"""The program that made the packaged tiny CLIP from drawn scenes; not part of the wheel."""
