"""What tells the families of CLIP apart, one class for each."""
