"""open_clip's checkpoints and OpenAI's: found, read without running code, and converted."""
