"""Prepared data on disk: the manifest, the shard format, and reading, writing and verifying shards."""
