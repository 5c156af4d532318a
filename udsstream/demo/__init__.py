"""What `make demo` needs on a machine without a network: a data set and a model that are already there."""
