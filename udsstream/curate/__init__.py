"""The chosen part of a stream, written out as a data set of its own, with its provenance."""
