"""Rows of a data set, their encoding, and the batches made of them."""
