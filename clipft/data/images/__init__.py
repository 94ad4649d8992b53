"""Turns the bytes of an image file into pixels, and pixels into the input of a model."""
