"""From features to the numbers, their intervals, and the numbers of each class."""
