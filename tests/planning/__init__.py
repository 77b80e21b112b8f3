"""Tests of superoffload.planning."""
