"""Tests of superoffload.use."""
