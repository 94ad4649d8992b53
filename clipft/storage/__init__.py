"""S3 <-> local folder: knows nothing of tars, models or training."""
