"""Tests of superoffload.planning.checks."""
