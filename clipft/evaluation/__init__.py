"""Measures a checkpoint against its pretrained model."""
