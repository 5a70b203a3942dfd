"""Prepared data on disk: the manifest, the format of a shard, reading, writing and verifying them."""
