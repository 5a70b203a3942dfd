"""Features of images, and their cache on disk."""
