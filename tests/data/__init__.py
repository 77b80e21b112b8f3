"""Tests of superoffload.data."""
