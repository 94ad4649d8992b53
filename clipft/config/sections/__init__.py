"""The settings and their defaults, a section of the help each; ``Settings`` joins them."""
