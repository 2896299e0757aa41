"""Sparse formats, operators and schedules."""
