"""What images are compared by, and features remembered on disk."""
