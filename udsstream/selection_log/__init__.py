"""The record of every decision: Arrow files, their digests, and the reader. Knows pyarrow and numpy, not torch."""
