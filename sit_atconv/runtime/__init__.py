"""What the machine and the launcher give: processes, locks, threads, memory, and files that are whole or not there."""
