"""Measurements of Hardy beside other libraries. Not part of the installed package."""
