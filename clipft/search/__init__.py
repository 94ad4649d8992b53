"""``clipft search``: an index of image embeddings, queried with text or an image."""
