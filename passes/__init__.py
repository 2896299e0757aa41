"""Relay to Relay."""
