"""Scores, memory and selection as functions of tensors. Knows torch, not Composer and not Arrow."""
