"""The machine and the launcher: processes, locks, threads, memory, and files that are written atomically."""
