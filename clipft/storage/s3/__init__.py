"""Access to S3: client, keys, errors, checksums, checkpoints and byte ranges."""
