"""Tests of the package, in folders and files that mirror it."""
