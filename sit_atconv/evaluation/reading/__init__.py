"""From pictures and files of statistics to what the metrics compare."""
