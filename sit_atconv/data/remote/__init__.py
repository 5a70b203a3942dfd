"""Data in object storage and at other addresses, through fsspec, and their cache on this machine."""
