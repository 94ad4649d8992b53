"""The differences between the families of CLIP, with one class for each family."""
