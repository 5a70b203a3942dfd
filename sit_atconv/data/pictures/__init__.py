"""One picture: what a source of them is, how a file becomes pixels, how it is cropped."""
