"""The emoji data set, and pictures composed of it."""
